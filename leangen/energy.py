"""From windows to an energy figure: totals, idle and marginal, per unit, per kind of step.

Pure functions over records. Uncertainties follow the GUM (JCGM 100:2008) with coverage factor
k = 2. Every u has two parts, because they add differently:

- random (edges, jitter, spread of the baseline): independent, so they add in quadrature;
- systematic (the sensor's class, the model of an estimate): the meters of one machine may all be
  off the same way, so they add linearly over meters.

A difference of two figures of the same meters, such as gross - idle, shares its systematic part
(one gain on both), so there it subtracts: u_sys(marginal) = |u_sys(gross) - u_sys(idle)|. The
estimate's ±60% is such a common factor too: gross, idle and marginal are each known to 60%.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from leangen.attribution import CpuTimes, process_share, share_steps
from leangen.records import Energy, MeterWindow, Source

FAULTS = {
    "ambiguous": "ambiguous: the counter may have wrapped unseen in so long an interval, or it did "
    "not move in one too short to tell a stuck counter from a slow one",
    "clock": "the monotonic clock went backwards",
    "forked": "the window was begun in another process: this one was forked from it",
    "garbage": "the sensor gave something that is not a count",
    "jump": "the counter rose by more than the hardware can draw",
    "lost": "the GPU was lost",
    "older": "the sensor gave an older value than before",
    "permission": "the permission to read was lost",
    "reset": "the counter started anew, and no wrap explains it",
    "stuck": "the counter did not move",
    "suspended": "the machine was suspended meanwhile",
    "unreadable": "the read failed",
    "vanished": "the sensor vanished",
}
"""Why a window has no figure: the closed list of `MeterWindow.faults`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """The idle power of a scope: what it draws while the model is loaded and nothing runs."""

    power_w: float
    u_random_w: float
    """k=2, as a prediction for one more idle interval: spread included."""
    u_systematic_w: float
    """k=2, common with whatever the same meters measure later."""
    duration_s: float
    """How long it was observed; 0 for a model's own constant."""
    scope: tuple[str, ...]
    how: str

    @property
    def u_w(self) -> float:
        """Both parts together, k=2."""
        return math.hypot(self.u_random_w, self.u_systematic_w)

    def to_json(self) -> dict[str, Any]:
        """The receipt's `energy.baseline`."""
        return asdict(self) | {"scope": list(self.scope)}


def account(
    windows: Sequence[MeterWindow],
    *,
    scope: tuple[str, ...],
    reason: str | None,
    duration_ns: int,
    baseline: Baseline | None,
    units: float,
    steps: Sequence[tuple[str, int]] = (),
    marks: Mapping[int, int] | None = None,
    cpu: tuple[CpuTimes, CpuTimes] | None = None,
) -> Energy:
    """The energy of one generation from the windows of disjoint meters.

    `windows` are in the order of `scope`. `steps` are (kind, duration in ns), in the order they
    ran, `marks` the microjoules up to the end of a step where the meters were looked at: see
    `attribution.share_steps`. `cpu` are the CPU times at begin and end, for this process's share
    of the marginal. With a faulted window, or none at all, the total is None and `reason` says
    why: the figures of the other meters stay visible in `meters`, but a part is never passed off as
    the whole.

    Raises ValueError for windows of more than one source: an estimate is never added to a
    measurement.
    """
    reasons = [reason] if reason else []
    if not windows or any(window.energy_uj is None for window in windows):
        return _unavailable(windows, scope, reasons)
    source = _one_source(windows)
    gross_uj = sum(window.energy_uj or 0 for window in windows)
    u_random_j = math.hypot(*(window.u_random_j or 0.0 for window in windows))
    u_systematic_j = math.fsum(window.u_systematic_j or 0.0 for window in windows)
    u_j = math.hypot(u_random_j, u_systematic_j)
    reasons += _unresolved(windows, duration_ns)
    idle_uj = idle_u_j = marginal_uj = marginal_u_j = None
    if baseline is None:
        reasons.append("no idle baseline was measured: idle and marginal are unknown")
    elif baseline.scope != scope:
        reasons.append(
            f"the idle baseline covers {', '.join(baseline.scope)}: idle and marginal are unknown"
        )
    else:
        duration_s = duration_ns / 1e9
        idle_uj = round(baseline.power_w * duration_ns / 1e3)
        idle_u_j = baseline.u_w * duration_s
        marginal_uj = gross_uj - idle_uj
        marginal_u_j = math.hypot(
            u_random_j,
            baseline.u_random_w * duration_s,
            u_systematic_j - baseline.u_systematic_w * duration_s,
        )
    contrast_uj = gross_uj if marginal_uj is None else marginal_uj
    return Energy(
        source=source,
        scope=scope,
        reason="; ".join(reasons) or None,
        gross_uj=gross_uj,
        u_random_j=u_random_j,
        u_systematic_j=u_systematic_j,
        u_j=u_j,
        idle_uj=idle_uj,
        idle_u_j=idle_u_j,
        marginal_uj=marginal_uj,
        marginal_u_j=marginal_u_j,
        per_unit_j=gross_uj / 1e6 / units if units > 0 else None,
        per_unit_u_j=u_j / units if units > 0 else None,
        meters=tuple(windows),
        steps=share_steps(
            gross_uj,
            steps,
            marks or {},
            source=source,
            u_random_j=u_random_j,
            u_systematic_j=u_systematic_j,
            contrast_j=abs(contrast_uj) / 1e6,
            tick_s=max((w.tick_s for w in windows if w.tick_s is not None), default=None),
        ),
        baseline=None if idle_uj is None or baseline is None else baseline.to_json(),
        attribution=process_share(*cpu, marginal_uj, marginal_u_j) if cpu else None,
    )


def _unresolved(windows: Sequence[MeterWindow], duration_ns: int) -> list[str]:
    return [
        f"{window.sensor}: the interval of {duration_ns / 1e6:.3g} ms is shorter than its tick of "
        f"{window.tick_s * 1e3:.3g} ms, so it is hardly resolved"
        for window in windows
        if window.tick_s is not None and duration_ns < window.tick_s * 1e9
    ]


def _unavailable(
    windows: Sequence[MeterWindow], scope: tuple[str, ...], reasons: list[str]
) -> Energy:
    """No total, and why: what is known already, and each meter's faults."""
    faults = [
        f"{window.sensor}: {'; '.join(FAULTS.get(fault, fault) for fault in window.faults)}"
        for window in windows
        if window.energy_uj is None
    ]
    if not windows and not reasons:
        reasons = ["there is no meter"]
    return Energy(
        source="unavailable",
        scope=scope,
        reason="; ".join([*reasons, *faults]),
        gross_uj=None,
        meters=tuple(windows),
    )


def _one_source(windows: Sequence[MeterWindow]) -> Source:
    sources = {window.source for window in windows}
    if len(sources) != 1:
        raise ValueError(
            f"windows of several sources ({', '.join(sorted(sources))}) cannot form one total"
        )
    return sources.pop()
