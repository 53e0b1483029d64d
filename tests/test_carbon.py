"""Carbon: the table, own figures, a time series, the hardware's share, SCI."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_bundles import BUILDERS, OPTIONS

from leangen import carbon, clock, intensity
from leangen.cli import main
from leangen.engine import Engine
from leangen.errors import RequestError
from leangen.records import Embodied
from leangen.session import Session

MORNING = "2026-11-21T08:30:00.123Z"


def of(energy_j, *given, u_j=None, at=MORNING, duration_s=0.0, units=0.0, **options):
    made = carbon.footprint(*given, **options)
    return made.of(energy_j, u_j, started_at=at, duration_s=duration_s, units=units)


def test_every_row_has_its_year_and_source():
    grids = intensity.grids()
    assert len(grids) >= 24
    for region, grid in grids.items():
        assert grid.region == region == region.lower()
        assert 0 < grid.intensity_g_per_kwh < 1500
        assert 2020 <= grid.year <= 2100
        assert grid.source and grid.name


def test_a_kilowatt_hour_costs_the_grids_intensity(monkeypatch):
    monkeypatch.delenv("LEANGEN_REGION", raising=False)
    world = of(3.6e6)
    assert (world.g, world.region, world.year) == (473, "world", 2024)
    assert (world.source, world.reason) == ("Ember via OWID", None)
    assert of(1.8e6, "SE", u_j=3.6e5).g == pytest.approx(18)
    assert of(1.8e6, "SE", u_j=3.6e5).u_g == pytest.approx(3.6)
    assert of(3.6e6, "Germany").region == "de"


def test_region_from_the_environment_and_an_argument_before_it(monkeypatch):
    monkeypatch.setenv("LEANGEN_REGION", "fr")
    assert of(3.6e6).region == "fr"
    assert of(3.6e6, "pl").region == "pl"


@pytest.mark.parametrize("given", [20, 20.0, "20"])
def test_own_intensity_goes_first(given):
    own = of(3.6e6, "de", intensity=given)
    assert (own.g, own.region, own.source) == (20, "de", "given by the user")
    assert of(3.6e6, intensity=given).region == "own"


def test_unknown_energy_has_unknown_emissions():
    unknown = of(None, "fr", embodied=(250, 4), duration_s=10, units=5)
    assert (unknown.g, unknown.u_g, unknown.sci_g_per_unit) == (None, None, None)
    assert unknown.reason == "the energy is unavailable"
    assert unknown.embodied_g > 0


def test_bad_region_and_intensity_are_refused():
    with pytest.raises(
        RequestError, match="region 'atlantis' is not in the carbon table.*world, eu"
    ):
        carbon.footprint("atlantis")
    for wrong in (-1.0, float("nan"), "inf", 1e308):
        with pytest.raises(RequestError, match="expected gCO2e/kWh of 0 to 1000000"):
            carbon.footprint(intensity=wrong)


def test_embodied_share_is_the_totals_part_by_time():
    four_years_s = 4 * 365.25 * 86_400
    assert of(0.0, embodied=(250, 4), duration_s=four_years_s).embodied_g == pytest.approx(250e3)
    hour = of(0.0, embodied=(250, 4), duration_s=3600)
    assert hour.embodied_g == pytest.approx(250e3 / (4 * 365.25 * 24))
    assert hour.embodied == Embodied(
        total_kg=250, lifetime_years=4, g_per_s=pytest.approx(250e3 / four_years_s)
    )
    assert hour.g == 0, "operational emissions do not hold the hardware's"


@pytest.mark.parametrize(
    "embodied", [(0, 4), (-1, 4), (250, 0), (250, float("nan")), (1e308, 1), (250, 1e-308)]
)
def test_bad_embodied_figures_are_refused(embodied):
    with pytest.raises(RequestError, match="expected more than 0.*250,4"):
        carbon.footprint(embodied=embodied)


@given(
    energy_j=st.floats(0, 1e9),
    u_j=st.floats(0, 1e6),
    g_per_kwh=st.floats(0, 1500),
    total_kg=st.floats(1, 1e5),
    years=st.floats(0.5, 20),
    duration_s=st.floats(0, 1e6),
    units=st.floats(1e-3, 1e6),
)
def test_sci_is_energy_times_intensity_plus_embodied_per_unit(
    energy_j, u_j, g_per_kwh, total_kg, years, duration_s, units
):
    """ISO/IEC 21031: SCI = (E x I + M) per R, with M = TE x time reserved / lifespan."""
    result = of(
        energy_j,
        u_j=u_j,
        intensity=g_per_kwh,
        embodied=(total_kg, years),
        duration_s=duration_s,
        units=units,
    )
    operational = energy_j / 3.6e6 * g_per_kwh
    m = total_kg * 1e3 * duration_s / (years * 365.25 * 86_400)
    assert result.sci_g_per_unit == pytest.approx((operational + m) / units)
    assert result.sci_u_g_per_unit == pytest.approx(u_j / 3.6e6 * g_per_kwh / units)


def test_sci_is_unknown_without_the_hardwares_share_or_work():
    assert of(1.0, duration_s=1, units=3).sci_g_per_unit is None
    assert of(1.0, embodied=(1, 1), duration_s=1, units=0).sci_g_per_unit is None


@pytest.fixture
def hours(tmp_path):
    path = tmp_path / "grid.csv"
    path.write_text(
        "time,gCO2e/kWh\n2026-11-21T07:00Z,300\n2026-11-21T08:00:00+00:00,200\n"
        "2026-11-21T10:00+01:00,100\n\n2026-11-21T12:00Z,50\n"
    )
    return path


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        ("2026-11-21T07:00:00.000Z", 300),
        ("2026-11-21T07:59:59.999Z", 300),
        ("2026-11-21T08:00:00.000Z", 200),
        ("2026-11-21T09:59:59.999Z", 100),
        ("2026-11-21T12:30:00.000Z", 50),
    ],
)
def test_a_series_gives_the_hours_value(hours, at, expected):
    made = carbon.Footprint(intensity.read_series(hours, "de"))
    result = made.of(3.6e6, started_at=at)
    assert (result.g, result.region, result.year) == (expected, "de", 2026)
    assert result.source == "grid.csv"


@pytest.mark.parametrize(
    ("at", "why"),
    [
        ("2026-11-21T06:59:59Z", "it covers 2026-11-21T07:00Z to 2026-11-21T13:00Z"),
        ("2026-11-21T10:00:00Z", "a gap from 2026-11-21T10:00Z to 2026-11-21T12:00Z"),
        ("2026-11-21T13:00:00Z", "it covers 2026-11-21T07:00Z to 2026-11-21T13:00Z"),
    ],
)
def test_a_series_says_where_it_has_no_value(hours, at, why):
    made = carbon.Footprint(intensity.read_series(hours))
    with pytest.raises(RequestError, match=f"grid.csv has no carbon intensity for.*{why}"):
        made.at(at)
    late = made.of(3.6e6, started_at=at)
    assert (late.g, late.intensity_g_per_kwh, late.year) == (None, None, None)
    assert why in late.reason
    json.dumps(late.to_json(), allow_nan=False)


def test_a_series_must_have_a_value_for_now(hours, monkeypatch):
    monkeypatch.setattr(clock, "utc_now", lambda: "2026-11-21T08:10:00.000Z")
    assert carbon.footprint(intensity=str(hours)).at(clock.utc_now()).intensity_g_per_kwh == 200
    monkeypatch.setattr(clock, "utc_now", lambda: "2027-01-01T00:00:00.000Z")
    with pytest.raises(RequestError, match="no carbon intensity for 2027-01-01T00:00Z"):
        carbon.footprint(intensity=hours)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "holds no carbon intensity"),
        ("time,g\n", "holds no carbon intensity"),
        ("2026-11-21T07:00,300\n", "line 1: 2026-11-21T07:00 has no time zone; write UTC"),
        ("2026-11-21T07:00Z\n", "line 1: .* is not a time and gCO2e/kWh"),
        ("time,g\n2026-11-21T07:00Z,much\n", "line 2: .* is not a time and gCO2e/kWh"),
        ("21 Nov,1\n2026-11-21T07:00Z,1\n", "line 1: .* is not a time"),
        ("2026-11-21T07:00Z,-3\n", "line 1: .* is not a time and gCO2e/kWh of 0 to 1000000"),
        ("2026-11-21T07:00Z,1\n21 Nov,1\n", "line 2: .* is not a time"),
        ("2026-11-21T07:00Z,1\n2026-11-21T07:00Z,1\n", "line 2: .* does not come after"),
    ],
)
def test_a_bad_series_is_refused_with_its_line(tmp_path, text, why):
    path = tmp_path / "grid.csv"
    path.write_text(text)
    with pytest.raises(RequestError, match=why):
        intensity.read_series(path)


def test_a_missing_or_binary_series_is_refused(tmp_path):
    with pytest.raises(RequestError, match="none.csv: No such file.*one number, or a CSV file"):
        carbon.footprint(intensity=tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RequestError, match="is not a CSV file in UTF-8"):
        intensity.read_series(tmp_path / "b.csv")


def test_brains():
    assert carbon.brains(500 / 24) == pytest.approx(1), "0.5 kWh a day is 500 Wh in 24 h"
    assert carbon.brains(170_000 / 24) == pytest.approx(340), "16 GPUs, about 170 kWh a day"


def test_carbon_options_are_checked_before_a_model_is_fetched(capsys, tmp_path):
    for option, why in (
        ("--region=atlantis", "region 'atlantis' is not in the carbon table"),
        ("--intensity=-4", "carbon intensity is -4"),
        (f"--intensity={tmp_path}/none.csv", "cannot read the carbon intensity file"),
        ("--embodied=250,0", "embodied lifetime is 0.0"),
    ):
        assert main(["generate", "smollm2-135m:int4", "--prompt", "x", option]) == 2
        assert why in capsys.readouterr().err


def test_the_command_explains_a_malformed_embodied_share(capsys):
    for text in ("250", "a,b", "1,2,3"):
        with pytest.raises(SystemExit) as left:
            main(["generate", "smollm2-135m", "--embodied", text])
        assert left.value.code == 2
        assert "is not KG,YEARS" in capsys.readouterr().err


def test_receipts_of_a_series_and_hardware_are_plain_json(hours):
    made = carbon.Footprint(
        intensity.read_series(hours), Embodied(total_kg=1, lifetime_years=1, g_per_s=1e-5)
    )
    document = made.of(1.0, 0.1, started_at=MORNING, duration_s=2, units=4).to_json()
    assert document["embodied"]["total_kg"] == 1
    assert document["sci_g_per_unit"] == pytest.approx((1 / 3.6e6 * 200 + 2e-5) / 4)
    assert replace(made, embodied=None).of(1.0, started_at=MORNING).to_json()["embodied"] is None


def test_an_engine_puts_it_into_receipts_and_tells_its_hooks(tmp_path):
    engine = Engine(
        Session(BUILDERS["language"](tmp_path / "bundle"), threads=1),
        footprint=carbon.footprint("pl", embodied=(250, 4)),
    )
    heard = []
    engine.on_receipt.append(heard.append)
    receipt = engine.generate(**OPTIONS["language"]).receipt
    assert heard == [receipt]
    document = receipt.to_json()["carbon"]
    assert document["region"] == "pl"
    assert document["embodied_g"] == pytest.approx(receipt.duration_ns / 1e9 * 250e3 / 126_230_400)
    assert document["sci_g_per_unit"] * receipt.units.count == pytest.approx(
        document["g"] + document["embodied_g"]
    )
    assert document["u_g"] == pytest.approx(
        document["g"] * receipt.energy.u_j / receipt.energy.gross_j
    )
