"""The seam between sensors and windows: what a meter is, and why there may be none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from leangen.energy import FAULTS, Baseline
from leangen.records import Reading, Source

UNIT_UJ = {"uJ": 1, "mJ": 1000}
"""Microjoules in one count of a `Reading`, by its unit."""


class Clock(Protocol):
    """The clocks that a window reads: the module `leangen.clock`, or a simulated world's."""

    def monotonic_ns(self) -> int:
        """See `leangen.clock`."""

    def boottime_ns(self) -> int:
        """See `leangen.clock`."""

    def sleep(self, seconds: float) -> None:
        """See `leangen.clock`."""


@dataclass(frozen=True, slots=True)
class Tick:
    """How often a counter moves, and how that is known."""

    seconds: float
    how: str
    jitter_s: float = 0.0
    """Standard deviation of the time between two moves."""
    lag_s: float = 0.0
    """Age of the energy that a move shows, at most."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a sampler has done since it was made; the difference of two tells of a window."""

    variance_j2: float
    """Sum of the variances that the sampling adds to the energy, 1 sigma: u is 2 sqrt(diff)."""
    covered_ns: int
    """Time that lies between samples close enough to speak for it."""
    samples: int

    def extended(
        self, elapsed_s: float, before_w: float, after_w: float, *, covered_ns: int | None
    ) -> Sampling:
        """The record with one more interval; None for one that is a gap.

        The variance grows as `leangen.meters.sampled` says.
        """
        variance_j2 = (elapsed_s * (after_w - before_w)) ** 2 / 2
        if covered_ns is None:
            variance_j2 += (elapsed_s * (before_w + after_w) / 2) ** 2 / 3
        return Sampling(
            self.variance_j2 + variance_j2,
            self.covered_ns + (covered_ns or 0),
            self.samples + 1,
        )


class Sampler(Protocol):
    """Turns a power sensor into a counter, by sampling it between `start` and `stop`.

    A window starts it before its first look and stops it after the last one; windows may overlap.
    """

    def start(self) -> None:
        """Sample from now on, in a thread."""

    def stop(self) -> None:
        """Undo one `start`; after the last one the thread ends."""

    def sampling(self) -> Sampling:
        """The record so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """One cumulative energy counter, or a model that acts as one."""

    name: str
    """`rapl:package-0`"""
    source: Source
    scope: str
    """The domain that it covers: `package-0`, `gpu-0`, `process-4242`."""
    in_total: bool
    """Whether it joins the total. The meters of one sensor that do are disjoint."""
    unit: str
    """Of its readings: a key of `UNIT_UJ`."""
    tick: Tick
    u_systematic: float
    """k=2 as a fraction of the energy: how far off the class of sensor may be."""
    max_power_w: float
    """No window can truly hold more: tells a wrap from a reset. Generous."""
    wraps_at: int | None
    """The count at which it starts again from 0; None for a counter that never does."""
    coverage: float | None
    """Share of the time in which the sensor looks at the power; None where unknown."""
    read: Callable[[], Reading]
    """One look. Raises MeterFault."""
    note: str = ""
    """What a reader must know: why it is not in the total, or the model behind an estimate."""
    idle_power_w: float | None = None
    """The idle power that a model assumes; None for a sensor."""
    sampler: Sampler | None = None
    """What integrates a power sensor while a window is open; None for a counter and a model."""
    read_power_w: Callable[[], float] | None = None
    """A power reading beside the counter, to hold the counter against. Raises MeterFault."""


@dataclass(frozen=True, slots=True)
class Unavailable:
    """A sensor, or one domain of it, that cannot be used; and what would change that."""

    sensor: str
    reason: str
    remedy: str
    in_total: bool = True
    """Whether it would join the total."""


class MeterFault(Exception):
    """A read that gave no count, or counts that give no energy.

    `fault` is a key of `leangen.energy.FAULTS`, `detail` what was seen.
    """

    def __init__(self, fault: str, detail: str | None = None) -> None:
        super().__init__(fault, detail)
        self.fault = fault
        self.detail = detail or FAULTS[fault]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The meters whose sum is the total: disjoint, and of one source."""

    meters: tuple[Meter, ...]
    reason: str | None
    """What is not covered, or why only an estimate; None when there is nothing to say."""
    unavailable: tuple[Unavailable, ...] = ()

    @property
    def scope(self) -> tuple[str, ...]:
        """The domains of the total, in the order of `meters`."""
        return tuple(meter.scope for meter in self.meters)

    @property
    def source(self) -> Source:
        """How the total is got."""
        return self.meters[0].source if self.meters else "unavailable"

    @property
    def baseline(self) -> Baseline | None:
        """The idle power that the model behind an estimate assumes; None for sensors.

        A sensor's baseline has to be measured: `measure_baseline`.
        """
        powers = [m.idle_power_w for m in self.meters if m.idle_power_w is not None]
        if not powers or len(powers) < len(self.meters):
            return None
        return Baseline(
            power_w=sum(powers),
            u_random_w=0.0,
            u_systematic_w=sum(
                p * m.u_systematic for p, m in zip(powers, self.meters, strict=True)
            ),
            duration_s=0.0,
            scope=self.scope,
            how="the model's own idle term",
        )
