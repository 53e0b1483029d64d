"""What a sensor does, found out by watching it: tick, jitter, counter against power.

Watching takes 10 ms for RAPL and a second for a GPU, so `probed` keeps what it found in a file of
the store until the next boot: a warm start reads a few hundred bytes.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from leangen import clock as system_clock
from leangen.errors import StorageError
from leangen.files import write_atomic
from leangen.meters.meter import UNIT_UJ, Clock, Meter, MeterFault, Selection, Tick

EDGES = 12
SLOWEST_S = 0.5
"""A slower counter keeps its documented tick: watching a battery's would take minutes."""


def probe(meter: Meter, *, edges: int = EDGES, clock: Clock = system_clock) -> Meter:
    """The meter with its tick and jitter measured: the time between moves of its counter.

    Reads in a tight loop for about `edges` ticks (12 ms for RAPL, 1 s for NVML), at most for twice
    that. A model has nothing to probe, a power sensor is sampled at a rate that it states, and a
    counter that hardly moves keeps its documented tick. Where there is a power reading too, the
    counter is held against it for 6 more ticks, and `Tick.how` says the outcome.
    """
    if meter.source != "measured" or meter.tick.seconds > SLOWEST_S:
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
        return replace(meter, tick=replace(meter.tick, how=how))
    gaps_s = [(b - a) / 1e9 for a, b in itertools.pairwise(moved_ns)]
    # The mean, not the median: a straying tick shortens one gap by what it adds to the next.
    tick_s = (moved_ns[-1] - moved_ns[0]) / 1e9 / len(gaps_s)
    return replace(
        meter,
        tick=Tick(
            seconds=tick_s,
            how=f"probed: mean of {len(gaps_s)} moves" + _against_power(meter, clock),
            # A gap strays by both of its ticks.
            jitter_s=math.sqrt(math.fsum((gap - tick_s) ** 2 for gap in gaps_s) / len(gaps_s) / 2),
            lag_s=meter.tick.lag_s,
        ),
    )


def _against_power(meter: Meter, clock: Clock) -> str:
    if meter.read_power_w is None:
        return ""
    seconds = 6 * meter.tick.seconds
    try:
        ratio = counter_against_power(meter, meter.read_power_w, seconds, clock=clock)
    except (MeterFault, ValueError) as error:
        return f"; not held against power ({error})"
    return f"; {ratio:.2f} of integrated power over {seconds:.2g} s"


def counter_against_power(
    meter: Meter,
    read_power_w: Callable[[], float],
    seconds: float,
    *,
    clock: Clock = system_clock,
) -> float:
    """Energy by the counter over energy by integrated power, from watching both for `seconds`.

    Far from 1, one of the two sensors is off or averages over longer than it says. Raises
    MeterFault, and ValueError where the power integrates to nothing.
    """
    power_w, first = read_power_w(), meter.read()
    last, at_ns = first, first.t_ns
    energy_j = 0.0
    while last.t_ns - first.t_ns < seconds * 1e9:
        clock.sleep(meter.tick.seconds / 5)
        now_w, last = read_power_w(), meter.read()
        energy_j += (power_w + now_w) / 2 * (last.t_ns - at_ns) / 1e9
        power_w, at_ns = now_w, last.t_ns
    if energy_j <= 0:
        raise ValueError(f"{meter.name}: power integrates to {energy_j} J over {seconds} s")
    return (last.count - first.count) * UNIT_UJ[meter.unit] / 1e6 / energy_j


def probed(selection: Selection, *, boot_id: str, cache: Path | None) -> Selection:
    """The selection with every counter probed, once per boot.

    `cache` is a file of its own; a missing, damaged or older one is written anew, and one that
    cannot be written is done without.
    """
    kept = _load(cache, boot_id)
    meters = []
    fresh = False
    for meter in selection.meters:
        if meter.source == "measured" and (tick := _tick(kept.get(meter.name))):
            meter = replace(meter, tick=tick)
        elif meter.source == "measured":
            meter = probe(meter)
            kept[meter.name] = asdict(meter.tick)
            fresh = True
        meters.append(meter)
    if fresh and cache is not None:
        with suppress(StorageError):  # a full or read-only store: probe again next time
            write_atomic(cache, json.dumps({"boot_id": boot_id, "ticks": kept}).encode())
    return replace(selection, meters=tuple(meters))


def _load(cache: Path | None, boot_id: str) -> dict[str, Any]:
    if cache is None:
        return {}
    try:
        kept = json.loads(cache.read_bytes())
        return dict(kept["ticks"]) if kept["boot_id"] == boot_id else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _tick(kept: Any) -> Tick | None:
    try:
        tick = Tick(**kept)
        good = all(math.isfinite(s) and s >= 0 for s in (tick.jitter_s, tick.lag_s))
        return tick if good and math.isfinite(tick.seconds) and tick.seconds > 0 else None
    except TypeError:
        return None
