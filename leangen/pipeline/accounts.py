"""Whose joules are they? One window over a whole pipeline, shared among its parts.

The meters are looked at where one part ends and the next begins, if their tick allows; parts that
no look tells apart share what they spent together by time (`attribution.share_steps`). Every
meter's microjoules are split whole, so the parts' receipts add up to the pipeline's exactly. The
parts' receipts are what goes on the account: the pipeline's is their sum and counts nothing twice.
"""

from __future__ import annotations

import math
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from leangen import energy, host
from leangen.attribution import largest_remainder
from leangen.engine import Engine
from leangen.meters import Selection
from leangen.receipts import Measured, latency_of
from leangen.records import Energy, MeterWindow, Output, Receipt, Runtime, StepEnergy, Units

_HOW = {"measured": "between two looks at the meters", "shared": "shared by time"}


@dataclass(slots=True)
class Leg:
    """One part's run within a pipeline's window."""

    name: str
    engine: Engine
    request: Any
    started_at: str
    begin_ns: int
    """Since the window began."""
    steps: list[tuple[str, float, int]] = field(default_factory=list)
    """(kind, units, duration in ns)"""
    counts: Counter[str] = field(default_factory=Counter)
    output: Output | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What was observed of one run of a pipeline; every leg has a step."""

    legs: Sequence[Leg]
    started_at: str
    begin_boottime_ns: int
    duration_ns: int
    windows: Sequence[MeterWindow]
    marks: Mapping[int, int]
    """Microjoules up to the end of a step, by its index among the steps of all legs."""


def settle(
    run: Run,
    *,
    name: str,
    digest: str,
    request: Mapping[str, Any],
    selection: Selection,
    baseline: energy.Baseline | None,
) -> Receipt:
    """The pipeline's receipt, with those of its parts. Its units are the last part's."""
    identity, legs = uuid.uuid4().hex, run.legs
    units = sum(count for _, count, _ in legs[-1].steps)
    whole = energy.account(
        run.windows,
        scope=selection.scope,
        reason=selection.reason,
        duration_ns=run.duration_ns,
        baseline=baseline,
        units=units,
        steps=[(leg.name, step_ns) for leg in legs for _, _, step_ns in leg.steps],
        marks=run.marks,
    )
    parts = _parts(run, whole, {"id": identity, "name": name})
    whole = _sum(whole, legs, parts)
    last = parts[-1]
    # The first unit is the last part's; what the others finished on the way is not what was asked.
    steps = [(kind, 0.0, step_ns) for leg in legs[:-1] for kind, _, step_ns in leg.steps]
    return Receipt(
        id=identity,
        started_at=run.started_at,
        duration_ns=run.duration_ns,
        host=last.host,
        model=name,
        scheme="+".join(part.scheme for part in parts),
        bundle=digest,
        family="pipeline",
        request=request,
        units=Units(kind=last.units.kind, count=units, prompt=parts[0].units.prompt),
        energy=whole,
        latency=latency_of([*steps, *legs[-1].steps], run.duration_ns),
        carbon=legs[-1].engine.footprint.of(
            whole.gross_j,
            whole.u_j,
            started_at=run.started_at,
            duration_s=run.duration_ns / 1e9,
            units=units,
        ),
        peak_rss_bytes=host.peak_rss_bytes(),
        runtime=Runtime(
            provider=last.runtime.provider,
            threads=last.runtime.threads,
            kernels="+".join(dict.fromkeys(part.runtime.kernels for part in parts)),
            reasons={
                f"{leg.name}: {what}": why
                for leg, part in zip(legs, parts, strict=True)
                for what, why in part.runtime.reasons.items()
            },
            versions=last.runtime.versions,
        ),
        tag=last.tag,
        begin_boottime_ns=run.begin_boottime_ns,
        parts=tuple(parts),
    )


def _parts(run: Run, whole: Energy, pipeline: Mapping[str, Any]) -> list[Receipt]:
    """The receipt of each leg, by its engine; one begins where the one before ends."""
    shares = {step.kind: step for step in whole.steps}
    edges_ns = [0, *(leg.begin_ns for leg in run.legs[1:]), run.duration_ns]
    windows = _split(run.windows, [shares.get(leg.name) for leg in run.legs])
    receipts, first = [], 0
    for index, (leg, own) in enumerate(zip(run.legs, windows, strict=True)):
        begin_ns, end_ns = edges_ns[index : index + 2]
        last = first + len(leg.steps) - 1
        # Looks inside a part tell of its steps where there was one when it began.
        before_uj = 0 if first == 0 else run.marks.get(first - 1)
        marks = {
            place - first: spent_uj - before_uj
            for place, spent_uj in run.marks.items()
            if before_uj is not None and first <= place < last
        }
        how = _HOW[shares[leg.name].method] if leg.name in shares else "none of it known"
        measured = Measured(
            started_at=leg.started_at,
            begin_boottime_ns=run.begin_boottime_ns + begin_ns,
            duration_ns=end_ns - begin_ns,
            windows=own,
            steps=leg.steps,
            marks=marks,
            counts=leg.counts,
            note=f"its part of a pipeline's window, {how}",
        )
        receipt = leg.engine.receipt(leg.request, leg.output, measured)
        request = {**receipt.request, "pipeline": {**pipeline, "part": leg.name}}
        receipts.append(replace(receipt, request=request))
        first = last + 1
    return receipts


def _split(
    windows: Sequence[MeterWindow], shares: Sequence[StepEnergy | None]
) -> list[tuple[MeterWindow, ...]]:
    """Each part's windows; without figures where the whole has none."""
    known = [share for share in shares if share is not None]
    if len(known) != len(shares):
        blank = [
            replace(window, energy_uj=None, u_random_j=None, u_systematic_j=None)
            for window in windows
        ]
        return [tuple(blank)] * len(shares)
    weights = [max(0, share.energy_uj) for share in known]
    weights = weights if any(weights) else [1] * len(known)
    random_j = math.hypot(*(window.u_random_j or 0.0 for window in windows))
    systematic_j = math.fsum(window.u_systematic_j or 0.0 for window in windows)
    parts: list[list[MeterWindow]] = [[] for _ in known]
    for window in windows:
        split_uj = largest_remainder(window.energy_uj or 0, weights)
        for own, share, weight, part_uj in zip(parts, known, weights, split_uj, strict=True):
            fraction = weight / sum(weights)
            # What of the part's u is not systematic, over the meters as their own random parts are.
            rest_j = math.sqrt(max(0.0, share.u_j**2 - (systematic_j * fraction) ** 2))
            own.append(
                replace(
                    window,
                    energy_uj=part_uj,
                    u_random_j=rest_j * (window.u_random_j or 0.0) / random_j if random_j else 0.0,
                    u_systematic_j=(window.u_systematic_j or 0.0) * fraction,
                    terms={name: term * fraction for name, term in window.terms.items()},
                )
            )
    return [tuple(own) for own in parts]


def _sum(whole: Energy, legs: Sequence[Leg], parts: Sequence[Receipt]) -> Energy:
    """The whole with a line per part, its own receipt's figure; idle is what theirs add up to."""
    steps = {step.kind: step for step in whole.steps}
    lines = tuple(
        replace(steps[leg.name], energy_uj=part.energy.gross_uj, each_uj=())
        for leg, part in zip(legs, parts, strict=True)
        if leg.name in steps and part.energy.gross_uj is not None
    )
    idle = [part.energy.idle_uj for part in parts if part.energy.idle_uj is not None]
    if whole.gross_uj is None or whole.idle_uj is None or len(idle) < len(parts):
        return replace(whole, steps=lines)
    return replace(whole, steps=lines, idle_uj=sum(idle), marginal_uj=whole.gross_uj - sum(idle))
