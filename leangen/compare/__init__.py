"""`leangen compare`: one model at several schemes, quality against cost.

Every scheme runs in a process of its own. After warming up, each round generates with all of them
once, in a new random order; figures of the same round are paired. Quality is measured afterwards,
so that it adds to nobody's peak memory. Where joules are only an estimate, which follows time and
knows nothing of the instructions that ran, time is compared in their place, and said so.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from leangen import benchmark, environment, quality
from leangen.bundle import Bundle
from leangen.compare import paired
from leangen.compare.paired import Ratio
from leangen.compare.worker import Worker
from leangen.console import Progress, with_u
from leangen.errors import RequestError
from leangen.quality import Measure, Task
from leangen.records import Receipt
from leangen.session import Session

LEAST_ROUNDS = 3
_RUNNING = ("threads", "activations", "kernels", "kv")
"""Options of `leangen.load` that what is judged must share with what is timed."""
COUNTED = ("measured", "integrated")
"""Sources of energy that can prove a difference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One scheme."""

    label: str
    bundle: Bundle
    summary: Mapping[str, Any]
    """As `benchmark.summarise`; its peak memory is of a process with this model alone."""
    costs: Sequence[float]
    """What was compared, per round: joules or seconds per unit."""
    own_relative_u: float
    """Mean random part of a round's cost beyond what shows as scatter (k = 2)."""
    quality: Sequence[Measure]
    """The loss first; empty for the reference."""
    on_front: bool = False

    @property
    def bits(self) -> float:
        """Bits per weight on disk."""
        return float(self.bundle.quantization.get("bits_per_weight", 32.0))

    @property
    def loss(self) -> float:
        """The family's first measure; 0 for the reference."""
        return self.quality[0].value if self.quality else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dict(self.summary) | {
            "label": self.label,
            "digest": self.bundle.digest,
            "size_bytes": self.bundle.size_bytes,
            "bits_per_weight": self.bits,
            "costs": list(self.costs),
            "quality": [measure.to_json() for measure in self.quality],
            "on_front": self.on_front,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What was found; `rows[0]` is the reference."""

    rows: Sequence[Row]
    cost: str
    """`energy` or `time`: what was compared."""
    cost_reason: str
    ratios: Sequence[Ratio]
    """Every pair, the one of fewer bits against the one of more."""
    findings: Sequence[str]
    order: Sequence[Sequence[str]]
    """The order of each round."""
    notes: Sequence[str]

    @property
    def unit(self) -> str:
        """The unit of work, such as `token`."""
        return str(self.rows[0].summary["unit"])

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "model": self.rows[0].bundle.name,
            "reference": self.rows[0].label,
            "cost": self.cost,
            "cost_reason": self.cost_reason,
            "rows": [row.to_json() for row in self.rows],
            "ratios": [found.to_json() for found in self.ratios],
            "findings": list(self.findings),
            "order": [list(names) for names in self.order],
            "notes": list(self.notes),
        }


def compare(
    bundles: Mapping[str, Bundle],
    *,
    task: Task,
    prompt: Any,
    options: Mapping[str, Any],
    loading: Mapping[str, Any],
    rounds: int,
    precision: float,
    progress: Progress,
    seed: int = 0,
) -> Comparison:
    """Measure and judge the bundles, by label; the first is the reference of quality.

    options: of one generation, the family's example where there are none. loading: options of
    `leangen.load`. precision: wanted relative u of a window's edges. Raises RequestError for fewer
    than two bundles or three rounds.
    """
    if len(bundles) < 2:
        raise RequestError(f"{', '.join(bundles)} given: expected two or more schemes to compare")
    if rounds < LEAST_ROUNDS:
        raise RequestError(f"rounds is {rounds}, expected {LEAST_ROUNDS} or more for an interval")
    if not 0 < precision < 1:
        raise RequestError(f"precision is {precision:g}, expected a share such as 0.05, or 5%")
    before = environment.conditions()
    receipts, order, notes = _measure(
        bundles, prompt, options, loading, rounds, precision, progress, random.Random(seed)
    )
    running = {name: value for name, value in loading.items() if name in _RUNNING}
    sessions = [Session(bundle, **running) for bundle in bundles.values()]
    judged = quality.evaluate(sessions[1:], sessions[0], task, progress)
    notes = [*environment.warnings(before), *notes]
    if (environment.conditions()["throttled"] or 0) > (before["throttled"] or 0):
        notes.append("the CPU throttled during the run")
    return conclude(bundles, receipts, [[], *judged], order, notes)


def conclude(
    bundles: Mapping[str, Bundle],
    receipts: Mapping[str, Sequence[Receipt]],
    judged: Sequence[Sequence[Measure]],
    order: Sequence[Sequence[str]] = (),
    notes: Sequence[str] = (),
) -> Comparison:
    """What the receipts of paired rounds and the measures say; pure."""
    sources = {r.energy.source for group in receipts.values() for r in group}
    counted = len(sources) == 1 and sources <= set(COUNTED)
    cost = "energy" if counted else "time"
    rows = []
    for (label, bundle), measures in zip(bundles.items(), judged, strict=True):
        group = receipts[label]
        rows.append(
            Row(
                label=label,
                bundle=bundle,
                summary=benchmark.summarise(group),
                costs=[_cost(receipt, counted) for receipt in group],
                own_relative_u=float(np.mean([_own_u(r) for r in group])) if counted else 0.0,
                quality=measures,
            )
        )
    costs = [float(np.median(row.costs)) for row in rows]
    best = paired.front(costs, [row.loss for row in rows])
    rows = [replace(row, on_front=on) for row, on in zip(rows, best, strict=True)]
    ratios = [_ratio(a, b) for a, b in _pairs(rows)]
    unit = rows[0].summary["unit"]
    return Comparison(
        rows=rows,
        cost=cost,
        cost_reason=_cost_reason(rows, counted, sources),
        ratios=ratios,
        findings=_findings(rows, ratios, f"{cost} per {unit}"),
        order=order,
        notes=notes,
    )


def orders(labels: Sequence[str], rounds: int, shuffled: random.Random) -> list[list[str]]:
    """A random order for each round, in which all take every place equally often.

    As many rounds as there are labels are the rotations of one random order, themselves shuffled.
    """
    found: list[list[str]] = []
    while len(found) < rounds:
        drawn = shuffled.sample(labels, len(labels))
        turns = [drawn[place:] + drawn[:place] for place in range(len(drawn))]
        found += shuffled.sample(turns, len(turns))
    return found[:rounds]


def _measure(
    bundles: Mapping[str, Bundle],
    prompt: Any,
    options: Mapping[str, Any],
    loading: Mapping[str, Any],
    rounds: int,
    precision: float,
    progress: Progress,
    shuffled: random.Random,
) -> tuple[dict[str, list[Receipt]], list[list[str]], list[str]]:
    """Receipts by label, one a round; the order of each round; what was not as it should be."""
    notes = []
    receipts: dict[str, list[Receipt]] = {label: [] for label in bundles}
    with ExitStack() as running:
        workers, inside = {}, {}
        for done, (label, bundle) in enumerate(bundles.items()):
            progress(done, len(bundles), f"warming up {label}")
            worker = Worker(
                label, bundle.path.resolve(), loading=loading, prompt=prompt, options=options
            )
            workers[label] = running.enter_context(worker)
            receipt, _, steady = workers[label].warm_up()
            inside[label] = benchmark.plan(receipt, precision)["repeats_per_window"]
            if not steady:
                notes.append(f"{label} was not steady after {benchmark.WARM_UP_LIMIT} generations")
        order = orders(list(bundles), rounds, shuffled)
        for done, names in enumerate(order):
            for label in names:
                progress(done, rounds, f"round {done + 1} of {rounds}: {label}")
                receipts[label].append(workers[label].repeat(inside[label]))
    return receipts, order, notes


def _cost(receipt: Receipt, counted: bool) -> float:
    spent = receipt.energy.gross_j if counted else receipt.duration_ns / 1e9
    return float(spent or 0.0) / receipt.units.count


def _own_u(receipt: Receipt) -> float:
    energy = receipt.energy
    return (energy.u_random_j or 0.0) / energy.gross_j if energy.gross_j else 0.0


def _pairs(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Every two rows, the one of fewer bits first; those with the reference before the others."""
    found = []
    for index, base in enumerate(rows):
        for other in rows[index + 1 :]:
            found.append((other, base) if other.bits <= base.bits else (base, other))
    return found


def _ratio(other: Row, base: Row) -> Ratio:
    return paired.ratio(
        other.label,
        base.label,
        other.costs,
        base.costs,
        own_relative_u=float(np.hypot(other.own_relative_u, base.own_relative_u)),
    )


def _findings(rows: Sequence[Row], ratios: Sequence[Ratio], cost: str) -> list[str]:
    """Sentences: what every two schemes cost, then where quality does not differ."""
    reference = rows[0].label
    bits = {row.label: row.bits for row in rows}
    found = [
        paired.told(one, cost, lower_precision=bits[one.other] < bits[one.base]) for one in ratios
    ]
    for row in rows[1:]:
        for m in row.quality:
            if m.name.endswith(" change") and m.u is not None and abs(m.value) <= m.u:
                found.append(
                    f"{row.label} and {reference}: no significant {m.name} "
                    f"({with_u(m.value, m.u, m.unit).strip()}, {m.n} {m.of})"
                )
    return found


def _cost_reason(rows: Sequence[Row], counted: bool, sources: Set[str]) -> str:
    reason = rows[0].summary["energy_reason"]
    if counted:
        return f"energy is {' and '.join(sorted(sources))}: the meter's gain cancels in a ratio"
    if sources == {"estimated"}:
        return (
            "joules are an estimate here, which proves nothing about a difference between schemes: "
            f"time is compared ({reason})"
        )
    return f"joules are not known of every run: time is compared ({reason})"
