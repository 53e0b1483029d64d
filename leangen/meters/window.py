"""Windows: looks at each meter, and what they say of the energy between the first and the last.

Sensors are read at the window's edges and, through `keep_up`, at the ends of some steps: often
enough that no counter wraps unseen and to see how much power varies (which the uncertainty needs),
so rarely that it costs at most half a percent of the time. The terms of the uncertainty
are those of `leangen.meters.uncertainty`. A window with a fault, or one in which the counter did
not move, has no figure at all: it is not 0 J.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field

from leangen import clock as system_clock
from leangen.meters.meter import UNIT_UJ, Clock, Meter, MeterFault, Sampling, Selection
from leangen.meters.uncertainty import Stretch, combine, terms
from leangen.records import MeterWindow, Reading

SUSPEND_NS = 50_000_000
"""Boot-time and monotonic clocks part by more than this only through a suspend."""
STUCK_TICKS = 3
LOOK_TICKS = 2.5
LOOK_COST = 1 / 200
LOOK_SHARE = 1 / 32
"""Inner looks are at least 2.5 ticks, 200 times their own cost and 1/32 of the window apart."""
ALIGN_S = 0.5
"""No wait for a tick lasts longer."""


@dataclass(slots=True)
class _Track:
    """One meter through a window."""

    meter: Meter
    aligned: bool = False
    first: Reading | None = None
    last: Reading | None = None
    counts: int = 0
    stretches: list[Stretch] = field(default_factory=list)
    fault: str | None = None
    first_sampling: Sampling | None = None
    last_sampling: Sampling | None = None

    def look(self) -> None:
        """Read, and add what the counter gained since the last look. A fault stays."""
        if self.fault is not None:
            return
        meter, last = self.meter, self.last
        try:
            reading = meter.read()
            if last is not None:
                counts = gained(meter, last, reading)
                self.counts += counts
                stretch_s = (reading.t_ns - last.t_ns) / 1e9
                self.stretches.append((stretch_s, counts * UNIT_UJ[meter.unit] / 1e6))
        except MeterFault as fault:
            self.fault = fault.fault
            return
        if self.first is None:
            self.first = reading
        self.last = reading
        if meter.sampler is not None:
            self.last_sampling = meter.sampler.sampling()
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
    clock: Clock
    pid: int
    begin_ns: int
    begin_boottime_ns: int
    """Places the window among others of the same boot, whatever process they belong to."""
    look_again_ns: int | None
    """Within this time no counter can wrap twice unseen; None when none wraps."""
    tick_ns: float
    """The fastest of the meters' ticks."""
    due_ns: int = 0
    """When the next look is worth its cost, or needed."""
    read_s: float = 0.0
    """Duration of the slowest look."""

    def look(self) -> None:
        """Look at every meter once."""
        start_ns = self.clock.monotonic_ns()
        for track in self.tracks:
            track.look()
        now_ns = self.clock.monotonic_ns()
        self.read_s = max(self.read_s, (now_ns - start_ns) / 1e9)
        wait_ns = max(
            LOOK_TICKS * self.tick_ns,
            (now_ns - start_ns) / LOOK_COST,
            (now_ns - self.begin_ns) * LOOK_SHARE,
        )
        if self.look_again_ns is not None:
            wait_ns = min(wait_ns, self.look_again_ns)
        self.due_ns = now_ns + int(wait_ns)

    @property
    def energy_uj(self) -> int | None:
        """What all meters gained up to the last look; None with a fault."""
        if any(track.fault is not None for track in self.tracks) or not self.tracks:
            return None
        return sum(track.counts * UNIT_UJ[track.meter.unit] for track in self.tracks)


def begin(
    selection: Selection, *, aligned: bool = False, clock: Clock = system_clock
) -> OpenWindow:
    """Start a window: look at every meter of the selection.

    aligned: first wait for the slowest counter to tick (up to 2 ticks or half a second, spinning),
    which takes 40% off the largest term of a short window: for benchmarks.
    """
    meters = selection.meters
    wrap_times_ns = [
        int(meter.wraps_at * UNIT_UJ[meter.unit] / meter.max_power_w * 1e3)
        for meter in meters
        if meter.wraps_at is not None
    ]
    tracks = [_Track(meter) for meter in meters]
    for meter in meters:
        if meter.sampler is not None:
            meter.sampler.start()
    if aligned and tracks:
        slowest = max(tracks, key=lambda track: track.meter.tick.seconds)
        slowest.aligned = wait_for_tick(slowest.meter, clock)
    window = OpenWindow(
        tracks=tracks,
        clock=clock,
        pid=os.getpid(),
        begin_ns=clock.monotonic_ns(),
        begin_boottime_ns=clock.boottime_ns(),
        look_again_ns=min(wrap_times_ns) // 2 if wrap_times_ns else None,
        tick_ns=min((meter.tick.seconds * 1e9 for meter in meters), default=math.inf),
    )
    if tracks:
        window.look()
    return window


def wait_for_tick(meter: Meter, clock: Clock = system_clock) -> bool:
    """Spin until the counter moves; False where it does not within 2 ticks or half a second."""
    if meter.source != "measured":
        return False
    give_up_ns = clock.monotonic_ns() + int(min(2 * meter.tick.seconds, ALIGN_S) * 1e9)
    try:
        first = meter.read().count
        while clock.monotonic_ns() < give_up_ns:
            if meter.read().count != first:
                return True
    except MeterFault:
        return False  # the window's own look will meet it and name it
    return False


def keep_up(window: OpenWindow) -> bool:
    """Look again if that is due: whether it did. Call it now and then: at the end of each step.

    Mostly it only reads a clock. A window in which it is not called for minutes may come out
    `ambiguous`.
    """
    if not window.tracks or window.clock.monotonic_ns() < window.due_ns:
        return False
    window.look()
    return True


def end(window: OpenWindow) -> tuple[MeterWindow, ...]:
    """Look a last time; one MeterWindow per meter, in the order of the selection."""
    forked = os.getpid() != window.pid
    if not forked:
        window.look()
        for track in window.tracks:
            if track.meter.sampler is not None:
                track.meter.sampler.stop()
    awake_ns = window.clock.monotonic_ns() - window.begin_ns
    suspended_ns = window.clock.boottime_ns() - window.begin_boottime_ns - awake_ns
    fault = None
    if forked:
        fault = "forked"
    elif awake_ns < 0:
        fault = "clock"
    # A model of awake time goes on being right through a suspend; a sensor may not.
    suspended = suspended_ns > SUSPEND_NS
    return tuple(
        _close(
            track,
            window.read_s,
            fault or ("suspended" if suspended and track.meter.source != "estimated" else None),
        )
        for track in window.tracks
    )


def gained(meter: Meter, before: Reading, after: Reading) -> int:
    """What the counter gained between two readings, in its own counts; a wrap is undone.

    Raises MeterFault where that cannot be told: `clock` when time ran backwards, `ambiguous` when
    the counter could have gone all the way round in the time, `older` for a fall that is small for
    the time, `reset` for any other that no wrap within `max_power_w` explains, `jump` for a rise
    beyond it.
    """
    if after.t_ns < before.t_ns:
        raise MeterFault("clock")
    # Two ticks of grace: the counter may show energy from just before the first reading.
    elapsed_s = (after.t_ns - before.t_ns) / 1e9 + 2 * meter.tick.seconds + meter.tick.lag_s
    most = meter.max_power_w * elapsed_s * 1e6 / UNIT_UJ[meter.unit]
    if meter.wraps_at is not None and most >= meter.wraps_at:
        raise MeterFault("ambiguous")
    counts = after.count - before.count
    if counts < 0:
        if meter.wraps_at is None or counts + meter.wraps_at > most:
            raise MeterFault("older" if -counts <= most and after.count > most else "reset")
        counts += meter.wraps_at
    if counts > most:
        raise MeterFault("jump")
    return counts


def _close(track: _Track, read_s: float, fault: str | None) -> MeterWindow:
    meter = track.meter
    fault = fault or track.fault or _stuck(track)
    if fault is not None:
        return MeterWindow(
            sensor=meter.name,
            source=meter.source,
            energy_uj=None,
            tick_s=meter.tick.seconds,
            coverage=meter.coverage,
            faults=(fault,),
        )
    coverage, sampling_u_j = _sampled(track)
    parts = terms(
        meter, track.stretches, read_s=read_s, aligned=track.aligned, sampling_u_j=sampling_u_j
    )
    u_random_j, u_systematic_j = combine(parts)
    energy_uj = track.counts * UNIT_UJ[meter.unit]
    if track.aligned:  # the begin missed nothing, the end half a tick on average
        tick_s = meter.tick.seconds
        energy_uj += round(energy_uj * tick_s / 2 / max(track.elapsed_s - tick_s / 2, tick_s / 2))
    return MeterWindow(
        sensor=meter.name,
        source=meter.source,
        energy_uj=energy_uj,
        u_random_j=u_random_j,
        u_systematic_j=u_systematic_j,
        tick_s=meter.tick.seconds,
        coverage=coverage,
        terms=parts,
    )


def _stuck(track: _Track) -> str | None:
    """A counter that rested, as far as that can be told: for 3 ticks it may just be slow."""
    patience_s = STUCK_TICKS * (track.meter.tick.seconds + 2 * track.meter.tick.jitter_s)
    if track.counts == 0:
        return "stuck" if track.elapsed_s > patience_s else "ambiguous"
    resting_s = 0.0
    for seconds, joules in track.stretches:
        resting_s = 0.0 if joules else resting_s + seconds
        if resting_s > patience_s and track.meter.source == "measured":
            return "stuck"
    return None


def _sampled(track: _Track) -> tuple[float | None, float | None]:
    """Coverage of a window, and the k=2 uncertainty that sampling adds; None for a counter."""
    first, last = track.first_sampling, track.last_sampling
    if first is None or last is None or track.elapsed_s <= 0:
        return track.meter.coverage, None
    coverage = (last.covered_ns - first.covered_ns) / 1e9 / track.elapsed_s
    return min(1.0, coverage), 2 * math.sqrt(max(0.0, last.variance_j2 - first.variance_j2))
