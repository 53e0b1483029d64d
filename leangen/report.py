"""What was measured, for people: the sums of a ledger, collected and as tables on a terminal.

Every figure is the ledger's own sum. Sources are never added up. `leangen.page` draws the same.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from leangen import clock
from leangen.carbon import JOULES_PER_KWH, SECONDS_PER_DAY, brains
from leangen.charts import si
from leangen.console import counted, figure, human_bytes, seconds, table, with_u
from leangen.errors import RequestError
from leangen.ledger import Ledger, Sum, total
from leangen.records import Receipt, joules

SOURCES = ("measured", "integrated", "estimated", "unavailable")
MOST_DAYS = 92
"""A longer trend goes by month."""
MOST_PERIODS = 14
"""Days or months listed on a terminal; the page has all."""
BAR_WIDTH = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """What a report shows; every figure is a sum of the ledger's."""

    by: Sequence[str]
    since: str | None
    first: str
    """The first day or month with a generation."""
    last: str
    made_at: str
    head: str
    """The ledger's head when the report was made."""
    totals: Sequence[Sum]
    """One per source."""
    groups: Sequence[Sum]
    trend: Sequence[Sum]
    """One per day, or month, and source."""
    period: str
    """`day` or `month`: what the trend goes by."""
    reasons: Mapping[str, str]
    """Why the last generation of a source was not measured."""
    budgets: Sequence[Mapping[str, Any]] = ()
    """As `budget.Spent.to_json` gives them."""

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types, energies in joules."""
        return {
            "by": list(self.by),
            "since": self.since,
            "first": self.first,
            "last": self.last,
            "made_at": self.made_at,
            "head": self.head,
            "totals": [row.to_json() | yardstick(row) for row in self.totals],
            "groups": [row.to_json() | yardstick(row) for row in self.groups],
            "trend": [row.to_json() for row in self.trend],
            "reasons": dict(self.reasons),
            "budgets": list(self.budgets),
        }


def summary(receipt: Receipt) -> str:
    """One line: units, seconds, joules with their error bar and how they were got, carbon."""
    energy, latency, units = receipt.energy, receipt.latency, receipt.units
    parts = [
        f"{counted(units.count, units.kind)} in {seconds(latency.total_s)}",
        *(f"{count} {name}" for name, count in units.counts.items() if count),
        f"first after {seconds(latency.ttft_s)}" if latency.ttft_s is not None else "",
        f"{with_u(energy.gross_j, energy.u_j, 'J')} ({energy.source})",
        f"{with_u(energy.per_unit_j, energy.per_unit_u_j, 'J')}/{units.kind}"
        if energy.per_unit_j is not None
        else "",
        _co2e(receipt.carbon.g) if receipt.carbon.g is not None else "",
        f"SCI {_co2e(receipt.carbon.sci_g_per_unit)}/{units.kind}"
        if receipt.carbon.sci_g_per_unit is not None
        else "",
        f"{human_bytes(receipt.peak_rss_bytes)} peak",
    ]
    lines = [" · ".join(part for part in parts if part)]
    lines += [
        f"  {part.request['pipeline']['part']} ({part.model}:{part.scheme}): {_work(part)}"
        for part in receipt.parts
    ]
    return "\n".join([*lines, *([energy.reason or ""] if energy.source != "measured" else [])])


def _co2e(grams: float) -> str:
    """`0.038 mgCO2e`, `0.11 gCO2e`, `1.2 kgCO2e`: two digits."""
    for unit, size_g in (("mg", 1e-3), ("g", 1.0)):
        if abs(grams) < 99.5 * size_g:
            return f"{grams / size_g:.2g} {unit}CO2e"
    return f"{grams / 1000:.2g} kgCO2e"


def _work(receipt: Receipt) -> str:
    """One part of a pipeline: units, seconds, joules."""
    energy, units = receipt.energy, receipt.units
    return " · ".join(
        [
            f"{counted(units.count, units.kind)} in {seconds(receipt.latency.total_s)}",
            with_u(energy.gross_j, energy.u_j, "J"),
        ]
    )


def overview(
    ledger: Ledger,
    *,
    by: Sequence[str] = ("model", "scheme"),
    since: str | None = None,
    budgets: Sequence[Mapping[str, Any]] = (),
) -> Overview | None:
    """Collect the sums; None when no generation started since day `since` (`since_day` reads it).

    Raises RequestError for a `by` that the ledger does not have.
    """
    groups = ledger.summary(by, since=since)
    if not groups:
        return None
    days = ledger.summary(("day",), since=since)
    seen = [str(row.group["day"]) for row in days]
    long = date.fromisoformat(seen[-1]) - date.fromisoformat(seen[0]) >= timedelta(days=MOST_DAYS)
    period = "month" if long else "day"
    trend = ledger.summary((period,), since=since) if long else days
    sources = sorted({row.source for row in groups}, key=SOURCES.index)
    return Overview(
        by=tuple(by),
        since=since,
        first=seen[0],
        last=seen[-1],
        made_at=clock.utc_now(),
        head=ledger.head(),
        totals=[total([row for row in groups if row.source == s], {}) for s in sources],
        groups=groups,
        trend=list(over_units(trend)),
        period=period,
        reasons={s: reason for s in sources if s != "measured" and (reason := _reason(ledger, s))},
        budgets=budgets,
    )


def since_day(text: str) -> str:
    """The UTC day that `2026-11-01`, or `30d` for the last 30 days, stands for.

    Raises RequestError for anything else.
    """
    try:
        if text.endswith("d"):
            today = date.fromisoformat(clock.utc_now()[:10])
            return str(today - timedelta(days=int(text[:-1]) - 1))
        return str(date.fromisoformat(text))
    except (ValueError, OverflowError) as error:
        raise RequestError(
            f"since is {text!r}, expected a day such as 2026-11-01, or 30d for the last 30 days"
        ) from error


def yardstick(row: Sum) -> dict[str, float | None]:
    """Mean power while generating, and what it would come to if it never stopped.

    All None without a figure, and where generations overlap: their time is not one time.
    """
    if row.gross_uj is None or row.duration_s <= 0 or row.overlapping:
        return dict.fromkeys(("power_w", "power_u_w", "kwh_per_day", "g_per_day", "brains"))
    power_w = row.gross_uj / 1e6 / row.duration_s
    return {
        "power_w": power_w,
        "power_u_w": (row.u_j or 0.0) / row.duration_s,
        "kwh_per_day": power_w * SECONDS_PER_DAY / JOULES_PER_KWH,
        "g_per_day": (row.carbon_g or 0.0) / row.duration_s * SECONDS_PER_DAY,
        "brains": brains(power_w),
    }


def over_units(sums: Sequence[Sum]) -> Iterator[Sum]:
    """The sums of each group and source, whatever their units of work."""
    groups: dict[tuple[object, ...], list[Sum]] = defaultdict(list)
    for row in sums:
        groups[*row.group.values(), row.source].append(row)
    for rows in groups.values():
        yield total(rows, rows[0].group)


def _reason(ledger: Ledger, source: str) -> str | None:
    entries = ledger.entries({"source": source}, limit=1)
    reason = entries[0]["energy"]["reason"] if entries else None
    return None if reason is None else str(reason)


def name_of(row: Sum) -> str:
    """A group in one word: `smollm2-135m:int4`."""
    return ":".join(str(value) for value in row.group.values() if value is not None) or "no tag"


def print_overview(view: Overview) -> None:
    """Print the report on a terminal: bars of measured figures are solid, of others shaded."""
    since = f"since {view.since}" if view.since else f"from {view.first}"
    print(f"{sum(row.receipts for row in view.totals)} generations, {since} to {view.last}\n")
    table(
        ("source", "runs", "time", "energy", "idle", "gCO2e", "mean power", "run all day, brains"),
        [
            [
                row.source,
                str(row.receipts),
                seconds(row.duration_s),
                energy_text(row),
                idle_text(row),
                carbon_text(row),
            ]
            + [power_text(yardstick(row)), brains_text(yardstick(row))]
            for row in view.totals
        ],
    )
    table(
        (*view.by, "runs", "units", "time", "energy", "per unit", "idle", "gCO2e", "source"),
        [
            [str(row.group[name] or "") for name in view.by]
            + [
                str(row.receipts),
                counted(row.units, row.unit),
                seconds(row.duration_s),
                energy_text(row),
            ]
            + [per_unit_text(row), idle_text(row), carbon_text(row), row.source]
            for row in view.groups
        ],
    )
    _print_trend(view)
    for budget in view.budgets:
        limit = budget["budget"]
        print(
            f"budget {budget['name']}: {figure(budget['amount'])} of {figure(limit['limit'])} "
            f"{limit['unit']} spent"
        )
    for source, reason in view.reasons.items():
        print(f"{source}: {reason}")


def _print_trend(view: Overview) -> None:
    seen = sorted({str(row.group[view.period]) for row in view.trend})
    recent = seen[-MOST_PERIODS:]
    trend = [row for row in view.trend if row.group[view.period] in recent]
    top = max((row.gross_uj for row in trend if row.gross_uj is not None), default=0)
    table(
        (view.period, "runs", "energy", "", "source"),
        [
            [
                str(row.group[view.period]),
                str(row.receipts),
                energy_text(row),
                ("█" if row.source == "measured" else "▒")
                * (round(BAR_WIDTH * (row.gross_uj or 0) / top) if top else 0),
                row.source,
            ]
            for row in trend
        ],
        title=f"by {view.period}"
        + (f", the last {MOST_PERIODS}" if len(recent) < len(seen) else ""),
    )


def energy_text(row: Sum) -> str:
    """Gross energy with its u."""
    return si(joules(row.gross_uj), row.u_j, "J")


def per_unit_text(row: Sum) -> str:
    """Energy per unit of work with its u; empty without one."""
    if row.per_unit_j is None:
        return ""
    return si(row.per_unit_j, (row.u_j or 0.0) / row.units, "J")


def idle_text(row: Sum) -> str:
    """The idle share in percent with its u; empty where it is unknown."""
    share, u = idle_share(row)
    return "" if share is None else with_u(100 * share, 100 * u, "%")


def idle_share(row: Sum) -> tuple[float | None, float]:
    """Idle over gross energy of the receipts where both are known, with its u (k = 2)."""
    share = row.idle_share
    if share is None or not row.gross_uj:
        return None, 0.0
    idle_u = (row.idle_u_j or 0.0) / (row.idle_of_uj / 1e6)
    gross_u = share * (row.u_j or 0.0) / (row.gross_uj / 1e6)
    return share, math.hypot(idle_u, gross_u)


def carbon_text(row: Sum) -> str:
    """Operational emissions in grams with the energy's u; empty where unknown."""
    return "" if row.carbon_g is None else si(row.carbon_g, _carbon_u(row), "g")


def _carbon_u(row: Sum) -> float | None:
    """The energy's share of the uncertainty; the intensity is taken as given."""
    if row.carbon_g is None or not row.gross_uj or row.u_j is None:
        return None
    return row.carbon_g * row.u_j / (row.gross_uj / 1e6)


def power_text(figures: Mapping[str, float | None]) -> str:
    """The mean power of a `yardstick`."""
    power_w = figures["power_w"]
    return "" if power_w is None else si(power_w, figures["power_u_w"], "W")


def brains_text(figures: Mapping[str, float | None]) -> str:
    """The brains of a `yardstick`."""
    return "" if figures["brains"] is None else f"{figures['brains']:.2g}"


def ledger_tables(sums: Sequence[Sum], entries: Sequence[Mapping[str, Any]]) -> None:
    """Print the sums by model and scheme, then the last generations."""
    if not sums:
        print("the ledger has no such generation yet: `leangen generate` writes to it")
        return
    table(
        ("model", "runs", "units", "time", "energy", "source", "gCO2e"),
        [
            [
                f"{row.group['model']}:{row.group['scheme']}",
                str(row.receipts),
                counted(row.units, row.unit),
                seconds(row.duration_s),
                with_u(joules(row.gross_uj), row.u_j, "J"),
                row.source,
                "" if row.carbon_g is None else f"{row.carbon_g:.2g}",
            ]
            for row in sums
        ],
        title="sums",
    )
    table(
        ("started", "model", "units", "time", "energy", "source", "tag"),
        [
            [
                receipt["started_at"],
                f"{receipt['model']}:{receipt['scheme']}",
                counted(receipt["units"]["count"], receipt["units"]["kind"]),
                seconds(receipt["latency"]["total_s"]),
                with_u(receipt["energy"]["gross_j"], receipt["energy"]["u_j"], "J"),
                receipt["energy"]["source"],
                receipt["tag"] or "",
            ]
            for receipt in entries
        ],
        title=f"last {len(entries)}",
    )
