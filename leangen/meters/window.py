"""Windows: two looks at each meter, and what may be said of the energy between them.

Sensors are read at the window's edges only, as polling costs energy itself (`keep_up` adds a look
when a counter could otherwise wrap unseen). The terms of the uncertainty, all at k = 2, with
P = E / (window - tick), the mean power if the counter missed a tick at one edge:

    term        part        size            why
    tick        random      P x tick        each edge sees the counter as of its last tick: two
                                            uniform terms, 0.41 P tick at 1 sigma; the power before
                                            the window is unknown, 0 to P: 0.29 P tick; together
                                            0.5 P tick
    jitter      random      P x read time   the count was taken somewhere within the read calls
    resolution  random      one count       rounding at both edges, 0.41 counts at 1 sigma
    sampling    random      2 sqrt(var)     of a sampled power sensor only: `meters/sampled.py`
    class       systematic  E x fraction    the kind of sensor: its gain; `Meter.u_systematic`

The tick term holds for a window of about steady power, also when it started from idle. A window in
which the counter did not move has no figure at all: it is not 0 J.
"""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass, replace

from leangen import clock
from leangen.energy import Baseline
from leangen.meters.meter import UNIT_UJ, Meter, MeterFault, Sampling, Selection, Tick
from leangen.records import MeterWindow, Reading

SUSPEND_NS = 50_000_000
"""Boot-time and monotonic clocks part by more than this only through a suspend."""


@dataclass(slots=True)
class _Track:
    """One meter through a window."""

    meter: Meter
    first: Reading | None = None
    last: Reading | None = None
    counts: int = 0
    fault: str | None = None
    first_sampling: Sampling | None = None
    last_sampling: Sampling | None = None

    def look(self) -> None:
        """Read, and add what the counter gained since the last look."""
        if self.fault is not None:
            return
        try:
            reading = self.meter.read()
            if self.last is not None:
                self.counts += gained(self.meter, self.last, reading)
        except MeterFault as fault:
            self.fault = fault.fault
            return
        self.first = self.first or reading
        self.last = reading
        if self.meter.sampler is not None:
            self.last_sampling = self.meter.sampler.sampling()
            self.first_sampling = self.first_sampling or self.last_sampling

    @property
    def elapsed_s(self) -> float:
        """Time between the first look and the last."""
        if self.first is None or self.last is None:
            return 0.0
        return (self.last.t_ns - self.first.t_ns) / 1e9


@dataclass(slots=True)
class OpenWindow:
    """A window that has begun and not ended."""

    tracks: list[_Track]
    begin_ns: int
    begin_boottime_ns: int
    """Places the window among others of the same boot, whatever process they belong to."""
    look_again_ns: int | None
    """Within this time no counter can wrap twice unseen; None when none wraps."""
    looked_ns: int = 0
    read_s: float = 0.0
    """Duration of the slowest look."""

    def look(self) -> None:
        """Look at every meter once."""
        start_ns = clock.monotonic_ns()
        for track in self.tracks:
            track.look()
        self.looked_ns = clock.monotonic_ns()
        self.read_s = max(self.read_s, (self.looked_ns - start_ns) / 1e9)


def begin(selection: Selection) -> OpenWindow:
    """Start a window: look at every meter of the selection."""
    wrap_times_ns = [
        int(meter.wraps_at * UNIT_UJ[meter.unit] / meter.max_power_w * 1e3)
        for meter in selection.meters
        if meter.wraps_at is not None
    ]
    window = OpenWindow(
        tracks=[_Track(meter) for meter in selection.meters],
        begin_ns=clock.monotonic_ns(),
        begin_boottime_ns=clock.boottime_ns(),
        look_again_ns=min(wrap_times_ns) // 2 if wrap_times_ns else None,
    )
    for meter in selection.meters:
        if meter.sampler is not None:
            meter.sampler.start()
    window.look()
    return window


def keep_up(window: OpenWindow) -> None:
    """Look again if a counter could wrap unseen before long. Call it now and then: per step.

    It reads a clock and, every half minute at most, the counters. A window in which it is not
    called for minutes may come out `ambiguous`.
    """
    due = window.look_again_ns
    if due is not None and clock.monotonic_ns() - window.looked_ns > due:
        window.look()


def end(window: OpenWindow) -> tuple[MeterWindow, ...]:
    """Look a last time; one MeterWindow per meter, in the order of the selection."""
    window.look()
    for track in window.tracks:
        if track.meter.sampler is not None:
            track.meter.sampler.stop()
    suspended_ns = (clock.boottime_ns() - window.begin_boottime_ns) - (
        clock.monotonic_ns() - window.begin_ns
    )
    return tuple(
        _close(track, window.read_s, suspended=suspended_ns > SUSPEND_NS) for track in window.tracks
    )


def gained(meter: Meter, before: Reading, after: Reading) -> int:
    """What the counter gained between two readings, in its own counts; a wrap is undone.

    Raises MeterFault where that cannot be told: `ambiguous` when the counter could have gone all
    the way round in the time, `reset` for a fall that no wrap within `max_power_w` explains,
    `jump` for a rise beyond it.
    """
    # Two ticks of grace: the counter may show energy from just before the first reading.
    elapsed_s = (after.t_ns - before.t_ns) / 1e9 + 2 * meter.tick.seconds
    most = meter.max_power_w * elapsed_s * 1e6 / UNIT_UJ[meter.unit]
    if meter.wraps_at is not None and most >= meter.wraps_at:
        raise MeterFault("ambiguous")
    counts = after.count - before.count
    if counts < 0:
        if meter.wraps_at is None or counts + meter.wraps_at > most:
            raise MeterFault("reset")
        counts += meter.wraps_at
    if counts > most:
        raise MeterFault("jump")
    return counts


def _close(track: _Track, read_s: float, *, suspended: bool) -> MeterWindow:
    meter = track.meter
    fault = track.fault
    # A model of awake time goes on being right through a suspend; a counter may not.
    if fault is None and suspended and meter.source != "estimated":
        fault = "suspended"
    if fault is None and track.counts == 0:
        fault = "stuck" if track.elapsed_s > 3 * meter.tick.seconds else "unresolved"
    if fault is not None:
        return MeterWindow(
            sensor=meter.name,
            source=meter.source,
            energy_uj=None,
            tick_s=meter.tick.seconds,
            coverage=meter.coverage,
            faults=(fault,),
        )
    count_j = UNIT_UJ[meter.unit] / 1e6
    energy_j = track.counts * count_j
    tick_s = meter.tick.seconds
    power_w = energy_j / max(track.elapsed_s - tick_s, tick_s)
    coverage, sampling_u_j = _sampled(track)
    return MeterWindow(
        sensor=meter.name,
        source=meter.source,
        energy_uj=track.counts * UNIT_UJ[meter.unit],
        u_random_j=math.hypot(power_w * tick_s, power_w * read_s, 0.82 * count_j, sampling_u_j),
        u_systematic_j=meter.u_systematic * energy_j,
        tick_s=tick_s,
        coverage=coverage,
    )


def _sampled(track: _Track) -> tuple[float | None, float]:
    """Coverage of a window, and the k=2 uncertainty that sampling adds; 0 for a counter."""
    first, last = track.first_sampling, track.last_sampling
    if first is None or last is None or track.elapsed_s <= 0:
        return track.meter.coverage, 0.0
    coverage = (last.covered_ns - first.covered_ns) / 1e9 / track.elapsed_s
    return min(1.0, coverage), 2 * math.sqrt(max(0.0, last.variance_j2 - first.variance_j2))


def probe(meter: Meter, *, edges: int = 8) -> Meter:
    """The meter with its tick measured: the median time between moves of its counter.

    Reads in a tight loop for about `edges` ticks (10 ms for RAPL, 1 s for NVML), at most for twice
    that. A model has nothing to probe, and a counter that hardly moves keeps its documented tick.
    """
    if meter.source != "measured":
        return meter
    give_up_ns = clock.monotonic_ns() + int(2e9 * edges * meter.tick.seconds)
    moved_ns: list[int] = []
    try:
        last = meter.read()
        while len(moved_ns) <= edges and clock.monotonic_ns() < give_up_ns:
            reading = meter.read()
            if reading.count != last.count:
                moved_ns.append(reading.t_ns)
            last = reading
    except MeterFault:
        return meter
    if len(moved_ns) <= edges // 2:
        how = f"{meter.tick.how} (probing saw it move {len(moved_ns)} times)"
        return replace(meter, tick=Tick(meter.tick.seconds, how))
    gaps_s = [(b - a) / 1e9 for a, b in itertools.pairwise(moved_ns)]
    return replace(
        meter, tick=Tick(statistics.median(gaps_s), f"probed: median of {len(gaps_s)} moves")
    )


def measure_baseline(selection: Selection, seconds: float) -> Baseline | None:
    """The idle power of the selection's scope, from about `seconds` of doing nothing.

    Sleeps through up to 10 windows of at least 10 ticks each. The stated spread is that of one
    further window, not of the mean: it is subtracted from one further interval. An estimate
    brings its own baseline, at once. None when there is no meter or a window was faulted.

    Raises ValueError for `seconds` too short for two windows.
    """
    if selection.source not in ("measured", "integrated"):
        return selection.baseline
    slowest_s = max(meter.tick.seconds for meter in selection.meters)
    parts = min(10, int(seconds / (10 * slowest_s)))
    if parts < 2:
        raise ValueError(
            f"a baseline of {seconds} s is too short for a tick of {slowest_s} s: "
            f"give at least {20 * slowest_s} s"
        )
    powers_w = []
    edges_w = []
    systematic_w = 0.0
    for _ in range(parts):
        window = begin(selection)
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
