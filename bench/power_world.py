"""A machine whose power is known at every moment, and counters on it as bad as real ones.

A `Law` says the power, a `Sensor` how its counter shows the energy of it: in ticks that stray,
late, in whole counts that wrap, with a gain of its own, seeing only part of the time. Counts go in
where the hardware's would (a powercap file, the NVML library) and come out through leangen's own
meters; only the time stamps are the world's. Lengths and times of laws are in ticks of the sensor.
"""

from __future__ import annotations

import os
import tempfile
from bisect import bisect_right
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from leangen.meters import Meter, Tick, begin, end, keep_up, nvml, probe, rapl
from leangen.meters.meter import Selection
from leangen.records import MeterWindow, Reading

Floats = np.ndarray[Any, np.dtype[np.float64]]
Law = Callable[[np.random.Generator, float], tuple[Floats, Floats]]
"""(random, window in ticks) -> knots [k + 1] in ticks, power [k] between them as a share of 1."""

BEFORE, AFTER = 12.0, 6.0
"""Ticks of the world before and after a window, which lasts from 0 on."""


def _grid(ticks: float, step: float) -> Floats:
    return np.arange(-BEFORE, ticks + AFTER + step, step)


def _switching(levels: Callable[[int], Floats], durations: Floats) -> tuple[Floats, Floats]:
    knots = np.concatenate([[0.0], np.cumsum(durations)]) - BEFORE
    return knots, levels(len(durations))


def constant(rng: np.random.Generator, ticks: float) -> tuple[Floats, Floats]:
    return np.array([-BEFORE, ticks + AFTER]), np.array([rng.uniform(0.2, 1.0)])


def noise(rng: np.random.Generator, ticks: float) -> tuple[Floats, Floats]:
    """White at a third of a tick, 30% of the mean."""
    knots = _grid(ticks, 1 / 3)
    return knots, rng.uniform(0.2, 1) * np.clip(rng.normal(1, 0.3, len(knots) - 1), 0.05, None)


def idle_active_idle(rng: np.random.Generator, ticks: float) -> tuple[Floats, Floats]:
    """What a generation on a quiet machine looks like: work begins and ends with the window."""
    idle = rng.uniform(0.02, 0.4)
    return np.array([-BEFORE, 0, ticks, ticks + AFTER]), np.array([idle, 1.0, idle])


def bursts(rng: np.random.Generator, ticks: float) -> tuple[Floats, Floats]:
    """On and off, each for an exponential time of 15 to 60 ticks in the mean."""
    mean = rng.uniform(15, 60, 2)
    count = int((ticks + BEFORE + AFTER) / mean.sum() * 3) + 12
    first = int(rng.integers(2))
    durations = rng.exponential(mean[(np.arange(2 * count) + first) % 2])
    low = rng.uniform(0.05, 0.5)
    return _switching(
        lambda n: np.where((np.arange(n) + first) % 2 == 0, low, 1.0), durations + 0.2
    )


def drift(rng: np.random.Generator, ticks: float) -> tuple[Floats, Floats]:
    """Linear through the window, from and to anywhere between 0.3 and 1."""
    knots = np.linspace(-BEFORE, ticks + AFTER, 200)
    power = np.interp(knots[:-1], [0, ticks], rng.uniform(0.3, 1.0, 2))
    return knots, power


def ramps(rng: np.random.Generator, ticks: float) -> tuple[Floats, Floats]:
    """A sawtooth of 8 to 200 ticks."""
    knots = _grid(ticks, 0.5)
    period = np.exp(rng.uniform(np.log(8), np.log(200)))
    low = rng.uniform(0.05, 0.6)
    phase = (knots[:-1] / period + rng.uniform()) % 1
    return knots, low + (1 - low) * (phase if rng.random() < 0.5 else 1 - phase)


def square(rng: np.random.Generator, ticks: float) -> tuple[Floats, Floats]:
    """A square wave of 20 to 200 ticks with a duty cycle of its own."""
    period = np.exp(rng.uniform(np.log(20), np.log(200)))
    duty = rng.uniform(0.15, 0.85)
    low = rng.uniform(0.05, 0.6)
    start = -BEFORE - rng.uniform() * period
    starts = np.arange(start, ticks + AFTER, period)
    knots = np.stack([starts, starts + duty * period], 1).ravel()
    knots = np.append(knots, starts[-1] + period)
    return knots, np.tile([1.0, low], len(starts))


def pareto(rng: np.random.Generator, ticks: float) -> tuple[Floats, Floats]:
    """Bursts of heavy-tailed lengths (Pareto, alpha 1.5, from 5 ticks) and heights (alpha 2.5)."""
    count = int((ticks + BEFORE + AFTER) / 10) + 20
    durations = 5 * (1 + rng.pareto(1.5, 2 * count)) * np.tile([2.0, 1.0], count)
    heights = 0.15 + 0.2 * np.minimum(1 + rng.pareto(2.5, count), 4.25)
    low = rng.uniform(0.05, 0.2)
    durations[0] *= rng.uniform()
    levels = np.stack([np.full(count, low), heights], 1).ravel()
    return _switching(lambda n: levels[:n], durations)


def sinusoid(rng: np.random.Generator, ticks: float) -> tuple[Floats, Floats]:
    """8 to 300 ticks long, between 5 and 100% deep."""
    knots = _grid(ticks, 0.5)
    period = np.exp(rng.uniform(np.log(8), np.log(300)))
    wave = np.sin(2 * np.pi * (knots[:-1] / period + rng.uniform()))
    return knots, 0.5 * (1 + rng.uniform(0.05, 1.0) * wave) + 0.01


def wandering(rng: np.random.Generator, ticks: float) -> tuple[Floats, Floats]:
    """A random walk that is drawn back (Ornstein-Uhlenbeck, 20 ticks), lognormal."""
    knots = _grid(ticks, 1.0)
    steps = rng.normal(0, 1, len(knots) - 1)
    decay = np.exp(-1 / 20)
    walk = np.empty(len(steps))
    value = steps[0]
    for index, step in enumerate(steps.tolist()):
        value = decay * value + np.sqrt(1 - decay**2) * step
        walk[index] = value
    return knots, 0.4 * np.exp(0.35 * walk)


DESIGN: dict[str, Law] = {
    "constant": constant,
    "noise": noise,
    "idle-active-idle": idle_active_idle,
    "bursts": bursts,
    "drift": drift,
}
"""The laws by which the formulas were chosen."""
HELD_OUT: dict[str, Law] = {
    "ramps": ramps,
    "square": square,
    "pareto": pareto,
    "sinusoid": sinusoid,
    "wandering": wandering,
}
"""Laws that had no say in them."""
STATIONARY = ("constant", "noise")


@dataclass(frozen=True, slots=True)
class Sensor:
    """How a counter behaves. Times but `read_s` are in ticks."""

    open: Callable[[World, ExitStack], Meter]
    tick_s: float
    power_w: float
    """What a law's 1 is."""
    jitter: float = 0.05
    lag: float = 0.05
    read_s: float = 10e-6
    coverage: float = 1.0


class World:
    """The clock, and one counter on it. Passed to windows as their clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.asleep_s = 0.0
        self.read_s = 0.0
        self.base_ns = 5_000_000_000_000
        self.count: Callable[[float], int] = lambda now_s: 1
        self.fault: Callable[[], None] | None = None
        self.show: Callable[[int], None] = lambda count: None

    def monotonic_ns(self) -> int:
        return self.base_ns + round(self.now_s * 1e9)

    def boottime_ns(self) -> int:
        return self.monotonic_ns() + round(self.asleep_s * 1e9)

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def attach(self, meter: Meter) -> Meter:
        """The meter, reading what the world shows at the world's time."""
        read = meter.read

        def read_now() -> Reading:
            self.now_s += self.read_s / 2
            self.show(self.count(self.now_s))
            reading = read()
            stamped = Reading(reading.count, reading.unit, self.monotonic_ns())
            self.now_s += self.read_s / 2
            return stamped

        return replace(meter, read=read_now)


def open_rapl(world: World, stack: ExitStack, vendor: str = "GenuineIntel") -> Meter:
    """The real RAPL meter on a powercap tree in memory."""
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    root = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=shm)))
    zone = root / "sys/class/powercap/intel-rapl:0"
    zone.mkdir(parents=True)
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(f"vendor_id\t: {vendor}\n")
    (zone / "name").write_text("package-0\n")
    (zone / "max_energy_range_uj").write_text("262143328850\n")
    (zone / "energy_uj").write_text(f"{1:>24}\n")
    fd = os.open(zone / "energy_uj", os.O_WRONLY)
    stack.callback(os.close, fd)
    world.show = lambda count: _put(fd, count)
    [meter] = [entry for entry in rapl.open(root) if isinstance(entry, Meter)]
    return meter


def _put(fd: int, count: int) -> None:
    os.pwrite(fd, b"%24d\n" % count, 0)


def open_amd(world: World, stack: ExitStack) -> Meter:
    return open_rapl(world, stack, "AuthenticAMD")


def open_nvml(world: World, stack: ExitStack) -> Meter:
    """The real NVML meter on a library that shows the world's counter."""
    library = FakeNvml()
    world.show = lambda count: setattr(library, "count", count)
    [meter] = [entry for entry in nvml.open(nvml=library) if isinstance(entry, Meter)]
    return meter


class FakeNvml:
    """What `leangen.meters.nvml` asks of pynvml, for one card."""

    class NVMLError(Exception):
        pass

    count = 1
    name = "NVIDIA A100-SXM4-40GB"

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetName(self, handle: int) -> str:
        return self.name

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return self.count


def open_fine(world: World, stack: ExitStack) -> Meter:
    """A counter of 1% class uncertainty, in coarse counts: its errors are those of the edges."""
    held = [1]
    world.show = lambda count: held.__setitem__(0, count)
    return Meter(
        name="world:fine",
        source="measured",
        scope="world",
        in_total=True,
        unit="mJ",
        tick=Tick(0.05, "given"),
        u_systematic=0.01,
        max_power_w=1000.0,
        wraps_at=2**32,
        coverage=1.0,
        read=lambda: Reading(held[0], "mJ", 0),
    )


SENSORS: dict[str, Sensor] = {
    "rapl-intel": Sensor(open_rapl, 1e-3, 45.0),
    "rapl-amd": Sensor(open_amd, 1e-3, 90.0, jitter=0.1),
    "nvml-a100": Sensor(open_nvml, 0.1, 300.0, lag=0.1, read_s=1e-4, coverage=0.25),
    "nvml-20ms": Sensor(open_nvml, 0.02, 200.0, jitter=0.1, lag=0.1, read_s=1e-4),
    "fine": Sensor(open_fine, 0.05, 5.0, jitter=0.02, lag=0.02),
}


def trial(
    world: World,
    meter: Meter,
    sensor: Sensor,
    law: Law,
    ticks: float,
    rng: np.random.Generator,
    gain: float,
    *,
    aligned: bool = False,
) -> tuple[MeterWindow, float]:
    """One window of `ticks` of work in steps of 2 to 4 ticks: what was said, and the truth in J."""
    knots, power = law(rng, ticks)
    energy = np.concatenate([[0.0], np.cumsum(power * np.diff(knots))])
    energy *= sensor.power_w * sensor.tick_s

    moves = np.arange(-BEFORE + 3, ticks + AFTER) + rng.uniform()
    moves += rng.normal(0, sensor.jitter, len(moves))
    moves.sort()
    edge = float(moves[moves <= 0][-1]) if aligned else 0.0
    knots = knots + edge  # the work begins with the window, on a tick
    seen = moves - sensor.lag * rng.uniform(0.5, 1)
    shown = np.interp(seen, knots, energy)
    if sensor.coverage < 1:
        # The last part of every tick (25 of 100 ms on an A100: arXiv 2312.02741).
        looked = np.diff(seen) * sensor.coverage
        sampled = shown[1:] - np.interp(seen[1:] - looked, knots, energy)
        shown = shown[0] + np.concatenate([[0.0], np.cumsum(sampled / sensor.coverage)])
    per_j = {"uJ": 1e6, "mJ": 1e3}[meter.unit]
    counts = np.floor(shown * (gain * per_j) + rng.uniform(0, 2**31)).astype(np.int64)
    if meter.wraps_at is not None:  # one window in ten goes over the end of the counter
        counts += meter.wraps_at - int(counts[int(len(counts) * rng.uniform(0, 10)) % len(counts)])
        counts %= meter.wraps_at
    at, values = (moves * sensor.tick_s).tolist(), counts.tolist()
    world.count = lambda now_s: values[max(0, bisect_right(at, now_s) - 1)]
    world.read_s = sensor.read_s
    selection = Selection(meters=(meter,), reason=None)

    before = rng.uniform(0.1, 0.7) if aligned else 0.0
    world.now_s = (edge - before) * sensor.tick_s - sensor.read_s
    window = begin(selection, aligned=aligned, clock=world)
    began_s = world.now_s
    work_s = ticks * sensor.tick_s
    step_s = sensor.tick_s * rng.uniform(2, 4)
    while world.now_s + step_s < began_s + work_s:
        world.now_s += step_s
        keep_up(window)
    world.now_s = max(world.now_s, began_s + work_s)
    ended_s = world.now_s
    [closed] = end(window)
    truth = np.interp(np.array([began_s, ended_s]) / sensor.tick_s, knots, energy)
    return closed, float(truth[1] - truth[0])


def probed(world: World, sensor: Sensor, stack: ExitStack, rng: np.random.Generator) -> Meter:
    """The sensor's meter attached to the world, its tick and jitter found by probing."""
    meter = world.attach(sensor.open(world, stack))
    moves = np.sort(np.arange(400) + rng.normal(0, sensor.jitter, 400)) * sensor.tick_s
    at = moves.tolist()
    world.now_s = 10 * sensor.tick_s
    world.read_s = sensor.tick_s / 100
    world.count = lambda now_s: 1000 * bisect_right(at, now_s)
    meter = replace(meter, tick=replace(meter.tick, seconds=sensor.tick_s))
    meter = probe(meter, clock=world)
    return replace(meter, tick=replace(meter.tick, lag_s=sensor.lag * sensor.tick_s))
