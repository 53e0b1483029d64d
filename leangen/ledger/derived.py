"""The tables that are derived from the receipts, kept up to date in the same transaction.

Windows of one domain that overlap in time each measured the whole domain, so every instant is split
evenly among the windows that cover it. A new receipt changes the share of those that it overlaps
and of no others, so their part of the rollups is taken back and added anew: sums over millions of
receipts then read a few hundred rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from leangen.ledger.database import Database
from leangen.ledger.rows import KEYS, NOTHING, Key, Row, Totals, Window, part
from leangen.ledger.sums import own_time

_ROW = ", ".join(Row._fields)
_INSERT = f"INSERT INTO receipts (entry, {_ROW}) VALUES ({', '.join('?' * (len(Row._fields) + 1))})"
_UPDATE = (
    f"UPDATE rollups SET {', '.join(f'{name} = {name} + ?' for name in Totals._fields)}"
    f" WHERE {' AND '.join(f'{name} IS ?' for name in KEYS)}"
)
_NEW = (
    f"INSERT INTO rollups ({', '.join((*Totals._fields, *KEYS))})"
    f" VALUES ({', '.join('?' * len((*Totals._fields, *KEYS)))})"
)


class Derived:
    """Derives within one transaction; `finish` completes what many receipts change."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._rollups: dict[Key, Totals] = {}
        self._shared: set[int] = set()
        self._domains: dict[tuple[str, str, str], int] = {}

    def add(self, entry: int, row: Row, windows: Iterable[Window]) -> None:
        """Derive from the receipt in row `entry` of the ledger, whose id must be new."""
        self._db.execute(_INSERT, (entry, *row))
        self._count(row.key, part(row))
        for window in windows:
            self._add_window(entry, window)

    def _add_window(self, entry: int, window: Window) -> None:
        """Keep a window, and split the time that it shares with others anew."""
        domain = self._domain(window)
        met = [
            (other, max(begin_ns, window.begin_ns), min(end_ns, window.end_ns))
            for other, begin_ns, end_ns in self._db.execute(
                "SELECT entry, begin_ns, end_ns FROM windows"
                " WHERE domain = ? AND end_ns > ? AND begin_ns < ?",
                (domain, window.begin_ns, window.end_ns),
            )
        ]
        before = own_time(met)
        after = own_time([*met, (entry, window.begin_ns, window.end_ns)])
        self._db.execute(
            "INSERT INTO windows VALUES (?, ?, ?, ?, ?, ?)",
            (
                *(domain, window.end_ns, window.begin_ns, entry, window.energy_uj),
                after[entry] * (window.end_ns - window.begin_ns),
            ),
        )
        if met:
            self._db.executemany(
                "UPDATE windows SET own_ns = own_ns + ? WHERE entry = ? AND domain = ?",
                [
                    ((after[other] - before[other]) * (end_ns - begin_ns), other, domain)
                    for other, begin_ns, end_ns in met
                ],
            )
            self._shared.update(other for other, _, _ in met)
            self._shared.add(entry)

    def add_totals(self, key: Key, totals: Totals) -> None:
        """Count what a compaction elsewhere kept."""
        self._count(key, totals)

    def finish(self) -> None:
        """Write the shares and the rollups that changed."""
        for entry in sorted(self._shared):
            self._share(entry)
        self._shared.clear()
        for key, totals in self._rollups.items():
            if not self._db.execute(_UPDATE, (*totals, *key)).rowcount:
                self._db.execute(_NEW, (*totals, *key))
        self._rollups.clear()

    def _count(self, key: Key, totals: Totals, sign: int = 1) -> None:
        before = self._rollups.get(key, NOTHING)
        self._rollups[key] = before.plus(totals, sign)

    def _domain(self, window: Window) -> int:
        key = (window.host, window.boot_id, window.scope)
        if key not in self._domains:
            self._db.execute(
                "INSERT INTO domains (host, boot_id, scope) VALUES (?, ?, ?)"
                " ON CONFLICT DO NOTHING",
                key,
            )
            (self._domains[key],) = self._db.execute(
                "SELECT domain FROM domains WHERE (host, boot_id, scope) = (?, ?, ?)", key
            ).fetchone()
        return self._domains[key]

    def _share(self, entry: int) -> None:
        """Work out anew how much of a receipt counts, now that it overlaps others."""
        *fields, overlaps, before = self._db.execute(
            f"SELECT {_ROW}, overlaps, share FROM receipts WHERE entry = ?", (entry,)
        ).fetchone()
        row = Row(*fields)
        share = counted(
            self._db.execute(
                "SELECT energy_uj, own_ns / (end_ns - begin_ns) FROM windows WHERE entry = ?",
                (entry,),
            )
        )
        self._db.execute(
            "UPDATE receipts SET overlaps = 1, share = ? WHERE entry = ?", (share, entry)
        )
        self._count(row.key, part(row, before, overlaps), -1)
        self._count(row.key, part(row, share, 1))


def counted(energies: Iterable[tuple[int, float]]) -> float:
    """The fraction of a receipt that counts, from (energy, own fraction of its time) by domain."""
    energies = list(energies)
    total_uj = sum(energy_uj for energy_uj, _ in energies)
    if not total_uj:
        return 1.0
    return math.fsum(energy_uj * own for energy_uj, own in energies) / total_uj
