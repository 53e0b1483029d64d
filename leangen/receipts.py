"""From what was observed of a generation to its receipt."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from leangen import carbon, energy, host
from leangen.attribution import CpuTimes
from leangen.meters import Selection
from leangen.records import Energy, Latency, MeterWindow, Output, Receipt, Runtime, Units
from leangen.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was observed of one window of work."""

    started_at: str
    begin_boottime_ns: int | None
    """None when the figures are a share of windows that other requests had too."""
    duration_ns: int
    windows: Sequence[MeterWindow]
    steps: Sequence[tuple[str, float, int]]
    """(kind, units, duration in ns)"""
    marks: Mapping[int, int] = field(default_factory=dict)
    """Microjoules up to the end of a step, by its index."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Sums of the steps' counts."""
    cpu: tuple[CpuTimes, CpuTimes] | None = None
    repeats: int = 1
    """Generations within the window."""
    own_ns: int | None = None
    """The part of the time that is this request's, where it shared the machine with others."""
    busy_ns: Sequence[int] | None = None
    """The computing time of each step, where it is less than the step took."""
    note: str | None = None
    """How the figures were shared."""
    receipt_id: str = field(default_factory=lambda: uuid.uuid4().hex)


def receipt_of(
    measured: Measured,
    *,
    session: Session,
    request: Any,
    output: Output | None,
    unit: str,
    selection: Selection,
    baseline: energy.Baseline | None,
    footprint: carbon.Footprint,
    tag: str | None,
) -> Receipt:
    """The receipt of a request; `output` is None for a generation that was ended early.

    unit: what the family counts, such as `token`.
    selection: the meters whose windows were `measured`.
    """
    bundle = session.bundle
    count = sum(units for _, units, _ in measured.steps)
    repeated = {"repeats": measured.repeats} if measured.repeats > 1 else {}
    spent = _energy(measured, selection, baseline, count)
    return Receipt(
        id=measured.receipt_id,
        started_at=measured.started_at,
        duration_ns=measured.duration_ns,
        host=host.host(device=session.device.name),
        model=bundle.name,
        scheme=bundle.scheme,
        bundle=bundle.digest,
        family=bundle.family,
        request={**request.describe(), **repeated},
        units=Units(
            kind=unit,
            count=count,
            prompt=output.prompt_units * measured.repeats if output is not None else 0,
            counts=dict(measured.counts),
        ),
        energy=spent,
        latency=latency_of(measured.steps, measured.duration_ns, measured.repeats),
        carbon=footprint.of(
            spent.gross_j,
            spent.u_j,
            started_at=measured.started_at,
            duration_s=measured.duration_ns / 1e9,
            units=count,
        ),
        peak_rss_bytes=host.peak_rss_bytes(),
        runtime=Runtime(
            provider=session.provider,
            threads=session.threads,
            kernels=session.kernels,
            reasons=session.reasons,
            versions=host.versions(),
        ),
        tag=tag,
        begin_boottime_ns=measured.begin_boottime_ns,
    )


def _energy(
    measured: Measured, selection: Selection, baseline: energy.Baseline | None, units: float
) -> Energy:
    steps_ns = measured.busy_ns or [step_ns for _, _, step_ns in measured.steps]
    spent = energy.account(
        measured.windows,
        scope=selection.scope,
        reason="; ".join(filter(None, (selection.reason, measured.note))) or None,
        duration_ns=measured.duration_ns if measured.own_ns is None else measured.own_ns,
        baseline=baseline,
        units=units,
        steps=list(zip((kind for kind, _, _ in measured.steps), steps_ns, strict=True)),
        marks=measured.marks,
        cpu=measured.cpu,
    )
    if measured.own_ns is None:
        return spent
    steps = [replace(step, method="shared", each_method="shared") for step in spent.steps]
    return replace(spent, steps=tuple(steps))


def latency_of(
    steps: Sequence[tuple[str, float, int]], duration_ns: int, repeats: int = 1
) -> Latency:
    """Total of one generation, time to the first unit, and the spread of the steps after it."""
    done_ns = 0
    ttft_s = None
    first = 0
    for index, (_, units, step_ns) in enumerate(steps):
        done_ns += step_ns
        if units > 0:
            ttft_s = done_ns / 1e9
            first = index
            break
    later = [step_ns for _, _, step_ns in steps[first + 1 :]] or [ns for _, _, ns in steps]
    # As np.percentile does it, which imports numpy.ma: 8 ms of the first token.
    p50, p95 = np.interp([0.5, 0.95], np.linspace(0, 1, len(later)), np.sort(later)) / 1e9
    return Latency(
        total_s=duration_ns / 1e9 / repeats,
        ttft_s=ttft_s,
        step_p50_s=float(p50),
        step_p95_s=float(p95),
    )
