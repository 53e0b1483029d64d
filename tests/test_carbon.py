"""The carbon table and what is made of it."""

from __future__ import annotations

import pytest

from leangen import carbon
from leangen.errors import RequestError


def test_every_row_has_its_year_and_source():
    grids = carbon.grids()
    assert len(grids) >= 24
    for region, grid in grids.items():
        assert grid.region == region == region.lower()
        assert 0 < grid.intensity_g_per_kwh < 1500
        assert 2020 <= grid.year <= 2100
        assert grid.source and grid.name


def test_a_kilowatt_hour_costs_the_grids_intensity(monkeypatch):
    monkeypatch.delenv("LEANGEN_REGION", raising=False)
    world = carbon.carbon_for(3.6e6)
    assert (world.g, world.region, world.year, world.source) == (
        473,
        "world",
        2024,
        "Ember via OWID",
    )
    assert carbon.carbon_for(1.8e6, "SE").g == pytest.approx(18)
    assert carbon.carbon_for(3.6e6, "Germany").region == "de"


def test_region_from_the_environment_and_an_argument_before_it(monkeypatch):
    monkeypatch.setenv("LEANGEN_REGION", "fr")
    assert carbon.carbon_for(3.6e6).region == "fr"
    assert carbon.carbon_for(3.6e6, "pl").region == "pl"


def test_own_intensity_goes_first():
    own = carbon.carbon_for(3.6e6, "de", intensity=20)
    assert (own.g, own.region, own.source) == (20, "de", "given by the user")


def test_unknown_energy_has_unknown_emissions():
    assert carbon.carbon_for(None, "fr").g is None


def test_bad_region_and_intensity_are_refused():
    with pytest.raises(
        RequestError, match="region 'atlantis' is not in the carbon table.*world, eu"
    ):
        carbon.carbon_for(1.0, "atlantis")
    for intensity in (-1.0, float("nan"), float("inf")):
        with pytest.raises(RequestError, match="expected gCO2e/kWh of 0 or more"):
            carbon.carbon_for(1.0, intensity=intensity)
