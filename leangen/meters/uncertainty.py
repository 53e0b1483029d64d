"""What may be said of the energy between two looks at a counter: the terms of its uncertainty.

GUM style (JCGM 100:2008), every term in joules at k = 2. With E the energy between the looks, D
the time between them, T the counter's tick, and

    P = E / (D - T) + 3 s       the power at an edge: the mean, were a whole tick missed (D - T is
                                taken as 3/4 T at least), and s, by how much power varies (below)

    term        part        size                 why
    edges       random      P T                  a count is as of its last tick: up to P T is
                                                 missed at the end, or brought in from before the
                                                 begin. 0.6 P T where the begin waited for a tick:
                                                 only the end misses some, and half a tick is added
    lag         random      P lag                what a tick shows is older still: the same effect,
                                                 so it adds to `edges` linearly
    jitter      random      P (2.8 j + r)        ticks stray by j (1 sigma) at both edges; a count
                                                 is of some time within a read of duration r
    resolution  random      0.82 count           rounding at both edges, 0.41 counts at 1 sigma
    coverage    random      2 sqrt((1 - c) V)    a sensor that sees a share c < 1 of the time takes
                                                 the rest to be alike. V: sum of half the squared
                                                 changes of energy from one stretch to the next.
                                                 Of a sampled power sensor: its sampler's variance
    class       systematic  E x fraction         the kind of sensor: its gain, `u_systematic`

Power within a window is seen through its inner looks (`keep_up`, at the ends of steps), joined to
stretches of 2 ticks or more. Whole ticks alone spread their powers by about P T / (sqrt(6) dt),
which is subtracted: a steady load has s = 0. With fewer than 2 stretches s is unknown and taken as
0, so a window of a single step rests on the assumption that its power is about steady, also where
it started from idle.

The random terms add in quadrature, `edges` and `lag` linearly before. `bench/coverage.py` holds all
this against a simulated world, also for power laws that had no say in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from leangen.meters.meter import UNIT_UJ, Meter

Stretch = tuple[float, float]
"""Between two looks: seconds, joules."""

EDGE = 1.0
"""A stale count misses between 0 and P T: all of it, as after idle the misses do not cancel."""
ALIGNED_EDGE = 0.6
"""Half a tick either way is left when half a tick is added; the rest is for power that varies."""
PLANNED_EDGE = 0.8
"""`ALIGNED_EDGE`, and what whole ticks add to s by chance in a window of a dozen of them."""
SPREAD = 3.0
RESOLUTION = 0.82


def terms(
    meter: Meter,
    stretches: Sequence[Stretch],
    *,
    read_s: float,
    aligned: bool = False,
    sampling_u_j: float | None = None,
) -> dict[str, float]:
    """The terms above by name, in joules at k = 2.

    stretches: (seconds, joules) between successive looks; their sums are D and E. read_s: duration
    of the slowest look. aligned: the begin waited for a tick. sampling_u_j: what the sampler of a
    power sensor says of `coverage`.
    """
    tick = meter.tick
    energy_j = math.fsum(joules for _, joules in stretches)
    elapsed_s = math.fsum(seconds for seconds, _ in stretches)
    joined = join(stretches, 2 * tick.seconds)
    power_w = energy_j / max(elapsed_s - tick.seconds, 0.75 * tick.seconds)
    power_w += SPREAD * spread_w(joined, tick.seconds)
    return {
        "edges": (ALIGNED_EDGE if aligned else EDGE) * power_w * tick.seconds,
        "lag": power_w * tick.lag_s,
        "jitter": power_w * (2 * math.sqrt(2) * tick.jitter_s + read_s),
        "resolution": RESOLUTION * UNIT_UJ[meter.unit] / 1e6,
        "coverage": sampling_u_j
        if sampling_u_j is not None
        else _unseen_j(joined, tick.seconds, meter.coverage),
        "class": meter.u_systematic * energy_j,
    }


def combine(parts: dict[str, float]) -> tuple[float, float]:
    """The random and the systematic part of all terms, k = 2."""
    stale_j = parts["edges"] + parts["lag"]
    return (
        math.hypot(stale_j, parts["jitter"], parts["resolution"], parts["coverage"]),
        parts["class"],
    )


def plan_repeats(duration_s: float, tick_s: float, wanted_relative_u: float) -> int:
    """How many generations one window must hold for edges of at most `wanted_relative_u` (k = 2).

    For a window that begins on a tick, with `duration_s` per generation and about steady power:
    the inverse of `edges_relative_u`. The class of the sensor, which repeating does not shrink,
    comes on top.

    Raises ValueError for a duration or a wanted u that is not positive.

    >>> plan_repeats(0.050, 0.001, 0.05), plan_repeats(0.050, 0.100, 0.05)
    (1, 34)
    """
    if not (duration_s > 0 and wanted_relative_u > 0 and tick_s >= 0):
        raise ValueError(
            f"a duration of {duration_s} s, a tick of {tick_s} s and a wanted u of "
            f"{wanted_relative_u}: expected positive figures"
        )
    needed = tick_s * (1 + PLANNED_EDGE / wanted_relative_u) / duration_s
    return max(1, math.ceil(needed * (1 - 1e-9)))


def edges_relative_u(window_s: float, tick_s: float) -> float:
    """What the edges leave open of a window that begins on a tick, k = 2, relative to its energy.

    >>> round(edges_relative_u(1.7, 0.1), 3)
    0.05
    """
    if tick_s == 0:
        return 0.0
    return PLANNED_EDGE * tick_s / max(window_s - tick_s, 0.75 * tick_s)


def join(stretches: Sequence[Stretch], least_s: float) -> list[Stretch]:
    """Stretches of at least `least_s`, each of one or more neighbours; the last takes the rest."""
    joined: list[Stretch] = []
    seconds = joules = 0.0
    for more_s, more_j in stretches:
        seconds += more_s
        joules += more_j
        if seconds >= least_s:
            joined.append((seconds, joules))
            seconds = joules = 0.0
    if joined and seconds > 0:
        last_s, last_j = joined.pop()
        joined.append((last_s + seconds, last_j + joules))
    return joined


def spread_w(stretches: Sequence[Stretch], tick_s: float) -> float:
    """Standard deviation of the power from stretch to stretch, less what quantisation adds to it.

    0 for fewer than 2 stretches, which tell nothing of it.
    """
    if len(stretches) < 2:
        return 0.0
    elapsed_s = math.fsum(seconds for seconds, _ in stretches)
    mean_w = math.fsum(joules for _, joules in stretches) / elapsed_s
    excess = 0.0
    for seconds, joules in stretches:
        deviation_w = joules / seconds - mean_w
        # Whole ticks of n + r: r (1 - r) about the mean of n + r, 1/6 over all r.
        r = seconds / tick_s % 1
        ticks2 = max(1 / 6, r * (1 - r))
        excess += seconds * (deviation_w**2 - (mean_w * tick_s / seconds) ** 2 * ticks2)
    n = len(stretches)
    return math.sqrt(max(0.0, excess / elapsed_s * n / (n - 1)))


def _unseen_j(stretches: Sequence[Stretch], tick_s: float, coverage: float | None) -> float:
    if coverage is None or coverage >= 1 or len(stretches) < 2:
        return 0.0
    variance = 0.0
    for (before_s, before_j), (after_s, after_j) in zip(stretches, stretches[1:], strict=False):
        step_w = after_j / after_s - before_j / before_s
        noise_w = tick_s * (before_j + after_j) / (before_s + after_s) / min(before_s, after_s)
        variance += after_s**2 * max(0.0, step_w**2 - noise_w**2 / 3) / 2
    return 2 * math.sqrt((1 - coverage) * variance)
