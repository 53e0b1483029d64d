"""A comparison for people and for spreadsheets: a table, a CSV file, one HTML page."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from leangen.charts import Bar, bars, round_ticks, si
from leangen.compare import Comparison, Row
from leangen.console import human_bytes, with_u
from leangen.files import write_atomic
from leangen.page import write_template

COLUMNS = (
    *("scheme", "bits/weight", "size", "joules per unit", "time per unit (p5-p95)"),
    *("peak memory", "Pareto", "quality"),
)


def cells(row: Row) -> list[str]:
    """One line of the table."""
    found, unit = row.summary, row.summary["unit"]
    middle, low, high = _time(row)
    joules = si(found["j_per_unit"], found["j_per_unit_u"], "J")
    return [
        row.label,
        f"{row.bits:.2f}",
        human_bytes(row.bundle.size_bytes),
        f"{joules}/{unit} ({found['energy_source']})",
        f"{si(middle, None, 's')} ({si(low, None, 's')} - {si(high, None, 's')})",
        human_bytes(found["peak_rss_bytes"]),
        "front" if row.on_front else "beaten",
        ", ".join(f"{m.name} {with_u(m.value, m.u, m.unit).strip()}" for m in row.quality[:3])
        or "reference",
    ]


def _time(row: Row) -> tuple[float, float, float]:
    """Seconds per unit: median, p5, p95."""
    rate = row.summary["units_per_s"]
    return 1 / rate["median"], 1 / rate["p95"], 1 / rate["p5"]


def write_csv(path: Path, found: Comparison) -> None:
    """One line per scheme; every measure has a column for its value and one for its u."""
    names = list(dict.fromkeys(m.name for row in found.rows for m in row.quality))
    head = ["scheme", "bits_per_weight", "size_bytes", "unit", "j_per_unit", "j_per_unit_u"]
    head += ["energy_source", "s_per_unit_p5", "s_per_unit", "s_per_unit_p95", "peak_rss_bytes"]
    head += ["rounds", "on_front", *(f"{name}{part}" for name in names for part in ("", " u"))]
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(head)
    for row in found.rows:
        summary = row.summary
        middle, low, high = _time(row)
        measures = {m.name: m for m in row.quality}
        line: list[Any] = [row.label, row.bits, row.bundle.size_bytes, summary["unit"]]
        line += [summary["j_per_unit"], summary["j_per_unit_u"], summary["energy_source"]]
        line += [low, middle, high, summary["peak_rss_bytes"], len(row.costs), row.on_front]
        for name in names:
            measure = measures.get(name)
            line += [None, None] if measure is None else [measure.value, measure.u]
        writer.writerow(line)
    write_atomic(path, buffer.getvalue().encode())


def write_html(path: Path, found: Comparison) -> None:
    """One page that needs nothing else."""
    reference = found.rows[0]
    write_template(
        "compare.html.j2",
        path,
        {
            "title": f"{reference.bundle.name}: {', '.join(row.label for row in found.rows)}",
            "found": found,
            "plot": pareto_plot(found),
            "charts": _charts(found),
            "columns": COLUMNS,
            "table": [cells(row) for row in found.rows],
            "measures": [
                {
                    "label": row.label,
                    "of": [
                        (m.name, with_u(m.value, m.u, m.unit).strip(), f"{m.n} {m.of}")
                        for m in row.quality
                    ],
                }
                for row in found.rows
                if row.quality
            ],
        },
    )


def pareto_plot(found: Comparison) -> dict[str, Any]:
    """Loss over cost: places in percent of the axes, with whiskers; the front as a staircase."""
    loss = next(row.quality[0] for row in found.rows if row.quality)
    unit = "J" if found.cost == "energy" else "s"
    spans = [_span(row) for row in found.rows]
    x_ticks = round_ticks(max(high for _, _, high in spans))
    losses = [
        abs(row.loss) + (row.quality[0].u or 0.0 if row.quality else 0.0) for row in found.rows
    ]
    y_ticks = round_ticks(max(losses))

    def x(value: float) -> float:
        return round(100 * value / x_ticks[-1], 2)

    def y(value: float) -> float:
        return round(100 * min(max(value / y_ticks[-1], 0.0), 1.0), 2)

    points = []
    for row, (middle, low, high) in zip(found.rows, spans, strict=True):
        u = row.quality[0].u or 0.0 if row.quality else 0.0
        points.append(
            {
                "label": row.label,
                "x": x(middle),
                "x_low": x(low),
                "x_high": x(high),
                "y": y(row.loss),
                "y_low": y(row.loss - u),
                "y_high": y(row.loss + u),
                "front": row.on_front,
                "left": x(middle) > 75,
                "hint": f"{row.label}: {si(middle, None, unit)} per {found.unit}, "
                f"{loss.name} {row.loss:.3g} {loss.unit}".strip(),
            }
        )
    stairs = sorted((p["x"], p["y"]) for p in points if p["front"])
    return {
        "x_title": f"{found.cost} per {found.unit}",
        "y_title": f"{loss.name}{f', {loss.unit}' if loss.unit else ''}",
        "x_ticks": [{"at": x(tick), "text": si(tick, None, unit)} for tick in x_ticks],
        "y_ticks": [{"at": y(tick), "text": f"{tick:g}"} for tick in y_ticks],
        "points": points,
        "stairs": _staircase(stairs),
    }


def _span(row: Row) -> tuple[float, float, float]:
    """Median cost, and the range of 95% of the rounds."""
    low, middle, high = np.percentile(row.costs, [2.5, 50, 97.5])
    return float(middle), float(low), float(high)


def _staircase(points: Sequence[tuple[Any, Any]]) -> str:
    """SVG points through the front from the cheapest on; y runs downwards."""
    path = [(x, 100 - y) for x, y in points]
    corners = [(b[0], a[1]) for a, b in zip(path, path[1:], strict=False)]
    ordered = [path[0], *(p for pair in zip(corners, path[1:], strict=True) for p in pair)]
    return " ".join(f"{x:g},{round(y, 2):g}" for x, y in ordered)


def _charts(found: Comparison) -> list[dict[str, Any]]:
    def bar(row: Row, value: float | None, u: float | None, source: str = "measured") -> Bar:
        return Bar(name=row.label, value=value, u=u, source=source)

    rows = found.rows
    charts = [
        bars(
            f"Energy per {found.unit}",
            "J",
            [
                bar(
                    r,
                    r.summary["j_per_unit"],
                    r.summary["j_per_unit_u"],
                    r.summary["energy_source"],
                )
                for r in rows
            ],
            prefixed=True,
        ),
        bars(
            f"Time per {found.unit}",
            "s",
            [bar(r, m, max(high - m, m - low)) for r in rows for m, low, high in [_time(r)]],
            prefixed=True,
        ),
        bars("Size on disk", "MB", [bar(r, r.bundle.size_bytes / 1e6, None) for r in rows]),
        bars(
            "Peak memory of a process with this model alone",
            "MB",
            [bar(r, r.summary["peak_rss_bytes"] / 1e6, None) for r in rows],
        ),
    ]
    for index, measure in enumerate(rows[1].quality):
        if measure.name.startswith("reference "):
            continue  # the same for all
        charts.append(
            bars(
                f"{measure.name} against {rows[0].label}",
                measure.unit,
                [bar(r, r.quality[index].value, r.quality[index].u) for r in rows[1:]],
            )
        )
    return charts
