"""What was measured, for people: the ledger as tables, a comparison as one HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from leangen.console import table, with_u
from leangen.files import write_atomic
from leangen.ledger import Sum
from leangen.records import joules


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
                f"{row.units:.4g} {row.unit}s",
                f"{row.duration_s:.1f} s",
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
                f"{receipt['units']['count']:.4g} {receipt['units']['kind']}s",
                f"{receipt['latency']['total_s']:.2f} s",
                with_u(receipt["energy"]["gross_j"], receipt["energy"]["u_j"], "J"),
                receipt["energy"]["source"],
                receipt["tag"] or "",
            ]
            for receipt in entries
        ],
        title=f"last {len(entries)}",
    )


def data_uri(path: Path, mime: str) -> str:
    """A file as a `data:` address, so that a page carries it."""
    return f"data:{mime};base64,{base64.b64encode(path.read_bytes()).decode()}"


def plot(
    label: str, unit: str, rows: Sequence[tuple[str, float | None, float | None, str]]
) -> dict[str, Any]:
    """A bar plot for the page; rows are (scheme, value, u, style `measured` or `estimated`)."""
    return {
        "label": label,
        "unit": unit,
        "rows": [
            {
                "scheme": scheme,
                "value": value,
                "low": None if value is None or u is None else max(0.0, value - u),
                "high": None if value is None else value + (u or 0.0),
                "text": "" if value is None else with_u(value, u, "").strip(),
                "style": style,
            }
            for scheme, value, u, style in rows
        ],
    }


def write_page(path: Path, **content: Any) -> None:
    """Render assets/report.html.j2 with title, lead, notes, columns, table and models."""
    from jinja2 import Environment, StrictUndefined

    source = files("leangen").joinpath("assets/report.html.j2").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(source)
    write_atomic(path, template.render(**content).encode())
