"""Sums over a ledger: by source, with what overlapping windows measured twice counted once."""

from __future__ import annotations

import itertools
import math
import sqlite3
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from leangen.errors import RequestError
from leangen.ledger.database import transaction
from leangen.records import Source, joules

COLUMNS = {
    "model": "model",
    "scheme": "scheme",
    "family": "family",
    "source": "source",
    "tag": "tag",
    "host": "host",
    "device": "device",
    "unit": "unit",
    "day": "substr(started_at, 1, 10)",
}
"""What a ledger can be filtered and grouped by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """The receipts of one group that share a source and a unit of work."""

    group: Mapping[str, str | None]
    source: Source
    unit: str
    receipts: int
    units: float
    duration_s: float
    gross_uj: int | None
    """None when the source is `unavailable`: unknown is not 0."""
    u_j: float | None
    """k=2: random parts in quadrature, systematic ones linearly."""
    carbon_g: float | None
    overlapping: int
    """How many of the receipts share their time with another on one domain; counted once."""

    @property
    def per_unit_j(self) -> float | None:
        """Joules per unit of work."""
        if self.gross_uj is None or not self.units:
            return None
        return self.gross_uj / 1e6 / self.units

    def to_json(self) -> dict[str, Any]:
        """The sum as plain JSON types, energies in joules."""
        return {
            **self.group,
            "source": self.source,
            "unit": self.unit,
            "receipts": self.receipts,
            "units": self.units,
            "duration_s": self.duration_s,
            "gross_j": joules(self.gross_uj),
            "u_j": self.u_j,
            "per_unit_j": self.per_unit_j,
            "carbon_g": self.carbon_g,
            "overlapping": self.overlapping,
        }


def summarize(
    db: sqlite3.Connection, by: Sequence[str], where: Mapping[str, str] | None
) -> list[Sum]:
    """The sums that `Ledger.summary` gives."""
    keys = ", ".join([*(column(name) for name in by), "source", "unit"])
    condition, values = condition_of(where)
    db.execute("CREATE TEMP TABLE IF NOT EXISTS shares (seq INTEGER PRIMARY KEY, share REAL)")
    with transaction(db, "DEFERRED"):
        db.execute("DELETE FROM temp.shares")
        db.executemany("INSERT INTO temp.shares VALUES (?, ?)", _shares(db).items())
        rows = db.execute(
            f"""
            WITH counted AS (
                SELECT receipts.*, COALESCE(share, 1.0) AS share
                FROM receipts LEFT JOIN temp.shares USING (seq) {condition}
            )
            SELECT {keys}, COUNT(*), SUM(units), SUM(duration_ns), SUM(overlaps),
                SUM(CAST(ROUND(gross_uj * share) AS INTEGER)),
                SUM(u_random_j * share * u_random_j * share),
                SUM(u_systematic_j * share),
                SUM(carbon_g * share)
            FROM counted GROUP BY {keys} ORDER BY {keys}
            """,
            values,
        ).fetchall()
    return [_sum(row[: len(by)], row[len(by) :], by) for row in rows]


def _sum(group: Sequence[str | None], row: Sequence[Any], by: Sequence[str]) -> Sum:
    source, unit, receipts, units, duration_ns, overlapping, gross_uj, random_j2, sys_j, g = row
    return Sum(
        group=dict(zip(by, group, strict=True)),
        source=source,
        unit=unit,
        receipts=receipts,
        units=units,
        duration_s=duration_ns / 1e9,
        gross_uj=gross_uj,
        u_j=None if gross_uj is None else math.hypot(math.sqrt(random_j2 or 0.0), sys_j or 0.0),
        carbon_g=g,
        overlapping=overlapping,
    )


def _shares(db: sqlite3.Connection) -> dict[int, float]:
    """For each receipt that overlaps others, the fraction of its energy that counts in sums."""
    by_domain: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    energy_uj: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for domain, seq, begin_ns, end_ns, window_uj in db.execute(
        "SELECT domain, seq, begin_ns, end_ns, energy_uj FROM windows JOIN receipts USING (seq)"
        " WHERE overlaps"
    ):
        by_domain[domain].append((seq, begin_ns, end_ns))
        energy_uj[seq].append((domain, window_uj))
    own = {domain: own_time(windows) for domain, windows in by_domain.items()}
    shares = {}
    for seq, windows in energy_uj.items():
        gross_uj = sum(window_uj for _, window_uj in windows)
        counted = math.fsum(window_uj * own[domain][seq] for domain, window_uj in windows)
        shares[seq] = counted / gross_uj if gross_uj else 1.0
    return shares


def own_time(windows: Sequence[tuple[int, int, int]]) -> dict[int, float]:
    """The fraction of each window's time that is its own; windows are (key, begin_ns, end_ns).

    Every instant is split evenly among the windows that cover it, so that with durations d the sum
    of fraction x d is the length of their union.

    >>> own_time([(1, 0, 10), (2, 5, 15), (3, 20, 30)])
    {1: 0.75, 2: 0.75, 3: 1.0}
    """
    edges = sorted({edge for _, *edges in windows for edge in edges})
    starts = sorted(windows, key=lambda window: window[1])
    own_ns = dict.fromkeys((key for key, _, _ in windows), 0.0)
    active: list[tuple[int, int, int]] = []
    position = 0
    for left, right in itertools.pairwise(edges):
        active = [window for window in active if window[2] > left]
        while position < len(starts) and starts[position][1] <= left:
            active.append(starts[position])
            position += 1
        for key, _, _ in active:
            own_ns[key] += (right - left) / len(active)
    return {key: own_ns[key] / (end_ns - begin_ns) for key, begin_ns, end_ns in windows}


def column(name: str) -> str:
    """The SQL of a key of `COLUMNS`; RequestError for another."""
    if name not in COLUMNS:
        raise RequestError(f"the ledger has no {name!r}: expected one of {', '.join(COLUMNS)}")
    return COLUMNS[name]


def condition_of(where: Mapping[str, str] | None) -> tuple[str, list[str]]:
    """An SQL condition of allow-listed columns, and its values."""
    if not where:
        return "", []
    return "WHERE " + " AND ".join(f"{column(name)} = ?" for name in where), list(where.values())
