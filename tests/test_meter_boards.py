"""Laws over every sensor on every board, and what each board's total is."""

from __future__ import annotations

import json

import boards_at
import pytest

from leangen import cli, clock, energy, meters
from leangen.errors import RequestError
from leangen.meters import Meter, MeterFault, Unavailable, listing, perf_event


@pytest.mark.parametrize("board", boards_at.NAMES)
@pytest.mark.parametrize("sensor", meters.SENSORS)
def test_open_waits_for_nothing_and_answers_with_meters_and_reasons(sensor, board, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(clock, "sleep", lambda seconds: pytest.fail(f"slept {seconds} s"))
        entries = meters.open_sensor(sensor, boards_at.BOARDS / board)
    assert entries
    for entry in entries:
        if isinstance(entry, Unavailable):
            assert entry.sensor.startswith(sensor)
            assert entry.reason
            continue
        assert isinstance(entry, Meter)
        assert entry.name.startswith(f"{sensor}:")
        assert entry.source in ("measured", "integrated", "estimated")
        assert (entry.sampler is not None) == (entry.source == "integrated")
        assert 0 < entry.u_systematic < 1
        assert entry.tick.seconds > 0
        assert entry.tick.how
        before = clock.monotonic_ns()
        readings = [entry.read() for _ in range(2)]
        after = clock.monotonic_ns()
        for reading in readings:
            assert isinstance(reading.count, int)
            assert reading.count >= 0
            assert reading.unit == entry.unit
        assert before <= readings[0].t_ns <= readings[1].t_ns <= after


@pytest.mark.parametrize("sensor", meters.SENSORS)
def test_names_of_a_sensor_are_its_own(sensor):
    for board in boards_at.NAMES:
        entries = meters.open_sensor(sensor, boards_at.BOARDS / board)
        names = [entry.name for entry in entries if isinstance(entry, Meter)]
        assert len(set(names)) == len(names)


TOTALS = {
    "laptop": ["rapl:package-0", "rapl:dram-0"],
    "server": ["rapl:package-0", "rapl:dram-0", "rapl:package-1", "rapl:dram-1"],
    "jetson-orin": ["ina3221:VDD_IN"],
    "pi5": ["pmic:rails"],
    "amd-desktop": ["rapl:package-0"],
    "none": ["estimate:cpu-time"],
    "denied": ["estimate:cpu-time"],
}


def test_every_board_has_a_readme_that_cites_its_source():
    assert set(TOTALS) == set(boards_at.NAMES)
    for board in boards_at.NAMES:
        assert "https://" in (boards_at.BOARDS / board / "README.md").read_text()


@pytest.mark.parametrize("board", TOTALS)
def test_the_total_of_a_board(board):
    selection = meters.select(boards_at.BOARDS / board)
    assert [meter.name for meter in selection.meters] == TOTALS[board]
    assert len({meter.source for meter in selection.meters}) == 1


@pytest.mark.parametrize("board", TOTALS)
def test_meters_prints_what_is_there(board, capsys):
    assert cli.main(["meters", "--root", str(boards_at.BOARDS / board)]) == 0
    printed = capsys.readouterr().out
    for name in TOTALS[board]:
        assert f"  {name}" in printed.partition("available:")[0]
    assert cli.main(["meters", "--root", str(boards_at.BOARDS / board), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["sensor"] for row in rows if row["status"] == "in total"] == TOTALS[board]
    for row in rows:
        if row["status"] in ("in total", "available"):
            assert row["tick_s"] > 0
            assert row["covers"] or row["scope"]
        else:
            assert row["reason"]


def test_meters_of_a_root_that_is_not_there(capsys):
    assert cli.main(["meters", "--root", "/no/such/tree"]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_the_denied_board_names_a_remedy_for_each_sensor():
    root = boards_at.BOARDS / "denied"
    reason = meters.select(root).reason
    by_name = {row["sensor"]: row for row in meters.describe(root)}
    assert by_name["estimate:cpu-time"]["status"] == "in total"
    assert reason.startswith("estimated, not measured")
    assert "rapl:package-0: energy_uj: Permission denied" in reason
    for name in ("rapl:package-0", "rapl:dram-0", "rapl:psys"):
        assert by_name[name]["status"] == "unavailable"
        assert "CVE-2020-8694" in by_name[name]["remedy"]
    assert "chmod a+r /sys/class/power_supply/BAT0/power_now" in by_name["battery:BAT0"]["remedy"]


def test_a_refused_perf_event_names_a_remedy():
    def refuse(attr: object, cpu: int) -> int:
        raise PermissionError(13, "Permission denied")

    entries = perf_event.open(boards_at.BOARDS / "denied", opener=refuse)
    opened = next(entry for entry in entries if entry.sensor == "perf_event:package-0")
    assert "Permission denied; perf_event_paranoid is 4" in opened.reason
    assert "kernel.perf_event_paranoid=0" in opened.remedy
    assert "cap_perfmon" in opened.remedy


def test_equal_refusals_are_printed_once():
    rows = meters.describe(boards_at.BOARDS / "server")
    printed = "\n".join(listing.lines(rows))
    assert printed.count("cap_perfmon") == 1
    assert "perf_event:package-0, perf_event:package-1, perf_event:dram-0" in printed


@pytest.mark.parametrize("name", ["psys", "core-0", "uncore-0"])
def test_wider_and_inner_domains_are_shown_and_stay_out(name):
    rows = {row["sensor"]: row for row in meters.describe(boards_at.BOARDS / "laptop")}
    assert rows[f"rapl:{name}"]["status"] == "available"
    assert rows[f"rapl:{name}"]["reason"]


def test_a_battery_is_the_total_when_there_is_nothing_better(tmp_path):
    root = boards_at.copy("laptop", tmp_path)
    (root / "sys/class/powercap").rename(root / "gone")
    selection = meters.select(root)
    assert [meter.name for meter in selection.meters] == ["battery:BAT0"]
    assert selection.reason.startswith("sampled, not counted: battery:BAT0: the whole machine")


def test_a_model_on_a_radeon_has_the_card_alone_as_its_total():
    # RAPL counts and the card is sampled: figures of two sources are not added.
    selection = meters.select(boards_at.BOARDS / "amd-desktop", device="rocm")
    assert selection.scope == ("gpu-0",)
    assert "rapl:package-0: it is measured" in selection.reason


def test_an_apu_stands_in_for_a_package_that_cannot_be_read(tmp_path):
    root = boards_at.copy("amd-desktop", tmp_path)
    (root / "sys/class/powercap").rename(root / "gone")
    assert meters.select(root).scope == ("socket-1",)


def test_the_meter_that_was_asked_for_is_the_total():
    selection = meters.select(boards_at.BOARDS / "laptop", meter="battery:BAT0")
    assert selection.scope == ("BAT0",)
    assert selection.reason == "--meter battery:BAT0"
    psys = meters.select(boards_at.BOARDS / "laptop", meter="rapl:psys")
    assert psys.scope == ("psys",)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wall", "expected exec:COMMAND, file:PATH or a name"),
        ("rapl:package-7", "no such meter; rapl has rapl:package-0"),
        ("pmic:rails", "this is not a Raspberry Pi 5"),
    ],
)
def test_a_meter_that_is_not_there_is_refused(spec, message):
    with pytest.raises(RequestError, match=message):
        meters.select(boards_at.BOARDS / "laptop", meter=spec)


@pytest.mark.parametrize("board", ["jetson-orin", "pi5", "laptop"])
def test_a_window_over_sampled_power_is_the_power_times_the_time(board, tmp_path):
    root = boards_at.copy(board, tmp_path)
    spec = {"laptop": "battery:BAT0"}.get(board)
    power_w = {"jetson-orin": 5.040 * 1.064, "laptop": 22.543}.get(board)
    if power_w is None:
        text = (root / "usr/bin/vcgencmd.pmic_read_adc").read_text().split()
        values = dict(zip(text[::2], (w.split("=")[1][:-1] for w in text[1::2]), strict=True))
        power_w = sum(
            float(values[name]) * float(values[name[:-1] + "V"])
            for name in values
            if name.endswith("_A")
        )
    selection = meters.select(root, meter=spec)
    window = meters.begin(selection)
    clock.sleep(0.15)
    [closed] = meters.end(window)
    [track] = window.tracks
    assert closed.source == "integrated"
    assert closed.energy_uj / 1e6 == pytest.approx(power_w * track.elapsed_s, rel=1e-4)
    assert 0 < closed.coverage <= 1  # less where the machine is busy
    account = energy.account(
        [closed],
        scope=selection.scope,
        reason=selection.reason,
        duration_ns=150_000_000,
        baseline=None,
        units=1,
    )
    assert account.source == "integrated"


def test_a_sampled_board_has_a_measured_baseline():
    selection = meters.select(boards_at.BOARDS / "jetson-orin")
    baseline = meters.measure_baseline(selection, 0.3)
    assert baseline.power_w == pytest.approx(5.040 * 1.064, rel=1e-3)


@pytest.mark.parametrize("sensor", meters.SENSORS)
def test_a_sensor_that_breaks_raises_a_fault_and_never_a_number(sensor, tmp_path):
    if sensor == "estimate":
        pytest.skip("it reads clocks only")
    for board in boards_at.NAMES:
        root = boards_at.copy(board, tmp_path)
        found = [m for m in meters.open_sensor(sensor, root) if isinstance(m, Meter)]
        entries = list(root.rglob("*"))
        files = [path for path in entries if path.is_file() and not path.is_symlink()]
        for fault in ("garbage", "vanished"):
            for file in files:
                file.write_text("not a number\n") if fault == "garbage" else file.unlink()
            for meter in found:
                with pytest.raises(MeterFault) as caught:
                    meter.read()
                assert caught.value.fault in energy.FAULTS
