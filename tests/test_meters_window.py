"""Windows against a power world whose truth is known, and every fault that must not be a number."""

from __future__ import annotations

import math
import random
import statistics

import fake_powercap
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leangen import clock, meters
from leangen.energy import FAULTS
from leangen.meters import Meter, MeterFault, Selection, Tick, estimate
from leangen.meters.window import gained
from leangen.records import Reading


class World:
    """A machine of known power P(t) with one counter on it, on a clock that the test moves."""

    def __init__(
        self, energy_j, tick_s=0.001, phase_s=0.0, unit="uJ", wraps_at=None, max_power_w=1000.0
    ):
        self.now_s = 0.0
        self.energy_j = energy_j  # cumulative energy by time
        self.fault = None
        self.offset = 0
        self.meter = Meter(
            name="sim:0",
            source="measured",
            scope="sim-0",
            in_total=True,
            unit=unit,
            tick=Tick(tick_s, "given"),
            u_systematic=0.05,
            max_power_w=max_power_w,
            wraps_at=wraps_at,
            coverage=1.0,
            read=self.read,
        )
        self.tick_s, self.phase_s, self.wraps_at = tick_s, phase_s, wraps_at
        self.per_count = {"uJ": 1e6, "mJ": 1e3}[unit]

    def read(self):
        if self.fault:
            raise MeterFault(self.fault)
        ticks = math.floor((self.now_s - self.phase_s) / self.tick_s)
        seen_s = ticks * self.tick_s + self.phase_s
        count = int(self.energy_j(seen_s) * self.per_count) + self.offset
        if self.wraps_at:
            count %= self.wraps_at
        return Reading(count, self.meter.unit, int(self.now_s * 1e9))

    def window(self, begin_s, end_s):
        self.now_s = begin_s
        window = meters.begin(Selection(meters=(self.meter,), reason=None))
        self.now_s = end_s
        [closed] = meters.end(window)
        return closed


def steady(power_w):
    return lambda t: power_w * t


def from_idle(idle_w, active_w, start_s):
    """Idle until `start_s`, active from then on."""
    return lambda t: idle_w * t + (active_w - idle_w) * max(0.0, t - start_s)


@pytest.mark.parametrize("ticks", [3, 10, 100])
@pytest.mark.parametrize("law", ["steady", "from idle", "from nothing"])
def test_truth_lies_within_the_random_part(ticks, law):
    rng = random.Random(ticks)
    inside, u_j, windows = 0, [], 400
    errors_j = []
    for _ in range(windows):
        begin_s = 1.0
        duration_s = ticks * 0.001 * rng.uniform(0.95, 1.05)
        energy_j = {
            "steady": steady(20.0),
            "from idle": from_idle(4.0, 20.0, begin_s),
            "from nothing": from_idle(0.0, 20.0, begin_s),
        }[law]
        closed = World(energy_j, phase_s=rng.uniform(0, 0.001)).window(
            begin_s, begin_s + duration_s
        )
        error_j = closed.energy_uj / 1e6 - 20.0 * duration_s
        errors_j.append(abs(error_j))
        u_j.append(closed.u_random_j)
        inside += abs(error_j) <= closed.u_random_j
    assert inside >= 0.935 * windows
    # An interval so wide that it says nothing would pass as well. (The median: how long a reading
    # takes is measured, and this process may be stopped in the middle of one.)
    assert statistics.median(u_j) <= 3.0 * sorted(errors_j)[int(0.95 * windows)]


def test_class_uncertainty_is_systematic_and_proportional():
    closed = World(steady(20.0)).window(1.0, 3.0)
    assert closed.energy_uj == pytest.approx(40e6, rel=1e-3)
    assert closed.u_systematic_j == pytest.approx(0.05 * closed.energy_uj / 1e6)
    assert closed.tick_s == 0.001
    assert closed.faults == ()


def test_a_coarse_counter_widens_by_its_resolution():
    closed = World(steady(0.5), tick_s=1e-6, unit="mJ").window(1.0, 1.01)
    assert abs(closed.energy_uj / 1e6 - 0.005) <= 0.001
    assert closed.u_random_j >= 0.0008


@given(
    power_w=st.floats(0.5, 300),
    cuts=st.lists(st.floats(0.05, 5), min_size=2, max_size=6),
    phase=st.floats(0, 1),
)
@settings(max_examples=60)
def test_windows_end_to_end_add_up_to_the_whole(power_w, cuts, phase):
    edges = [1.0]
    for cut in cuts:
        edges.append(edges[-1] + cut)
    world = World(steady(power_w), phase_s=phase * 0.001)
    parts = [world.window(left, right) for left, right in zip(edges[:-1], edges[1:], strict=True)]
    whole = world.window(edges[0], edges[-1])
    assert sum(part.energy_uj for part in parts) == whole.energy_uj


def test_a_wrap_is_undone():
    world = World(steady(20.0), wraps_at=15_000_000, max_power_w=25.0)
    world.offset = 4_000_000
    assert world.window(0.2, 0.6).energy_uj == pytest.approx(8e6, rel=0.01)  # 8 J up to 16 J


def test_a_reset_is_not_taken_for_a_wrap():
    world = World(steady(20.0), wraps_at=fake_powercap.RANGE_UJ)
    world.offset = 100_000_000_000
    world.now_s = 1.0
    window = meters.begin(Selection(meters=(world.meter,), reason=None))
    world.offset = 0
    world.now_s = 2.0
    [closed] = meters.end(window)
    assert closed.energy_uj is None
    assert closed.faults == ("reset",)


def test_a_slightly_older_value_is_not_taken_for_a_wrap():
    world = World(steady(20.0), wraps_at=fake_powercap.RANGE_UJ)
    meter = world.meter
    with pytest.raises(MeterFault, match="reset"):
        gained(meter, Reading(1_000_050, "uJ", 0), Reading(1_000_000, "uJ", 10**9))


def test_a_counter_that_never_wraps_cannot_fall():
    meter = World(steady(20.0), unit="mJ").meter
    with pytest.raises(MeterFault, match="reset"):
        gained(meter, Reading(5000, "mJ", 0), Reading(10, "mJ", 10**9))


def test_a_rise_that_no_hardware_draws_is_a_fault():
    meter = World(steady(20.0), wraps_at=fake_powercap.RANGE_UJ).meter
    with pytest.raises(MeterFault, match="jump"):
        gained(meter, Reading(0, "uJ", 0), Reading(40_000_000_000, "uJ", 10**9))


def test_an_interval_in_which_it_could_wrap_unseen_is_ambiguous_unless_kept_up_with():
    world = World(steady(400.0), wraps_at=fake_powercap.RANGE_UJ)
    closed = world.window(1.0, 1001.0)  # 400 kJ: more than one turn
    assert (closed.energy_uj, closed.faults) == (None, ("ambiguous",))

    world.now_s = 1.0
    window = meters.begin(Selection(meters=(world.meter,), reason=None))
    for now_s in range(100, 1002, 100):
        world.now_s = float(now_s)
        window.due_ns = 0  # the real clock has hardly moved
        meters.keep_up(window)
    world.now_s = 1001.0
    [closed] = meters.end(window)
    assert closed.energy_uj == pytest.approx(400e9, rel=1e-4)


def test_keeping_up_reads_no_counter_before_it_must():
    world = World(steady(20.0), wraps_at=fake_powercap.RANGE_UJ)
    window = meters.begin(Selection(meters=(world.meter,), reason=None))
    world.fault = "vanished"  # any further look would see this
    meters.keep_up(window)
    world.fault = None
    world.now_s = 2.0
    assert meters.end(window)[0].faults == ()


@pytest.mark.parametrize("fault", ["vanished", "permission", "garbage", "unreadable"])
@pytest.mark.parametrize("when", ["begin", "end"])
def test_a_read_that_fails_leaves_no_number(fault, when):
    world = World(steady(20.0))
    world.fault = fault if when == "begin" else None
    world.now_s = 1.0
    window = meters.begin(Selection(meters=(world.meter,), reason=None))
    world.fault = fault if when == "end" else None
    world.now_s = 2.0
    [closed] = meters.end(window)
    assert (closed.energy_uj, closed.u_random_j, closed.faults) == (None, None, (fault,))
    assert fault in FAULTS


def test_a_counter_that_did_not_move_is_unknown_not_zero():
    world = World(steady(20.0), tick_s=0.1)
    assert world.window(1.01, 1.02).faults == ("ambiguous",)
    frozen = World(lambda t: 7.0)
    closed = frozen.window(1.0, 2.0)
    assert (closed.energy_uj, closed.faults) == (None, ("stuck",))


def test_suspend_is_seen_and_named():
    world = World(steady(20.0))
    window = meters.begin(Selection(meters=(world.meter,), reason=None))
    window.begin_boottime_ns -= 3_000_000_000  # as if boot time had gone on 3 s longer
    world.now_s = 1.0
    [closed] = meters.end(window)
    assert (closed.energy_uj, closed.faults) == (None, ("suspended",))


def test_windows_on_a_tree(tmp_path):
    root = fake_powercap.make(tmp_path, fake_powercap.LAPTOP)
    selection = meters.select(root)
    window = meters.begin(selection)
    fake_powercap.spend(root, "intel-rapl:0", 300_000)
    fake_powercap.spend(root, "intel-rapl:0:2", 40_000)
    fake_powercap.spend(root, "intel-rapl:0:0", 999_999)  # inside the package: must not count
    package, dram = meters.end(window)
    assert (package.sensor, package.energy_uj) == ("rapl:package-0", 300_000)
    assert (dram.sensor, dram.energy_uj) == ("rapl:dram-0", 40_000)
    assert package.source == "measured"


def test_a_file_that_wraps_and_one_that_vanishes(tmp_path):
    zones = {
        "intel-rapl:0": ("package-0", fake_powercap.RANGE_UJ - 100_000),
        "intel-rapl:0:0": ("dram", 50_000),
    }
    root = fake_powercap.make(tmp_path, zones)
    window = meters.begin(meters.select(root))
    fake_powercap.spend(root, "intel-rapl:0", 300_000)
    fake_powercap.counter(root, "intel-rapl:0:0").unlink()
    package, dram = meters.end(window)
    assert package.energy_uj == 300_000
    assert (dram.energy_uj, dram.faults) == (None, ("vanished",))


def test_estimate_window_is_labelled_and_states_sixty_percent(tmp_path):
    selection = meters.select(tmp_path)
    window = meters.begin(selection)
    assert sum(range(100_000))
    [closed] = meters.end(window)
    assert closed.source == "estimated"
    assert closed.energy_uj > 0
    assert closed.u_systematic_j == pytest.approx(0.6 * closed.energy_uj / 1e6)


def test_probe_finds_the_tick():
    world = World(steady(20.0), tick_s=0.002)

    def read():
        world.now_s += 0.0001
        return World.read(world)

    meter = meters.probe(Meter(**{**fields(world.meter), "read": read}))
    assert meter.tick.seconds == pytest.approx(0.002, rel=0.06)
    assert meter.tick.how.startswith("probed")


def test_probe_keeps_the_documented_tick_of_a_counter_that_rests():
    meter = meters.probe(World(lambda t: 7.0).meter)
    assert meter.tick.seconds == 0.001


def fields(meter):
    return {name: getattr(meter, name) for name in Meter.__dataclass_fields__}


def test_baseline_is_the_idle_power_with_its_spread():
    powers_w = iter([10.0, 12.0] * 100)
    state = {"t_s": 0.0, "energy_j": 0.0, "reads": 0}

    def read():
        state["reads"] += 1
        if state["reads"] % 2 == 0:  # the second look of a window: it lasted 10 ms
            state["t_s"] += 0.01
            state["energy_j"] += 0.01 * next(powers_w)
        return Reading(int(state["energy_j"] * 1e6), "uJ", int(state["t_s"] * 1e9))

    world = World(steady(1.0))
    meter = Meter(**{**fields(world.meter), "read": read})
    baseline = meters.measure_baseline(Selection(meters=(meter,), reason=None), 0.1)
    assert baseline.scope == ("sim-0",)
    assert baseline.power_w == pytest.approx(11.0, rel=0.01)
    assert 2.0 <= baseline.u_random_w <= 4.0  # 2 x 1.05 W, for one further window
    assert baseline.u_systematic_w == pytest.approx(0.05 * 11.0, rel=0.01)


def test_an_estimate_survives_being_stopped_between_its_two_clocks(tmp_path, monkeypatch):
    """Other threads then compute on: far more CPU time than the stamps leave room for."""
    [meter] = estimate.open(tmp_path)
    times = {"cpu": [1_000_000_000, 1_400_000_000], "wall": [5_200_000_000, 5_205_000_000]}
    monkeypatch.setattr(clock, "process_cpu_ns", lambda: times["cpu"].pop(0))
    monkeypatch.setattr(clock, "monotonic_ns", lambda: times["wall"].pop(0))
    joules = gained(meter, meter.read(), meter.read()) / 1e6
    assert joules == pytest.approx(0.4 * (estimate.BUSY_W_PER_CPU - 0.74), rel=0.02)


def test_baseline_of_an_estimate_is_the_models_own_and_immediate(tmp_path):
    selection = meters.select(tmp_path)
    baseline = meters.measure_baseline(selection, 3600.0)
    assert baseline == selection.baseline
    assert baseline.power_w > 0
    assert baseline.u_w == pytest.approx(0.6 * baseline.power_w)


def test_baseline_too_short_for_the_tick_is_refused():
    world = World(steady(1.0), tick_s=0.1)
    with pytest.raises(ValueError, match="give at least 2"):
        meters.measure_baseline(Selection(meters=(world.meter,), reason=None), 1.0)


def test_baseline_with_a_fault_is_none():
    world = World(lambda t: 7.0)
    assert meters.measure_baseline(Selection(meters=(world.meter,), reason=None), 0.05) is None
