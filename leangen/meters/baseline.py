"""The idle power of a selection, with its spread."""

from __future__ import annotations

import math

from leangen import clock as system_clock
from leangen.energy import Baseline
from leangen.meters.meter import Clock, Selection
from leangen.meters.window import begin, end


def least_seconds(selection: Selection) -> float:
    """The shortest time in which `measure_baseline` can tell a spread: two windows of 10 ticks."""
    return 20 * max((meter.tick.seconds for meter in selection.meters), default=0.0)


def measure_baseline(
    selection: Selection, seconds: float, *, clock: Clock = system_clock
) -> Baseline | None:
    """The idle power of the selection's scope, from about `seconds` of doing nothing.

    Sleeps through up to 10 windows of at least 10 ticks each. The stated spread is that of one
    further window, not of the mean: it is subtracted from one further interval. An estimate
    brings its own baseline, at once. None when there is no meter or a window was faulted.

    Raises ValueError for `seconds` too short for two windows.
    """
    if selection.source not in ("measured", "integrated"):
        return selection.baseline
    import statistics  # 5 ms of the start of those who do not measure any

    least_s = least_seconds(selection)
    # A millionth of slack: 0.2 s are two windows of 10 ticks of 10 ms in floating point, too.
    parts = min(10, int(2 * seconds / least_s * (1 + 1e-6)))
    if parts < 2:
        raise ValueError(
            f"a baseline of {seconds} s is too short for a tick of {least_s / 20} s: "
            f"give at least {least_s} s"
        )
    powers_w = []
    edges_w = []
    systematic_w = 0.0
    for _ in range(parts):
        window = begin(selection, clock=clock)
        clock.sleep(seconds / parts)
        closed = end(window)
        if any(meter.energy_uj is None for meter in closed):
            return None
        elapsed_s = [track.elapsed_s for track in window.tracks]
        rows = list(zip(closed, elapsed_s, strict=True))
        powers_w.append(math.fsum((m.energy_uj or 0) / 1e6 / s for m, s in rows))
        edges_w.append(math.hypot(*((m.u_random_j or 0.0) / s for m, s in rows)))
        systematic_w += math.fsum((m.u_systematic_j or 0.0) / s for m, s in rows) / parts
    spread_w = 2 * statistics.stdev(powers_w) * math.sqrt(1 + 1 / parts)
    return Baseline(
        power_w=statistics.fmean(powers_w),
        u_random_w=math.hypot(spread_w, statistics.fmean(edges_w) / math.sqrt(parts)),
        u_systematic_w=systematic_w,
        duration_s=seconds,
        scope=selection.scope,
        how=f"measured over {parts} idle windows of {seconds / parts:.2g} s",
    )
