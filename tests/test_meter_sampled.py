"""A sampled power sensor as a counter: exact for what it sees, honest about what it does not."""

from __future__ import annotations

import math
import threading

import pytest

from leangen import clock, meters
from leangen.meters import Meter, MeterFault, Selection, Tick
from leangen.meters.sampled import PowerSampler


def meter_of(power_w, period_s=0.002, tick_s=0.002):
    sampler = PowerSampler(power_w, period_s)
    return Meter(
        name="fake:0",
        source="integrated",
        scope="fake",
        in_total=True,
        unit="uJ",
        tick=Tick(tick_s, "given"),
        u_systematic=0.01,
        max_power_w=1000.0,
        wraps_at=None,
        coverage=None,
        read=sampler.read,
        sampler=sampler,
    )


def window_over(meter, seconds):
    window = meters.begin(Selection(meters=(meter,), reason=None))
    clock.sleep(seconds)
    [closed] = meters.end(window)
    return closed, window.tracks[0]


def samplers():
    return [t for t in threading.enumerate() if t.name == "leangen-power-sampler"]


def wait_until_gone():
    for _ in range(200):
        if not samplers():
            return True
        clock.sleep(0.005)
    return False


class World:
    """Time that passes when told, at which the sampler samples when told."""

    def __init__(self, monkeypatch):
        self.now_ns = 10**9
        monkeypatch.setattr(clock, "monotonic_ns", lambda: self.now_ns)
        monkeypatch.setattr(clock, "boottime_ns", lambda: self.now_ns)
        monkeypatch.setattr(PowerSampler, "_run", lambda sampler, ended: None)

    @property
    def now_s(self):
        return self.now_ns / 1e9

    def window_over(self, meter, seconds, late=lambda number: 0.0):
        """A window in which sample `number` comes that many seconds late."""
        window = meters.begin(Selection(meters=(meter,), reason=None))
        end_ns = self.now_ns + round(seconds * 1e9)
        number = 0
        while self.now_ns < end_ns:
            number += 1
            step_ns = round((meter.sampler.period_s + late(number)) * 1e9)
            self.now_ns = min(self.now_ns + step_ns, end_ns)
            meter.sampler.read()
        [closed] = meters.end(window)
        return closed, window.tracks[0]


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch)


def test_constant_power_is_exact_and_has_no_sampling_uncertainty(world):
    closed, track = world.window_over(meter_of(lambda: 12.5), 0.1)
    assert track.elapsed_s == pytest.approx(0.1)
    assert closed.energy_uj == 1_250_000
    assert track.last_sampling.variance_j2 == track.first_sampling.variance_j2
    assert closed.coverage == pytest.approx(1.0)


def test_a_ramp_is_exact(world):
    start_s = world.now_s
    closed, _ = world.window_over(meter_of(lambda: world.now_s - start_s), 0.1)
    assert closed.energy_uj == pytest.approx(0.1**2 / 2 * 1e6, abs=1)


def test_a_burst_between_samples_is_within_u(world):
    """Bursts at a rate unrelated to the sampling: the truth lies within value ± u."""
    period_s, low_w, high_w = 0.0071, 2.0, 20.0

    def power_w():
        return high_w if (world.now_s / period_s) % 1 < 0.3 else low_w

    def energy_j(t_s):
        whole, part = divmod(t_s, period_s)
        high_s = whole * 0.3 * period_s + min(part, 0.3 * period_s)
        return high_w * high_s + low_w * (t_s - high_s)

    inside = 0
    for _ in range(100):
        begin_s = world.now_s
        closed, _ = world.window_over(meter_of(power_w), 0.0503)
        error_j = closed.energy_uj / 1e6 - (energy_j(world.now_s) - energy_j(begin_s))
        inside += abs(error_j) <= closed.u_random_j
    assert inside >= 95


def test_slow_sampling_shows_in_u_and_a_starved_sampler_in_coverage(world):
    flips = iter(range(10**9))

    def power_w():
        return 10.0 if next(flips) % 2 else 1.0

    fast, _ = world.window_over(meter_of(power_w, 0.002, tick_s=1e-6), 0.1)
    slow, _ = world.window_over(meter_of(power_w, 0.02, tick_s=1e-6), 0.1)
    assert slow.u_random_j > 2 * fast.u_random_j
    starved, track = world.window_over(
        meter_of(lambda: 5.0), 0.2, late=lambda number: 0.03 if number % 8 == 7 else 0.0
    )
    assert starved.coverage == pytest.approx(1 - 4 * 0.032 / 0.2, abs=0.01)
    variance = track.last_sampling.variance_j2 - track.first_sampling.variance_j2
    assert variance == pytest.approx(4 * (5.0 * 0.032) ** 2 / 3)
    assert starved.u_random_j >= 2 * math.sqrt(variance)


def test_a_thread_samples_while_a_window_is_open():
    sampled = threading.Event()

    def power_w():
        if threading.current_thread().name == "leangen-power-sampler":
            sampled.set()
        return 12.5

    window = meters.begin(Selection(meters=(meter_of(power_w),), reason=None))
    assert sampled.wait(30)
    [closed] = meters.end(window)
    assert closed.energy_uj == pytest.approx(12.5e6 * window.tracks[0].elapsed_s, rel=1e-4)


def test_nothing_runs_outside_windows_and_time_between_them_counts_for_nothing():
    assert wait_until_gone()
    meter = meter_of(lambda: 100.0)
    first, _ = window_over(meter, 0.02)
    assert wait_until_gone()
    before = meter.read().count
    clock.sleep(0.05)
    assert meter.read().count == before
    second, track = window_over(meter, 0.02)
    assert second.energy_uj == pytest.approx(100e6 * track.elapsed_s, rel=1e-3)


def test_overlapping_windows_share_one_thread():
    meter = meter_of(lambda: 10.0)
    selection = Selection(meters=(meter,), reason=None)
    outer = meters.begin(selection)
    clock.sleep(0.02)
    inner = meters.begin(selection)
    assert len(samplers()) == 1
    clock.sleep(0.02)
    [small] = meters.end(inner)
    assert len(samplers()) == 1
    clock.sleep(0.02)
    [large] = meters.end(outer)
    for closed, window in ((small, inner), (large, outer)):
        assert closed.energy_uj == pytest.approx(10e6 * window.tracks[0].elapsed_s, rel=1e-3)


def test_a_fault_in_the_thread_leaves_the_window_without_a_figure():
    failed = threading.Event()

    def power_w():
        if threading.current_thread().name == "leangen-power-sampler" and not failed.is_set():
            failed.set()
            raise MeterFault("permission", "Permission denied")
        return 10.0

    meter = meter_of(power_w)
    window = meters.begin(Selection(meters=(meter,), reason=None))
    assert failed.wait(30)
    [closed] = meters.end(window)
    assert closed.energy_uj is None
    assert closed.faults == ("permission",)
    again, _ = window_over(meter, 0.05)  # the next window starts afresh
    assert again.energy_uj is not None


@pytest.mark.parametrize("power_w", [math.nan, math.inf, -math.inf])
def test_a_power_that_is_no_number_is_a_fault(power_w):
    with pytest.raises(MeterFault, match="garbage"):
        meter_of(lambda: power_w).read()
