"""Charts as plain data: lengths in percent of the scale, figures as text; templates draw them.

Charts are HTML and CSS, not pictures: they follow the width of the page, the text keeps its size,
and a reader without eyes gets the figures. The style of a bar is its provenance: `measured` is
solid, `integrated` lighter, `estimated` hatched, `unavailable` an empty outline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from leangen.console import with_u

PREFIXES = ((1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))
FAR = 1e4
"""Figures this many times apart get prefixes of their own."""
MOST_LABELS = 7
"""Labels below a column chart that still fit a narrow window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One figure of a chart."""

    name: str
    value: float | None
    u: float | None
    source: str
    """The style: how the figure was got."""
    idle: float | None = None
    """The part of the value that idling would have taken as well."""
    note: str = ""
    missing: int = 0
    """Generations without a figure, which the value does not hold."""


def si(value: float | None, u: float | None, unit: str, *, size: float | None = None) -> str:
    """A figure with its uncertainty under one SI prefix: that of `size`, else its own.

    >>> si(41_200.0, 2_100.0, "J"), si(0.0631, 0.038, "J"), si(None, None, "J")
    ('41.2 ± 2.1 kJ', '63 ± 38 mJ', 'not measured')
    """
    if value is None:
        return with_u(None, None, unit)
    if size is None:
        size = max(abs(value), u or 0.0)
    factor, prefix = next(
        (p for p in PREFIXES if size >= p[0]), PREFIXES[-1] if size else (1.0, "")
    )
    return with_u(value / factor, None if u is None else u / factor, prefix + unit)


def bars(title: str, unit: str, rows: Sequence[Bar], *, prefixed: bool = False) -> dict[str, Any]:
    """A chart of horizontal bars with error bars.

    `prefixed` writes each figure with the unit and an SI prefix, where they are not too far apart
    the same for all; else the unit stands in the title.
    """
    least = min((bar.value for bar in rows if bar.value), default=0.0)
    top = max((bar.value + (bar.u or 0.0) for bar in rows if bar.value is not None), default=0.0)
    return {
        "title": title if prefixed or not unit else f"{title} ({unit})",
        "rows": [_bar(bar, unit if prefixed else None, top, least) for bar in rows],
    }


def _bar(bar: Bar, unit: str | None, top: float, least: float) -> dict[str, Any]:
    size = least if 0 < top < FAR * least else None
    return _lengths(bar, top) | {
        "name": bar.name,
        "note": bar.note,
        "missing": bar.missing,
        "text": with_u(bar.value, bar.u, "").strip()
        if unit is None
        else si(bar.value, bar.u, unit, size=size),
    }


def _lengths(bar: Bar, top: float) -> dict[str, Any]:
    def percent(value: float) -> float:
        return round(100 * min(max(value, 0.0), top) / top, 2) if top > 0 else 0.0

    value = bar.value or 0.0
    low = percent(value - (bar.u or 0.0))
    return {
        "value": bar.value,
        "style": "unavailable" if bar.value is None else bar.source,
        "length": percent(value),
        "idle": None if bar.idle is None else percent(bar.idle),
        "low": low if bar.u and bar.value is not None else None,
        "spread": round(percent(value + (bar.u or 0.0)) - low, 2),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """What stands side by side over one label of a column chart."""

    label: str
    bars: Sequence[Bar | None]
    """None keeps a place free, so that a source stands at the same place in every column."""


def columns(title: str, unit: str, over: Sequence[Column]) -> dict[str, Any]:
    """A chart of columns with error bars over an axis of round numbers, in SI-prefixed units."""
    highs = [
        bar.value + (bar.u or 0.0)
        for column in over
        for bar in column.bars
        if bar is not None and bar.value is not None
    ]
    ticks = round_ticks(max(highs, default=0.0))
    top = ticks[-1]
    every = math.ceil(len(over) / MOST_LABELS)
    return {
        "title": title,
        "ticks": [
            {"at": round(100 * tick / top, 2), "text": si(tick, None, unit)} for tick in ticks
        ],
        "columns": [
            {
                "label": column.label if index % every == 0 else "",
                "bars": [
                    bar
                    and _lengths(bar, top)
                    | {"hint": f"{bar.name}: {si(bar.value, bar.u, unit)} {bar.note}".strip()}
                    for bar in column.bars
                ],
            }
            for index, column in enumerate(over)
        ],
    }


def round_ticks(high: float) -> list[float]:
    """0 and two to five steps of 1, 2 or 5 times a power of ten, up to at least `high`.

    >>> round_ticks(37.0)
    [0.0, 10.0, 20.0, 30.0, 40.0]
    """
    if high <= 0:
        return [0.0, 1.0]
    power = 10.0 ** math.floor(math.log10(high / 4))
    step = next(power * m for m in (1, 2, 5, 10) if high / (power * m) <= 5)
    return [round(step * k, 12) for k in range(math.ceil(round(high / step, 9)) + 1)]
