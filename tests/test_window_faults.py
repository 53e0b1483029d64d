"""Every fault of a sensor is seen and named, and never becomes a number."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace

import bench_scripts
import fake_powercap
import pytest

from leangen import clock, meters
from leangen.energy import FAULTS, account
from leangen.meters.meter import MeterFault, Selection, Tick

pw = bench_scripts.load("power_world")

POWER_W = 45.0


class Rig:
    """A real meter in a world of constant power, whose counter the test may bend."""

    def __init__(self, world, meter, per_j, tick_s):
        self.world, self.meter, self.tick_s = world, meter, tick_s
        self.selection = Selection(meters=(meter,), reason=None)
        self.offset = 0
        self.frozen_s = None
        world.count = lambda now_s: self._count(now_s, per_j)

    def _count(self, now_s, per_j):
        if self.frozen_s is not None:
            now_s = min(now_s, self.frozen_s)
        count = int(now_s // self.tick_s * self.tick_s * POWER_W * per_j) + self.offset
        return count % self.meter.wraps_at if self.meter.wraps_at else count

    def begin(self):
        self.world.now_s = 10.0005
        return meters.begin(self.selection, clock=self.world)

    def look_at(self, window, now_s):
        self.world.now_s = now_s
        window.look()

    def end_at(self, window, now_s):
        self.world.now_s = now_s
        [closed] = meters.end(window)
        return closed


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def rapl(stack):
    world = pw.World()
    return Rig(world, world.attach(pw.open_rapl(world, stack)), 1e6, 1e-3)


@pytest.fixture
def gpu(stack):
    world = pw.World()
    library = pw.FakeNvml()
    world.show = lambda count: setattr(library, "count", count)
    from leangen.meters import nvml

    [meter] = nvml.open(nvml=library)
    rig = Rig(world, world.attach(meter), 1e3, 0.1)
    rig.library = library
    return rig


@pytest.fixture(params=["rapl", "gpu"])
def rig(request):
    return request.getfixturevalue(request.param)


def assert_named(closed, fault):
    assert (closed.energy_uj, closed.u_random_j, closed.faults) == (None, None, (fault,))
    receipt = account(
        [closed], scope=("x",), reason=None, duration_ns=1, baseline=None, units=1
    ).to_json()
    assert (receipt["source"], receipt["gross_j"]) == ("unavailable", None)
    assert FAULTS[fault] in receipt["reason"]


def test_without_a_fault_it_is_a_number(rig):
    window = rig.begin()
    closed = rig.end_at(window, 14.0)
    assert closed.faults == ()
    assert closed.energy_uj / 1e6 == pytest.approx(4 * POWER_W, rel=0.03)


def test_a_wrap_is_undone_also_when_there_are_several(rapl):
    rapl.offset = rapl.meter.wraps_at - int(10.5 * POWER_W * 1e6)
    window = rapl.begin()
    assert rapl.end_at(window, 12.0).energy_uj == pytest.approx(2 * POWER_W * 1e6, rel=1e-2)

    window = rapl.begin()
    hours_s = 4 * 3600
    for now_s in range(20, hours_s, 20):
        rapl.world.now_s = float(now_s)
        meters.keep_up(window)
    closed = rapl.end_at(window, float(hours_s))
    assert hours_s * POWER_W * 1e6 > 2 * rapl.meter.wraps_at
    assert closed.energy_uj == pytest.approx((hours_s - 10) * POWER_W * 1e6, rel=1e-3)


def test_what_could_have_wrapped_unseen_is_ambiguous(rapl):
    closed = rapl.end_at(rapl.begin(), 4 * 3600.0)
    assert_named(closed, "ambiguous")
    assert "ambiguous" in FAULTS["ambiguous"]


def test_a_reset(rig):
    rig.offset = 90_000_000_000
    window = rig.begin()
    rig.offset = -int(11.0 * POWER_W * (1e6 if rig.meter.unit == "uJ" else 1e3))
    assert_named(rig.end_at(window, 12.0), "reset")


def test_a_reset_that_an_inner_look_hides_from_the_edges(gpu):
    """By the end the counter is higher than at the begin again: only a look on the way tells."""
    gpu.offset = 100_000
    window = gpu.begin()
    gpu.offset = -500_000
    gpu.look_at(window, 12.0)
    gpu.offset = 200_000
    assert_named(gpu.end_at(window, 14.0), "reset")


def test_an_older_value(rig):
    rig.offset = 90_000_000_000
    window = rig.begin()
    rig.look_at(window, 12.0)
    rig.frozen_s = 11.5
    assert_named(rig.end_at(window, 14.0), "older")


def test_a_suspend(rig):
    window = rig.begin()
    rig.world.asleep_s = 30.0
    assert_named(rig.end_at(window, 12.0), "suspended")


def test_a_clock_that_goes_backwards(rig):
    window = rig.begin()
    assert_named(rig.end_at(window, 9.0), "clock")


def test_a_counter_that_rests(rig):
    rig.frozen_s = 10.0
    window = rig.begin()
    assert_named(rig.end_at(window, 10.0005 + 2.5 * rig.tick_s), "ambiguous")
    window = rig.begin()
    assert_named(rig.end_at(window, 10.0005 + 10 * rig.tick_s), "stuck")


def test_a_counter_that_stops_on_the_way(rig):
    window = rig.begin()
    rig.frozen_s = 12.0
    rig.look_at(window, 13.0)
    rig.look_at(window, 14.0)
    assert_named(rig.end_at(window, 15.0), "stuck")


def test_a_rise_beyond_what_hardware_draws(rig):
    window = rig.begin()
    rig.offset += 200_000_000_000
    assert_named(rig.end_at(window, 12.0), "jump")


@pytest.fixture
def tree(tmp_path):
    return fake_powercap.make(tmp_path, {"intel-rapl:0": ("package-0", 1_000_000)})


def test_a_file_that_vanishes_and_comes_back(tree):
    file = fake_powercap.counter(tree, "intel-rapl:0")
    window = meters.begin(meters.select(tree))
    text = file.read_text()
    file.unlink()
    window.look()
    file.write_text(text)
    assert_named(meters.end(window)[0], "vanished")

    window = meters.begin(meters.select(tree))
    file.unlink()
    file.write_text("17\n")  # back before anyone looked, but it counts anew
    assert_named(meters.end(window)[0], "reset")


@pytest.mark.parametrize("text", ["", "garbage", "-5", "1e6", "\0\0\0"])
def test_a_file_that_holds_no_count(tree, text):
    window = meters.begin(meters.select(tree))
    fake_powercap.counter(tree, "intel-rapl:0").write_text(text)
    assert_named(meters.end(window)[0], "garbage")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads any file")
def test_a_permission_that_is_lost(tree):
    window = meters.begin(meters.select(tree))
    fake_powercap.counter(tree, "intel-rapl:0").chmod(0)
    assert_named(meters.end(window)[0], "permission")


def test_a_permission_that_a_read_is_refused(rig):
    def refuse():
        raise MeterFault("permission")

    allowed = [True]
    read = rig.meter.read
    meter = replace(rig.meter, read=lambda: read() if allowed[0] else refuse())
    window = meters.begin(Selection(meters=(meter,), reason=None), clock=rig.world)
    allowed[0] = False
    assert_named(rig.end_at(window, 12.0), "permission")


@pytest.mark.parametrize(("value", "fault"), [(15, "lost"), (999, "vanished")])
def test_a_gpu_that_is_lost(gpu, value, fault):
    window = gpu.begin()

    def gone(handle):
        error = pw.FakeNvml.NVMLError("gone")
        error.value = value
        raise error

    gpu.library.nvmlDeviceGetTotalEnergyConsumption = gone
    assert_named(gpu.end_at(window, 12.0), fault)


def test_a_window_that_ends_in_a_forked_process(tree):
    window = meters.begin(meters.select(tree))
    fake_powercap.spend(tree, "intel-rapl:0", 300_000)
    child = os.fork()
    if child == 0:
        faults = [fault for closed in meters.end(window) for fault in closed.faults]
        os._exit(0 if faults == ["forked"] else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    [closed] = meters.end(window)  # the parent's own goes on being right
    assert closed.energy_uj == 300_000


def test_one_faulted_meter_leaves_the_others_their_figures(tmp_path):
    root = fake_powercap.make(tmp_path, fake_powercap.LAPTOP)
    window = meters.begin(meters.select(root))
    fake_powercap.spend(root, "intel-rapl:0", 300_000)
    fake_powercap.counter(root, "intel-rapl:0:2").unlink()
    package, dram = meters.end(window)
    assert (package.energy_uj, dram.faults) == (300_000, ("vanished",))


def test_the_clock_of_a_window_is_the_systems_by_default(tree):
    window = meters.begin(meters.select(tree))
    assert window.clock is clock
    assert window.begin_ns <= clock.monotonic_ns()


def test_every_fault_has_words():
    assert all(FAULTS.values())
    assert Tick(1.0, "x").lag_s == 0
