"""Probing, planning, alignment, looks: what a window knows of its sensor and what it costs."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from dataclasses import replace

import bench_scripts
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leangen import meters
from leangen.meters.meter import Selection, Tick
from leangen.meters.probing import counter_against_power
from leangen.meters.uncertainty import combine, spread_w, terms
from leangen.meters.window import wait_for_tick
from leangen.records import Reading

pw = bench_scripts.load("power_world")


def steady(power_w=20.0, tick_s=0.001, read_s=10e-6, unit="uJ", **changes):
    """A meter of constant power and its world."""
    world = pw.World()
    reads = []

    def read():
        world.now_s += read_s
        reads.append(world.now_s)
        ticks = world.now_s // tick_s
        return Reading(
            int(ticks * tick_s * power_w * {"uJ": 1e6, "mJ": 1e3}[unit]),
            unit,
            world.monotonic_ns(),
        )

    meter = meters.Meter(
        name="sim:0",
        source="measured",
        scope="sim",
        in_total=True,
        unit=unit,
        tick=Tick(tick_s, "given"),
        u_systematic=0.05,
        max_power_w=1000.0,
        wraps_at=None,
        coverage=1.0,
        read=read,
    )
    world.reads = reads
    return world, replace(meter, **changes)


@pytest.mark.parametrize("jitter", [0.0, 0.1])
def test_probing_finds_tick_and_jitter(jitter):
    sensor = replace(pw.SENSORS["fine"], jitter=jitter)
    found = []
    for seed in range(20):
        with ExitStack() as stack:
            meter = pw.probed(pw.World(), sensor, stack, np.random.default_rng(seed))
        assert meter.tick.seconds == pytest.approx(0.05, rel=0.05)
        assert meter.tick.how.startswith("probed")
        found.append(meter.tick.jitter_s)
    assert np.mean(found) == pytest.approx(jitter * 0.05, rel=0.15, abs=0.01 * 0.05)


def test_a_sensor_is_probed_once_per_boot(tmp_path):
    world, meter = steady()
    tick = Tick(0.0012, "probed", 1e-5)
    cache = tmp_path / "probes.json"
    cache.write_text(
        json.dumps(
            {
                "boot_id": "a",
                "ticks": {"sim:0": {"seconds": 0.0012, "how": "probed", "jitter_s": 1e-5}},
            }
        )
    )
    selection = Selection(meters=(meter,), reason=None)
    [kept] = meters.probed(selection, boot_id="a", cache=cache).meters
    assert (kept.tick, world.reads) == (tick, [])  # a warm start reads no counter
    meters.probed(selection, boot_id="b", cache=cache)
    assert world.reads
    assert json.loads(cache.read_text())["boot_id"] == "b"
    world.reads.clear()
    meters.probed(selection, boot_id="b", cache=cache)
    assert world.reads == []


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"boot_id": "a"}', '{"boot_id": "a", "ticks": {"sim:0": {"seconds": -1}}}'],
)
def test_a_damaged_cache_is_written_anew(tmp_path, text):
    cache = tmp_path / "probes.json"
    cache.write_text(text)
    _, meter = steady()
    [probed] = meters.probed(
        Selection(meters=(meter,), reason=None), boot_id="a", cache=cache
    ).meters
    assert probed.tick.seconds > 0
    assert list(json.loads(cache.read_text())["ticks"]) == ["sim:0"]


def test_a_store_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    _, meter = steady()
    selection = Selection(meters=(meter,), reason=None)
    assert meters.probed(selection, boot_id="a", cache=tmp_path / "file" / "probes.json").meters
    assert meters.probed(selection, boot_id="a", cache=None).meters


def test_a_model_is_not_probed(tmp_path):
    world, meter = steady(source="estimated")
    cache = tmp_path / "probes.json"
    assert meters.probed(
        Selection(meters=(meter,), reason=None), boot_id="a", cache=cache
    ).meters == (meter,)
    assert (world.reads, cache.exists()) == ([], False)


def test_counter_against_power_shows_a_counter_that_is_off():
    world, meter = steady(power_w=20.0)
    ratio = counter_against_power(meter, lambda: 16.0, 2.0, clock=world)
    assert ratio == pytest.approx(1.25, rel=0.01)
    with pytest.raises(ValueError, match="integrates to"):
        counter_against_power(meter, lambda: 0.0, 0.1, clock=world)


def test_probing_holds_a_counter_against_power_where_there_is_both():
    world, meter = steady(power_w=20.0, tick_s=0.1, read_s=1e-3)
    assert "power" not in meters.probe(meter, clock=world).tick.how
    both = meters.probe(replace(meter, read_power_w=lambda: 40.0), clock=world)
    assert re.search(r"; 0\.[45]\d of integrated power over 0.6 s", both.tick.how)
    none = meters.probe(replace(meter, read_power_w=lambda: 0.0), clock=world)
    assert "not held against power" in none.tick.how
    assert none.tick.seconds == pytest.approx(0.1, rel=0.02)


def test_the_terms_are_listed_and_are_what_the_uncertainty_is_made_of():
    world, meter = steady(unit="mJ", tick=Tick(0.001, "given", 1e-5, 2e-5))
    window = meters.begin(Selection(meters=(meter,), reason=None), clock=world)
    world.now_s += 0.5
    [closed] = meters.end(window)
    parts = closed.to_json()["terms"]
    assert set(parts) == {"edges", "lag", "jitter", "resolution", "coverage", "class"}
    assert combine(parts) == (closed.u_random_j, closed.u_systematic_j)
    assert parts["edges"] == pytest.approx(20.0 * 0.001, rel=0.01)
    assert parts["lag"] == pytest.approx(20.0 * 2e-5, rel=0.01)
    assert parts["resolution"] == pytest.approx(0.82e-3)
    assert parts["class"] == pytest.approx(0.05 * 10.0, rel=0.01)


def test_a_steady_load_has_no_spread_and_bursts_have_theirs():
    assert spread_w([(0.0025, 0.05), (0.0025, 0.05), (0.0025, 0.04)], 0.001) == 0
    assert spread_w([(0.01, 0.01), (0.01, 0.5)] * 10, 0.001) == pytest.approx(24.5, rel=0.05)
    assert spread_w([(0.01, 0.01)], 0.001) == 0


def test_a_part_time_sensor_is_less_sure_of_bursts():
    _, whole = steady()
    part = replace(whole, coverage=0.25)
    bursts = [(0.01, 0.01), (0.01, 0.5)] * 10
    assert terms(whole, bursts, read_s=0)["coverage"] == 0
    assert terms(part, bursts, read_s=0)["coverage"] > 0.1
    assert terms(part, [(0.01, 0.2)] * 20, read_s=0)["coverage"] == 0


@given(
    duration_s=st.floats(1e-4, 100),
    tick_s=st.floats(1e-4, 1),
    wanted=st.floats(0.001, 0.5),
)
def test_the_plan_keeps_what_it_promises_and_no_fewer_would(duration_s, tick_s, wanted):
    def edges(repeats):
        return meters.edges_relative_u(repeats * duration_s, tick_s)

    repeats = meters.plan_repeats(duration_s, tick_s, wanted)
    assert edges(repeats) <= wanted * (1 + 1e-6)
    assert repeats == 1 or edges(repeats - 1) > wanted * (1 - 1e-6)


@pytest.mark.parametrize("bad", [(0, 0.1, 0.05), (1, 0.1, 0), (1, -1, 0.05)])
def test_a_plan_for_nothing_is_refused(bad):
    with pytest.raises(ValueError, match="expected positive"):
        meters.plan_repeats(*bad)


def test_a_planned_window_in_the_world_is_as_good_as_planned():
    rng = np.random.default_rng(0)
    errors, widths = [], []
    repeats = meters.plan_repeats(0.030, 0.1, 0.05)
    for _ in range(300):
        world, meter = steady(tick_s=0.1, read_s=1e-4, u_systematic=0.0)
        world.now_s = 50 + rng.uniform(0, 0.1)
        window = meters.begin(Selection(meters=(meter,), reason=None), aligned=True, clock=world)
        start_s = world.now_s
        for _ in range(repeats):
            world.now_s += 0.030 * rng.uniform(0.98, 1.02)
            meters.keep_up(window)
        truth_j = 20.0 * (world.now_s - start_s)
        [closed] = meters.end(window)
        widths.append(closed.u_random_j / truth_j)
        errors.append(abs(closed.energy_uj / 1e6 - truth_j) / closed.u_random_j)
    assert np.mean(widths) <= 1.1 * 0.05
    assert np.mean(np.array(errors) <= 1) >= 0.935
    assert np.percentile(errors, 95) >= 0.5


def test_waiting_for_a_tick_ends():
    world, meter = steady(tick_s=0.1)
    world.now_s = 5.03
    assert wait_for_tick(meter, world)
    assert world.now_s == pytest.approx(5.1, abs=1e-3)
    world, frozen = steady(power_w=0.0, tick_s=0.1)
    world.now_s = 5.0
    assert not wait_for_tick(frozen, world)
    assert world.now_s <= 5.0 + 0.21
    world, slow = steady(power_w=0.0, tick_s=30.0)
    assert not wait_for_tick(slow, world)
    assert world.now_s <= 0.51


@pytest.mark.parametrize("read_s", [5e-6, 50e-6, 1e-3])
@pytest.mark.parametrize("duration_s", [0.05, 1.0, 20.0])
def test_looks_cost_less_than_one_percent(read_s, duration_s):
    """Steps of 1 ms: the time in reads, edges included, stays under 1% where two reads do."""
    world, meter = steady(read_s=read_s)
    window = meters.begin(Selection(meters=(meter,), reason=None), clock=world)
    start_s = world.now_s
    while world.now_s < start_s + duration_s:
        world.now_s += 0.001
        meters.keep_up(window)
    meters.end(window)
    inner = len(world.reads) - 2
    assert inner * read_s <= 0.0051 * duration_s
    assert inner <= 32 * (2 + np.log(duration_s / 0.001))


def test_between_looks_keeping_up_reads_one_clock_and_no_counter():
    world, meter = steady()
    window = meters.begin(Selection(meters=(meter,), reason=None), clock=world)
    asked = []
    tell = world.monotonic_ns
    world.monotonic_ns = lambda: asked.append(1) or tell()
    reads = len(world.reads)
    assert not any(meters.keep_up(window) for _ in range(100))
    assert (len(asked), len(world.reads)) == (100, reads)


@given(
    seed=st.integers(0, 10**6),
    law=st.sampled_from(sorted(pw.DESIGN | pw.HELD_OUT)),
    cut=st.floats(0.2, 0.8),
)
@settings(max_examples=60)
def test_a_window_split_in_two_adds_up_within_u(seed, law, cut):
    """Back to back, the counts add up exactly; the parts hold the whole within their own u."""
    rng = np.random.default_rng(seed)
    sensor = replace(pw.SENSORS["fine"], jitter=0.0)
    knots, power = (pw.DESIGN | pw.HELD_OUT)[law](rng, 40.0)
    energy_j = np.concatenate([[0.0], np.cumsum(power * np.diff(knots))]) * sensor.tick_s * 5.0
    world = pw.World()
    with ExitStack() as stack:
        meter = world.attach(sensor.open(world, stack))
        world.count = lambda now_s: int(
            1e3 * np.interp(now_s // sensor.tick_s, knots, energy_j) + 10**6
        )
        selection = Selection(meters=(meter,), reason=None)
        whole, first = meters.begin(selection, clock=world), meters.begin(selection, clock=world)
        middle_s, end_s = 40 * cut * sensor.tick_s, 40 * sensor.tick_s
        while world.now_s < middle_s:
            world.now_s += 2.7 * sensor.tick_s
            meters.keep_up(whole)
            meters.keep_up(first)
        [one] = meters.end(first)
        second = meters.begin(selection, clock=world)
        while world.now_s < end_s:
            world.now_s += 2.7 * sensor.tick_s
            meters.keep_up(whole)
            meters.keep_up(second)
        [two] = meters.end(second)
        [both] = meters.end(whole)
    assert one.energy_uj + two.energy_uj == both.energy_uj
    middle = np.interp([0.0, middle_s, end_s], knots * sensor.tick_s, energy_j)
    assert middle[2] - middle[0] == pytest.approx(
        both.energy_uj / 1e6, abs=both.u_random_j + one.u_random_j + two.u_random_j + 5 * 0.15
    )
