"""A ledger's report or a comparison as one HTML page.

A page is one file: no script, font or image from elsewhere. Every figure of a report is the
ledger's own sum, as text and as the `value` of its HTML `data` element.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from leangen.charts import Bar, Column, bars, columns, si
from leangen.console import counted
from leangen.files import write_atomic
from leangen.ledger import Sum
from leangen.records import joules
from leangen.report import (
    Overview,
    brains_text,
    carbon_text,
    energy_text,
    idle_share,
    idle_text,
    name_of,
    over_units,
    per_unit_text,
    power_text,
    yardstick,
)

HOW = {
    "measured": "read from an energy counter",
    "integrated": "power samples summed over time",
    "estimated": "computed by a model, no counter was readable",
    "unavailable": "no figure: not counted as 0, not counted at all",
}


def write_overview(path: Path, view: Overview) -> None:
    """Write the report as one HTML page."""
    content: dict[str, Any] = {
        "view": view,
        "how": HOW,
        "totals": [_figures(row) for row in view.totals],
        "trend": _trend(view),
        "per_unit": list(_per_unit_charts(view)),
        "gross": bars(
            f"Energy by {' and '.join(view.by)}",
            "J",
            [
                Bar(
                    name=name_of(row),
                    value=joules(row.gross_uj),
                    u=row.u_j,
                    source=row.source,
                    idle=_idle_j(row),
                    note=_idle_note(row),
                    missing=missing,
                )
                for row, missing in _folded(list(over_units(view.groups)))
            ],
            prefixed=True,
        ),
        "rows": [{"name": name_of(row)} | _figures(row) for row in view.groups],
        "budgets": [_budget(budget) for budget in view.budgets],
    }
    write_template("ledger.html.j2", path, content)


def _folded(groups: Sequence[Sum]) -> list[tuple[Sum, int]]:
    """The rows with a figure, each with how many of its group have none; then groups without any.

    The second is counted on the first row of a group only.
    """
    missing = {name_of(row): row for row in groups if row.gross_uj is None}
    known = [row for row in groups if row.gross_uj is not None]
    rows = []
    for row in known:
        without = missing.pop(name_of(row), None)
        rows.append((row, row.unmeasured + (without.receipts if without else 0)))
    return rows + [(row, row.receipts) for row in missing.values()]


def _idle_j(row: Sum) -> float | None:
    """The idle share of the whole bar."""
    return None if row.idle_share is None else row.idle_share * (row.gross_uj or 0) / 1e6


def _idle_note(row: Sum) -> str:
    if row.gross_uj is None:
        return ""
    return f"{idle_text(row)} idle" if row.idle_share is not None else "idle unknown"


def _figure(value: float | None, text: str) -> dict[str, Any]:
    """What a template shows as text and as the machine's `value`."""
    return {"value": value, "text": text}


def _figures(row: Sum) -> dict[str, Any]:
    power = yardstick(row)
    share, _ = idle_share(row)
    return {
        "source": row.source,
        "receipts": row.receipts,
        "unmeasured": row.unmeasured if row.gross_uj is not None else 0,
        "overlapping": row.overlapping,
        "units": _figure(row.units, counted(row.units, row.unit) if row.unit else ""),
        "duration": _figure(row.duration_s, si(row.duration_s, None, "s")),
        "gross": _figure(joules(row.gross_uj), energy_text(row)),
        "per_unit": _figure(row.per_unit_j, per_unit_text(row)),
        "idle": _figure(share, idle_text(row)),
        "carbon": _figure(row.carbon_g, carbon_text(row)),
        "power": _figure(power["power_w"], power_text(power)),
        "brains": _figure(power["brains"], brains_text(power)),
        "kwh_per_day": power["kwh_per_day"],
        "g_per_day": power["g_per_day"],
    }


def _trend(view: Overview) -> dict[str, Any]:
    """Columns for every day or month from the first to the last, empty ones included."""
    found = {(str(row.group[view.period]), row.source): row for row in view.trend}
    return columns(
        f"Energy per {view.period}, {view.first} to {view.last}",
        "J",
        [
            Column(
                label=when[5:] if view.period == "day" else when,
                bars=[_trend_bar(when, found.get((when, row.source))) for row in view.totals],
            )
            for when in _periods(view)
        ],
    )


def _trend_bar(when: str, row: Sum | None) -> Bar | None:
    if row is None:
        return None
    return Bar(
        name=when,
        value=joules(row.gross_uj),
        u=row.u_j,
        source=row.source,
        note=f"{row.source}, {row.receipts} generations",
    )


def _periods(view: Overview) -> list[str]:
    first, last = date.fromisoformat(view.first), date.fromisoformat(view.last)
    days = [str(first + timedelta(days=n)) for n in range((last - first).days + 1)]
    return days if view.period == "day" else sorted({day[:7] for day in days})


def _per_unit_charts(view: Overview) -> Iterator[dict[str, Any]]:
    """One chart per unit of work: a token and a second of audio have no common scale."""
    for unit in sorted({row.unit for row in view.groups}):
        yield bars(
            f"Energy per {unit}",
            "J",
            [
                Bar(
                    name=name_of(row),
                    value=row.per_unit_j,
                    u=None if row.per_unit_j is None else (row.u_j or 0.0) / row.units,
                    source=row.source,
                    missing=missing,
                )
                for row, missing in _folded([row for row in view.groups if row.unit == unit])
            ],
            prefixed=True,
        )


def _budget(spent: Mapping[str, Any]) -> dict[str, Any]:
    """A budget as a bar against its limit; each source is a part of its own."""
    limit, unit = spent["budget"]["limit"], spent["budget"]["unit"]
    top = max(limit, spent["amount"]) or 1.0
    return {
        "name": spent["name"],
        "amount": spent["amount"],
        "limit": limit,
        "unit": unit,
        "on_exceed": spent["budget"]["on_exceed"],
        "exceeded": spent["exceeded"],
        "unmeasured": spent["unmeasured"],
        "resets_at": spent["resets_at"],
        "mark": round(100 * limit / top, 2),
        "parts": [
            {"style": source, "length": round(100 * amount / top, 2)}
            for source, amount in spent["by_source"].items()
        ],
    }


def data_uri(path: Path, mime: str) -> str:
    """A file as a `data:` address, so that a page carries it."""
    return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"


def write_page(path: Path, **content: Any) -> None:
    """Write a comparison (assets/report.html.j2): title, lead, notes, columns, table, models."""
    write_template("report.html.j2", path, content)


def write_template(template: str, path: Path, content: Mapping[str, Any]) -> None:
    """Write a page of `assets/`; every name that the template uses is in `content`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("leangen", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_atomic(path, environment.get_template(template).render(**content).encode())
