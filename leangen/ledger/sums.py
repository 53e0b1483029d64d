"""Sums over a ledger: by source, with what overlapping windows measured twice counted once."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from leangen.errors import RequestError
from leangen.ledger.database import Database
from leangen.ledger.rows import Totals
from leangen.records import Source, joules

COLUMNS = (
    *("model", "scheme", "family", "source", "tag", "host", "device", "unit", "day", "month"),
)
"""What a ledger can be filtered and grouped by; days and months are UTC."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum:
    """The receipts of one group that share a source and a unit of work."""

    group: Mapping[str, str | None]
    source: Source
    unit: str
    receipts: int
    unmeasured: int
    """How many of them have no figure; the sums below are over the others."""
    units: float
    duration_s: float
    gross_uj: int | None
    """None when none has a figure: unknown is not 0."""
    u_random_j: float | None
    """k=2, of all receipts in quadrature."""
    u_systematic_j: float | None
    """k=2, added linearly."""
    u_j: float | None
    """Both parts in quadrature."""
    idle_uj: int | None
    """What idling would have used in the same time; None when it is known of none."""
    idle_u_j: float | None
    """k=2, added linearly: generations of one process share their baseline."""
    idle_of_uj: int
    """The gross energy of those receipts whose idle energy is known."""
    carbon_g: float | None
    overlapping: int
    """How many of the receipts share their time with another on one domain; counted once."""

    @property
    def per_unit_j(self) -> float | None:
        """Joules per unit of work."""
        if self.gross_uj is None or not self.units:
            return None
        return self.gross_uj / 1e6 / self.units

    @property
    def per_unit_u_j(self) -> float | None:
        """Its uncertainty, k=2: the units are counted exactly."""
        return None if self.u_j is None or not self.units else self.u_j / self.units

    @property
    def idle_share(self) -> float | None:
        """Idle over gross energy, of the receipts where both are known."""
        return (
            None if self.idle_uj is None or not self.idle_of_uj else self.idle_uj / self.idle_of_uj
        )

    def to_json(self) -> dict[str, Any]:
        """The sum as plain JSON types, energies in joules."""
        return {
            **self.group,
            "source": self.source,
            "unit": self.unit,
            "receipts": self.receipts,
            "unmeasured": self.unmeasured,
            "units": self.units,
            "duration_s": self.duration_s,
            "gross_j": joules(self.gross_uj),
            "u_j": self.u_j,
            "per_unit_j": self.per_unit_j,
            "per_unit_u_j": self.per_unit_u_j,
            "idle_j": joules(self.idle_uj),
            "idle_u_j": self.idle_u_j,
            "idle_share": self.idle_share,
            "carbon_g": self.carbon_g,
            "overlapping": self.overlapping,
        }


def summarize(
    db: Database,
    by: Sequence[str],
    where: Mapping[str, str] | None,
    since: str | None = None,
) -> list[Sum]:
    """The sums that `Ledger.summary` gives, from the rollups."""
    keys = ", ".join([*(column(name) for name in by), "source", "unit"])
    condition, values = condition_of(where)
    if since is not None:
        condition = f"{condition} AND day >= ?" if condition else "WHERE day >= ?"
        values = [*values, since]
    rows = db.execute(
        f"SELECT {keys}, SUM(receipts), SUM(unmeasured), SUM(overlapping), TOTAL(units),"
        " SUM(duration_ns), SUM(gross_uj), TOTAL(random_j2), TOTAL(systematic_j),"
        " SUM(idle_uj), TOTAL(idle_u_j), SUM(idle_of_uj), TOTAL(carbon_g)"
        f" FROM rollups {condition} GROUP BY {keys}",
        values,
    ).fetchall()
    rows.sort(key=lambda row: [(key is not None, key) for key in row[: len(by) + 2]])
    return [_sum(row[: len(by)], row[len(by) :], by) for row in rows]


def _sum(group: Sequence[str | None], row: Sequence[Any], by: Sequence[str]) -> Sum:
    source, unit, *figures = row
    totals = Totals(*figures)
    known = totals.unmeasured < totals.receipts
    random_j = math.sqrt(max(0.0, totals.random_j2))
    return Sum(
        group=dict(zip(by, group, strict=True)),
        source=source,
        unit=unit,
        receipts=totals.receipts,
        unmeasured=totals.unmeasured,
        units=totals.units,
        duration_s=totals.duration_ns / 1e9,
        gross_uj=totals.gross_uj if known else None,
        u_random_j=random_j if known else None,
        u_systematic_j=totals.systematic_j if known else None,
        u_j=math.hypot(random_j, totals.systematic_j) if known else None,
        idle_uj=totals.idle_uj if totals.idle_of_uj else None,
        idle_u_j=totals.idle_u_j if totals.idle_of_uj else None,
        idle_of_uj=totals.idle_of_uj,
        carbon_g=totals.carbon_g if known else None,
        overlapping=totals.overlapping,
    )


def total(sums: Sequence[Sum], group: Mapping[str, str | None]) -> Sum:
    """Several sums of one source as one; `unit` is empty and `units` 0 when their units differ.

    `sums` must not be empty and their receipts distinct.
    """
    one_unit = len({row.unit for row in sums}) == 1
    known = [row for row in sums if row.gross_uj is not None]
    random_j = math.hypot(*(row.u_random_j or 0.0 for row in known))
    systematic_j = math.fsum(row.u_systematic_j or 0.0 for row in known)
    idle_of_uj = sum(row.idle_of_uj for row in sums)
    return Sum(
        group=group,
        source=sums[0].source,
        unit=sums[0].unit if one_unit else "",
        receipts=sum(row.receipts for row in sums),
        unmeasured=sum(row.unmeasured for row in sums),
        units=math.fsum(row.units for row in sums) if one_unit else 0.0,
        duration_s=math.fsum(row.duration_s for row in sums),
        gross_uj=sum(row.gross_uj or 0 for row in known) if known else None,
        u_random_j=random_j if known else None,
        u_systematic_j=systematic_j if known else None,
        u_j=math.hypot(random_j, systematic_j) if known else None,
        idle_uj=sum(row.idle_uj or 0 for row in sums) if idle_of_uj else None,
        idle_u_j=math.fsum(row.idle_u_j or 0.0 for row in sums) if idle_of_uj else None,
        idle_of_uj=idle_of_uj,
        carbon_g=math.fsum(row.carbon_g or 0.0 for row in known) if known else None,
        overlapping=sum(row.overlapping for row in sums),
    )


def own_time(windows: Sequence[tuple[int, int, int]]) -> dict[int, float]:
    """The fraction of each window's time that is its own; windows are (key, begin_ns, end_ns).

    Every instant is split evenly among the windows that cover it, so that with durations d the sum
    of fraction x d is the length of their union.

    >>> own_time([(1, 0, 10), (2, 5, 15), (3, 20, 30)])
    {1: 0.75, 2: 0.75, 3: 1.0}
    """
    steps: dict[int, int] = defaultdict(int)  # by how much the number of windows changes there
    for _, begin_ns, end_ns in windows:
        steps[begin_ns] += 1
        steps[end_ns] -= 1
    own_ns, covering, last_ns = 0.0, 0, 0
    until: dict[int, float] = {}  # what one window would own if it lasted from the first edge on
    for edge_ns in sorted(steps):
        own_ns += (edge_ns - last_ns) / covering if covering else 0.0
        until[edge_ns] = own_ns
        covering += steps[edge_ns]
        last_ns = edge_ns
    return {
        key: (until[end_ns] - until[begin_ns]) / (end_ns - begin_ns)
        for key, begin_ns, end_ns in windows
    }


def column(name: str) -> str:
    """The SQL of one of `COLUMNS`; RequestError for another."""
    if name not in COLUMNS:
        raise RequestError(f"the ledger has no {name!r}: expected one of {', '.join(COLUMNS)}")
    return name


def condition_of(where: Mapping[str, str] | None) -> tuple[str, list[str]]:
    """An SQL condition of allow-listed columns, and its values."""
    if not where:
        return "", []
    return "WHERE " + " AND ".join(f"{column(name)} = ?" for name in where), list(where.values())
