"""What a ledger derives from a receipt's JSON: a narrow row, its windows, its part of the sums."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NamedTuple

from leangen.records import RECEIPT_SCHEMA

KEYS = ("day", "model", "scheme", "family", "source", "tag", "host", "device", "unit")
"""What the rollups are grouped by."""

Key = tuple[str | None, ...]


class Row(NamedTuple):
    """The columns of `receipts` that come straight from the receipt."""

    id: str
    started_at: str
    model: str
    scheme: str
    family: str
    source: str
    tag: str | None
    host: str
    device: str
    unit: str
    units: float
    duration_ns: int
    gross_uj: int | None
    u_random_j: float | None
    u_systematic_j: float | None
    idle_uj: int | None
    idle_u_j: float | None
    carbon_g: float | None

    @property
    def key(self) -> tuple[str | None, ...]:
        """The rollup that this receipt falls into, in the order of `KEYS`."""
        return (
            *(self.started_at[:10], self.model, self.scheme, self.family, self.source, self.tag),
            *(self.host, self.device, self.unit),
        )


class Window(NamedTuple):
    """When one domain of one machine in one boot was measured, and its energy."""

    host: str
    boot_id: str
    scope: str
    begin_ns: int
    end_ns: int
    energy_uj: int


class Totals(NamedTuple):
    """The additive figures of a rollup; what is unknown counts in `unmeasured` and nowhere else."""

    receipts: int
    unmeasured: int
    overlapping: int
    units: float
    duration_ns: int
    gross_uj: int
    random_j2: float
    systematic_j: float
    idle_uj: int
    idle_u_j: float
    idle_of_uj: int
    """The gross energy of those receipts whose idle energy is known."""
    carbon_g: float

    def plus(self, other: Totals, sign: int = 1) -> Totals:
        """The sum, or the difference with sign -1."""
        return Totals._make(a + sign * b for a, b in zip(self, other, strict=True))


NOTHING = Totals(0, 0, 0, 0.0, 0, 0, 0.0, 0.0, 0, 0.0, 0, 0.0)

SUMS = """
    COUNT(*), COUNT(*) - COUNT(gross_uj), SUM(overlaps), TOTAL(units), SUM(duration_ns),
    COALESCE(SUM(CAST(ROUND(CAST(gross_uj * share AS NUMERIC)) AS BIGINT)), 0),
    TOTAL(u_random_j * share * u_random_j * share), TOTAL(u_systematic_j * share),
    COALESCE(SUM(CAST(ROUND(CAST(idle_uj * share AS NUMERIC)) AS BIGINT)), 0),
    TOTAL(idle_u_j * share),
    COALESCE(SUM(CAST(ROUND(CAST(gross_uj * share AS NUMERIC)) AS BIGINT))
        FILTER (WHERE idle_uj IS NOT NULL), 0),
    TOTAL(carbon_g * share)
"""
"""`Totals` of a group of `receipts`, the twin in SQL of `part`."""


def part(row: Row, share: float = 1.0, overlaps: int = 0) -> Totals:
    """What one receipt adds to its rollup when `share` of its energy counts."""
    gross_uj = _rounded((row.gross_uj or 0) * share)
    return Totals(
        receipts=1,
        unmeasured=int(row.gross_uj is None),
        overlapping=overlaps,
        units=row.units,
        duration_ns=row.duration_ns,
        gross_uj=gross_uj,
        random_j2=(row.u_random_j or 0.0) * share * (row.u_random_j or 0.0) * share,
        systematic_j=(row.u_systematic_j or 0.0) * share,
        idle_uj=_rounded((row.idle_uj or 0) * share),
        idle_u_j=(row.idle_u_j or 0.0) * share,
        idle_of_uj=0 if row.idle_uj is None else gross_uj,
        carbon_g=(row.carbon_g or 0.0) * share,
    )


def _rounded(energy_uj: float) -> int:
    return int(energy_uj + 0.5)  # as SQLite's ROUND, for 0 and more


def canonical(document: Any) -> str:
    """The one text of a JSON document: what is stored, hashed and exported.

    Raises ValueError for NaN and infinities, which JSON does not have.
    """
    return json.dumps(document, allow_nan=False, sort_keys=True, separators=(",", ":"))


def is_receipt(document: Any) -> bool:
    """Whether the document is a receipt; a chain also holds the notes of compactions."""
    return isinstance(document, dict) and document.get("schema") == RECEIPT_SCHEMA


def derive(receipt: dict[str, Any]) -> tuple[Row, list[Window]]:
    """The narrow row and the windows. Raises ValueError, with why, for what is not a receipt."""
    if not is_receipt(receipt):
        raise ValueError(f"it is not of schema {RECEIPT_SCHEMA}")
    try:
        return _row(receipt), _windows(receipt)
    except KeyError as error:
        raise ValueError(f"{error} is missing") from error
    except TypeError as error:
        raise ValueError("a part of it is of another type than in a receipt") from error


def _row(receipt: dict[str, Any]) -> Row:
    energy, units, host = receipt["energy"], receipt["units"], receipt["host"]
    return Row(
        id=_text(receipt["id"]),
        started_at=_time(receipt["started_at"]),
        model=_text(receipt["model"]),
        scheme=_text(receipt["scheme"]),
        family=_text(receipt["family"]),
        source=_text(energy["source"]),
        tag=None if receipt["tag"] is None else _text(receipt["tag"]),
        host=_text(host["id"]),
        device=_text(host["device"]),
        unit=_text(units["kind"]),
        units=_number(units["count"]),
        duration_ns=_nanoseconds(receipt["duration_ns"]),
        gross_uj=_microjoules(energy["gross_j"]),
        u_random_j=_optional(energy["u_random_j"]),
        u_systematic_j=_optional(energy["u_systematic_j"]),
        idle_uj=_microjoules(energy.get("idle_j")),
        idle_u_j=_optional(energy.get("idle_u_j")),
        carbon_g=_optional(receipt["carbon"]["g"]),
    )


def _windows(receipt: dict[str, Any]) -> list[Window]:
    """One per domain of the total; none when the total or its time is unknown."""
    energy, host = receipt["energy"], receipt["host"]
    begin_ns, duration_ns = receipt["begin_boottime_ns"], receipt["duration_ns"]
    if energy["gross_j"] is None or begin_ns is None or duration_ns == 0:
        return []
    if len(set(energy["scope"])) != len(energy["scope"]):
        raise ValueError("its scope names a domain twice")
    return [
        Window(
            host=_text(host["id"]),
            boot_id=_text(host["boot_id"]),
            scope=_text(scope),
            begin_ns=_nanoseconds(begin_ns),
            end_ns=_nanoseconds(begin_ns + duration_ns),
            energy_uj=_microjoules(meter["joules"]) or 0,
        )
        for scope, meter in zip(energy["scope"], energy["meters"], strict=False)
    ]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} stands where a receipt has a text")
    value.encode()  # half of a surrogate pair cannot be stored; this says so, as a ValueError
    return value


def _time(value: Any) -> str:
    if not re.match(r"\d{4}-\d\d-\d\dT", _text(value)):
        raise ValueError(f"{value!r} stands where a receipt has a UTC time as ISO 8601")
    return str(value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} stands where a receipt has a number")
    return float(value)


def _optional(value: Any) -> float | None:
    return None if value is None else _number(value)


def _nanoseconds(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{value!r} stands where a receipt has nanoseconds")
    return int(value)


def _microjoules(energy_j: Any) -> int | None:
    """Whole microjoules again: exact up to 2^53 of them, 9 GJ."""
    if energy_j is None:
        return None
    if not 0 <= _number(energy_j) < 9e9:
        raise ValueError(f"{energy_j!r} J stands where a receipt has an energy")
    return round(float(energy_j) * 1e6)
