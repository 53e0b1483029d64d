"""`leangen bench`: repeated generations of several models in random order.

Every model is warmed up until its times are steady, then each round runs all of them once in a
new random order, so that a drifting clock or a warming machine touches them alike.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from leangen import api, environment, meters
from leangen.console import print_json, progress_bar, say, table, with_u
from leangen.engine import Engine
from leangen.errors import RequestError
from leangen.records import COVERAGE_FACTOR, Receipt

WARM_UP_LIMIT = 8
STEADY_SPREAD = 0.05
PRECISION = 0.05
"""Wanted relative u (k = 2) of what the edges of a window leave open."""


def warm_up(engine: Engine, options: Mapping[str, Any]) -> tuple[Receipt, int, bool]:
    """Generate until three in a row lie within 5%: (the last receipt, how many, steady?)."""
    totals: list[float] = []
    while True:
        receipt = engine.generate(**options).receipt
        totals.append(receipt.latency.total_s)
        last = totals[-3:]
        steady = len(last) == 3 and (max(last) - min(last)) < STEADY_SPREAD * np.median(last)
        if steady or len(totals) == WARM_UP_LIMIT:
            return receipt, len(totals), bool(steady)


def summarise(receipts: Sequence[Receipt]) -> dict[str, Any]:
    """Medians with p5 and p95 over repeated generations, and joules per unit with its interval.

    The interval (k = 2) is two standard errors of the repeats in quadrature with the receipts' own
    random part, plus the systematic part, which repeating does not shrink.
    """
    first = receipts[0]
    units = np.array([r.units.count for r in receipts])
    totals = np.array([r.latency.total_s for r in receipts])
    spans = np.array([r.duration_ns / 1e9 for r in receipts])
    firsts = [r.latency.ttft_s for r in receipts if r.latency.ttft_s is not None]
    row: dict[str, Any] = {
        "model": first.model,
        "scheme": first.scheme,
        "unit": first.units.kind,
        "repeats": len(receipts),
        "units_median": float(np.median(units)),
        "total_s": _spread(totals),
        "units_per_s": _spread(units / spans),
        "ttft_s": _spread(firsts),
        "step_s": _spread([r.latency.step_p50_s for r in receipts if r.latency.step_p50_s]),
        "peak_rss_bytes": max(r.peak_rss_bytes for r in receipts),
        "energy_source": first.energy.source,
        "energy_reason": first.energy.reason,
    }
    joules = [r.energy.gross_j for r in receipts]
    known = [j for j in joules if j is not None]
    if len(known) < len(receipts) or not units.all():
        return row | {"gross_j": None, "j_per_unit": None, "j_per_unit_u": None}
    per_unit = np.array(known) / units
    n = len(per_unit)
    repeats_u = COVERAGE_FACTOR * per_unit.std(ddof=1) / math.sqrt(n) if n > 1 else 0.0
    own_u = np.mean([(r.energy.u_random_j or 0.0) / r.units.count for r in receipts]) / math.sqrt(n)
    systematic = np.mean([(r.energy.u_systematic_j or 0.0) / r.units.count for r in receipts])
    return row | {
        "gross_j": _spread(known),
        "j_per_unit": float(per_unit.mean()),
        "j_per_unit_u": float(math.hypot(repeats_u, own_u) + systematic),
    }


def plan(receipt: Receipt, precision: float) -> dict[str, Any]:
    """How many generations like that of `receipt` one window must hold, and what it will then know.

    precision: the wanted relative u (k = 2) of the edges. What the class of the sensor adds is not
    planned for: no repetition shrinks it, and it cancels in a comparison on one machine.
    """
    tick_s = receipt.energy.tick_s or 0.0
    duration_s = receipt.latency.total_s
    repeats = meters.plan_repeats(duration_s, tick_s, precision)
    gross_j = receipt.energy.gross_j
    systematic_j = receipt.energy.u_systematic_j
    return {
        "wanted_relative_u": precision,
        "duration_s": duration_s,
        "tick_s": tick_s,
        "repeats_per_window": repeats,
        "edges_relative_u": meters.edges_relative_u(repeats * duration_s, tick_s),
        "class_relative_u": systematic_j / gross_j if gross_j and systematic_j else None,
    }


def told(model: str, planned: Mapping[str, Any]) -> str:
    """The plan as a line for people."""
    systematic, edges = planned["class_relative_u"], 100 * planned["edges_relative_u"]
    return (
        f"{model}: for ±{planned['wanted_relative_u']:.3g} by edges, "
        f"{planned['repeats_per_window']} x {planned['duration_s'] * 1e3:.3g} ms in one window "
        f"(tick {planned['tick_s'] * 1e3:.3g} ms), which gives ±{edges:.2g}%"
        + (f"; the sensor's class adds ±{systematic:.0%} to all alike" if systematic else "")
    )


def _spread(values: Any) -> dict[str, float] | None:
    if len(values) == 0:
        return None
    p5, p50, p95 = np.percentile(values, [5, 50, 95])
    return {"p5": float(p5), "median": float(p50), "p95": float(p95)}


def run(
    models: Sequence[str],
    *,
    prompt: Any,
    options: Mapping[str, Any],
    repeats: int,
    precision: float = PRECISION,
    loading: Mapping[str, Any],
    as_json: bool,
) -> int:
    """Measure the models and print one table or one JSON document; 0 when all were measured.

    loading: options of `leangen.load`, the same for all.
    """
    if repeats < 1:
        raise RequestError(f"repeats is {repeats}, expected 1 or more")
    if not 0 < precision < 1:
        raise RequestError(f"precision is {precision:g}, expected a share such as 0.05, or 5%")
    before = environment.conditions()
    engines = [api.load_model(model, tag="bench", **loading) for model in models]
    requests = [engine.or_example(prompt, options) for engine in engines]
    warm: list[dict[str, Any]] = []
    receipts: list[list[Receipt]] = [[] for _ in engines]
    with progress_bar() as progress:
        for index, engine in enumerate(engines):
            progress(index, len(engines), f"warming up {models[index]}")
            receipt, count, steady = warm_up(engine, requests[index])
            warm.append({"warm_ups": count, "steady": steady, "plan": plan(receipt, precision)})
            if not as_json:
                say(told(models[index], warm[-1]["plan"]))
        order = random.Random(0)
        for done in range(repeats):
            for index in order.sample(range(len(engines)), len(engines)):
                progress(done, repeats, f"round {done + 1} of {repeats}: {models[index]}")
                inside = warm[index]["plan"]["repeats_per_window"]
                result = engines[index].repeat(inside, **requests[index])
                receipts[index].append(result.receipt)
    rows = [summarise(group) | warmed for group, warmed in zip(receipts, warm, strict=True)]
    after = environment.conditions()
    notes = environment.warnings(before)
    notes += [f"{r['model']}:{r['scheme']} was not steady" for r in rows if not r["steady"]]
    if (after["throttled"] or 0) > (before["throttled"] or 0):
        notes.append("the CPU throttled during the run")
    if as_json:
        print_json({"rows": rows, "before": before, "after": after, "notes": notes})
        return 0
    table(COLUMNS, [cells(row) for row in rows])
    for note in sorted({f"energy: {r['energy_reason'] or r['energy_source']}" for r in rows}):
        say(note)
    for note in notes:
        say(f"note: {note}")
    return 0


COLUMNS = ("model", "units/s (p5-p95)", "first unit", "total", "joules per unit", "peak memory")


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table that `run` prints."""
    rate, first, total = row["units_per_s"], row["ttft_s"], row["total_s"]
    return [
        f"{row['model']}:{row['scheme']}",
        f"{rate['median']:.4g} {row['unit']}s ({rate['p5']:.4g}-{rate['p95']:.4g})",
        f"{first['median'] * 1000:.0f} ms" if first else "",
        f"{total['median'] * 1000:.0f} ms ({total['p5'] * 1000:.0f}-{total['p95'] * 1000:.0f})",
        with_u(row["j_per_unit"], row["j_per_unit_u"], "J") + f" ({row['energy_source']})",
        f"{row['peak_rss_bytes'] / 1e6:.0f} MB",
    ]
