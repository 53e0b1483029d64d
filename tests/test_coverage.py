"""The coverage table, on cells that are quick: the truth lies within value ± u."""

from __future__ import annotations

import sys
from dataclasses import replace

import bench_scripts
import pytest

from leangen.meters import Meter, Tick
from leangen.records import Reading

pw = bench_scripts.load("power_world")
coverage = bench_scripts.load("coverage")


@pytest.mark.parametrize("length", [2, 10, 40])
@pytest.mark.parametrize("law", sorted(pw.DESIGN | pw.HELD_OUT))
@pytest.mark.parametrize("sensor", ["rapl-intel", "fine"])
def test_the_truth_lies_within_u(sensor, law, length):
    row = coverage.measure((sensor, law, length), 600)
    assert row["pass"], row


@pytest.mark.parametrize("law", sorted(pw.DESIGN | pw.HELD_OUT))
def test_a_part_time_gpu(law):
    row = coverage.measure(("nvml-a100", law, 20), 600)
    assert row["pass"], row


@pytest.mark.parametrize("law", ["constant", "idle-active-idle", "wandering"])
def test_windows_that_begin_on_a_tick_hold_the_truth_in_less_width(law, monkeypatch):
    # A look of 0.1 ms, 1/500 of the tick: ten times fewer of them until a tick comes.
    monkeypatch.setitem(pw.SENSORS, "fine", replace(pw.SENSORS["fine"], read_s=1e-4))
    free = coverage.measure(("fine", law, 10), 400)
    aligned = coverage.measure(("fine", law, 10), 400, aligned=True)
    assert aligned["coverage"] >= coverage.LEAST_COVERAGE
    assert aligned["u_relative"] < 0.7 * free["u_relative"]


def _understated(world, stack):
    """A meter that claims to tick every microsecond."""
    held = [1]
    world.show = lambda count: held.__setitem__(0, count)
    return Meter(
        name="world:liar",
        source="estimated",  # so that probing does not find it out
        scope="world",
        in_total=True,
        unit="mJ",
        tick=Tick(1e-6, "a lie"),
        u_systematic=0.01,
        max_power_w=1000.0,
        wraps_at=None,
        coverage=1.0,
        read=lambda: Reading(held[0], "mJ", 0),
    )


def test_the_table_fails_a_sensor_that_understates(monkeypatch, capsys):
    real = pw.probed

    def lying(world, sensor, stack, rng):
        return (
            world.attach(sensor.open(world, stack))
            if sensor is liar
            else real(world, sensor, stack, rng)
        )

    liar = pw.Sensor(_understated, 0.05, 5.0)
    monkeypatch.setitem(pw.SENSORS, "liar", liar)
    monkeypatch.setattr(pw, "probed", lying)
    row = coverage.measure(("liar", "constant", 10), 200)
    assert not row["pass"]
    command = ["coverage.py", "--sensor", "liar", "--law", "constant", "--ticks", "10"]
    monkeypatch.setattr(sys, "argv", [*command, "--windows", "100"])
    assert coverage.main() == 1
    assert "FAILED" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [c.replace("liar", "fine") for c in command])
    assert coverage.main() == 0
