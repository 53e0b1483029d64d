"""Whose energy is it? A measured total shared among steps, requests and processes.

Nothing here measures. Every share is an integer of microjoules and the shares of a total sum to it
exactly; where something was not resolved by the meter the share says by what it was made.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leangen import clock
from leangen.records import Source, StepEnergy

EACH_LIMIT = 64
"""Steps of one kind that are listed one by one; more are too many for a receipt."""
USER_HZ_S = 0.01
"""The unit of /proc/stat on every architecture that runs ONNX Runtime."""


def largest_remainder(total: int, weights: Sequence[int | float]) -> list[int]:
    """Split the integer `total` in proportion to `weights` (>= 0), so that the parts sum to it.

    Every part is its exact quota rounded down or up; those with the largest fractions are rounded
    up, earlier ones first on a tie (Hamilton's method). A zero weight gets 0. A negative total is
    split as its mirror image.

    Raises ValueError for no weights, a negative or non-finite one, or when all are 0.

    >>> largest_remainder(10, [1, 1, 1])
    [4, 3, 3]
    >>> largest_remainder(-10, [3, 0, 1])
    [-8, 0, -2]
    """
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights):
        raise ValueError(f"weights must be finite and not negative, got {list(weights)}")
    # Ratios of integers: floats would lose the last microjoules of a large total.
    ratios = [weight.as_integer_ratio() for weight in weights]
    common = math.lcm(*(denominator for _, denominator in ratios))
    exact = [numerator * (common // denominator) for numerator, denominator in ratios]
    whole = sum(exact)
    if whole == 0:
        raise ValueError("weights sum to 0: there is nothing to share by")
    quotas = [divmod(abs(total) * weight, whole) for weight in exact]
    parts = [quotient for quotient, _ in quotas]
    short = abs(total) - sum(parts)
    for index in sorted(range(len(parts)), key=lambda i: -quotas[i][1])[:short]:
        parts[index] += 1
    return parts if total >= 0 else [-part for part in parts]


@dataclass(slots=True)
class _Kind:
    duration_ns: int
    each_uj: list[int]
    pure: bool = True
    alone: bool = True
    runs: int = 0
    contrast_j: float = 0.0


def share_steps(
    gross_uj: int,
    steps: Sequence[tuple[str, int]],
    marks: Mapping[int, int],
    *,
    source: Source,
    u_random_j: float,
    u_systematic_j: float,
    contrast_j: float,
    tick_s: float | None,
) -> tuple[StepEnergy, ...]:
    """The energy of each kind of step, and of each step; both sum to the total exactly.

    steps: (kind, duration in ns), in order. marks: where the meters were looked at on the way: the
    energy in microjoules from the begin to the end of step i. Between two looks the energy is
    measured; within, steps share it by duration. A kind is `measured` when no look-to-look stretch
    mixes it with another and it lasted a tick or more, otherwise `shared`.

    u (k = 2) has three parts: the systematic one, in proportion; the random one of the total, once
    per run of a measured kind, as each has edges of its own, or in proportion; and f (1 - f) D in
    every stretch that mixes kinds, with f the kind's part of its time and D the stretch's part of
    `contrast_j` by time: two kinds differ in power by at most about what working adds. These add
    linearly, as the kind that draws more does so in every stretch.
    """
    whole_ns = sum(duration_ns for _, duration_ns in steps)
    if whole_ns <= 0:
        return ()
    kinds = _kinds(gross_uj, steps, marks, contrast_j, whole_ns)
    shared = []
    for kind, entry in kinds.items():
        fraction = entry.duration_ns / whole_ns
        resolved = tick_s is None or entry.duration_ns >= tick_s * 1e9
        measured = source == "measured" and entry.pure and (resolved or len(kinds) == 1)
        random_j = u_random_j * (math.sqrt(entry.runs) if measured else fraction)
        energy_uj = sum(entry.each_uj)
        systematic_j = u_systematic_j * (abs(energy_uj / gross_uj) if gross_uj else fraction)
        listed = len(entry.each_uj) <= EACH_LIMIT
        shared.append(
            StepEnergy(
                kind=kind,
                energy_uj=energy_uj,
                u_j=math.hypot(random_j, systematic_j, entry.contrast_j),
                method="measured" if measured else "shared",
                each_uj=tuple(entry.each_uj) if listed else (),
                each_method="measured" if measured and entry.alone else "shared",
            )
        )
    return tuple(shared)


def _kinds(
    gross_uj: int,
    steps: Sequence[tuple[str, int]],
    marks: Mapping[int, int],
    contrast_j: float,
    whole_ns: int,
) -> dict[str, _Kind]:
    """What the stretches between looks say of each kind of step."""
    kinds: dict[str, _Kind] = {}
    last = None
    for first, stop, energy_uj in _stretches(gross_uj, len(steps), marks):
        part = steps[first:stop]
        durations = [duration_ns for _, duration_ns in part]
        if not any(durations):
            durations = [1] * len(part)
        times: dict[str, int] = {}
        for (kind, duration_ns), uj in zip(
            part, largest_remainder(energy_uj, durations), strict=True
        ):
            entry = kinds.setdefault(kind, _Kind(0, []))
            entry.duration_ns += duration_ns
            entry.each_uj.append(uj)
            entry.alone = entry.alone and len(part) == 1
            entry.runs += kind != last
            last = kind
            times[kind] = times.get(kind, 0) + duration_ns
        if len(times) > 1:
            stretch_ns = max(1, sum(times.values()))
            for kind, duration_ns in times.items():
                f = duration_ns / stretch_ns
                kinds[kind].pure = False
                kinds[kind].contrast_j += f * (1 - f) * contrast_j * stretch_ns / whole_ns
    return kinds


def _stretches(gross_uj: int, count: int, marks: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """(first step, one past the last, microjoules) between looks; the last takes the rest."""
    cuts = sorted(index for index in marks if 0 <= index < count - 1)
    stretches = []
    first = before_uj = 0
    for index in cuts:
        stretches.append((first, index + 1, marks[index] - before_uj))
        first, before_uj = index + 1, marks[index]
    return [*stretches, (first, count, gross_uj - before_uj)]


class RequestShares:
    """Concurrent requests share what was measured by the work that each did meanwhile.

    Add one window after the other: its energy, and the work (tokens, pixels, seconds) of every
    request that was served in it. What was spent while nothing was served stays `unattributed_uj`.
    `sum(shares) + unattributed == total`, exactly, for any schedule.

    >>> shares = RequestShares()
    >>> shares.add(10, {"a": 1})
    >>> shares.add(10, {"a": 1, "b": 2})
    >>> shares.by_request, shares.unattributed_uj
    ({'a': 13, 'b': 7}, 0)
    """

    def __init__(self) -> None:
        self.by_request: dict[Hashable, int] = {}
        """Microjoules by request."""
        self.unattributed_uj = 0

    def add(self, energy_uj: int, work: Mapping[Hashable, float]) -> None:
        """Share one window. Raises ValueError for negative or non-finite work."""
        if not any(work.values()):
            self.unattributed_uj += energy_uj
            return
        parts = largest_remainder(energy_uj, list(work.values()))
        for request, part in zip(work, parts, strict=True):
            self.by_request[request] = self.by_request.get(request, 0) + part

    def finish(self, request: Hashable) -> int:
        """Take a finished request's microjoules out; 0 for one that did no work."""
        return self.by_request.pop(request, 0)

    @property
    def total_uj(self) -> int:
        """All that was added and not taken out."""
        return sum(self.by_request.values()) + self.unattributed_uj


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """CPU time up to now: of this process, and of everything on the machine."""

    own_s: float
    busy_s: float | None
    """User, nice, system and interrupts over all CPUs; None where /proc/stat cannot be read."""


def cpu_times(root: Path = Path("/")) -> CpuTimes:
    """Both clocks now; takes some 50 us."""
    try:
        with (root / "proc/stat").open("rb") as file:
            fields = file.readline().split()
        user, nice, system, _, _, irq, softirq = map(int, fields[1:8])
    except (OSError, ValueError):
        busy_s = None
    else:
        busy_s = (user + nice + system + irq + softirq) * USER_HZ_S
    return CpuTimes(clock.process_cpu_ns() / 1e9, busy_s)


def process_share(
    before: CpuTimes, after: CpuTimes, marginal_uj: int | None, marginal_u_j: float | None
) -> dict[str, Any] | None:
    """This process's part of the marginal energy on a machine that others use too.

    By CPU time, which assumes that a second of theirs draws what a second of ours does: with s our
    share, u = sqrt((s u_marginal)^2 + (s (1 - s) marginal)^2 + (2 du marginal)^2), du the
    resolution of /proc/stat. An attribution, not a measurement. None where it cannot be told.
    """
    if before.busy_s is None or after.busy_s is None or marginal_uj is None:
        return None
    own_s = after.own_s - before.own_s
    busy_s = max(after.busy_s - before.busy_s, own_s)
    if busy_s <= 0:
        return None
    share = own_s / busy_s
    marginal_j = marginal_uj / 1e6
    coarse = min(1.0, USER_HZ_S / busy_s) * share
    return {
        "method": "cpu-time share",
        "share": share,
        "marginal_j": round(share * marginal_uj) / 1e6,
        "u_j": math.hypot(
            share * (marginal_u_j or 0.0), share * (1 - share) * marginal_j, 2 * coarse * marginal_j
        ),
    }
