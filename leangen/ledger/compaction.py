"""Retention: old rows go, their sums and the heads of their chains stay.

A checkpoint holds, for a piece of a chain, the number and hash of its last row and the sums of its
receipts by rollup. The hash of every checkpoint is written into a note, which is itself a row of
the compacting writer's chain: so the sums cannot be changed unnoticed either.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from leangen import clock
from leangen.ledger import chain
from leangen.ledger.database import Database
from leangen.ledger.rows import KEYS, SUMS, Key, Totals, canonical

NOTE_SCHEMA = "leangen.compaction/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compaction:
    """What was removed."""

    rows: int
    receipts: int


def compact(db: Database, before: str, own: str) -> Compaction:
    """Remove the rows that started before day `before`, within the caller's transaction."""
    rows = receipts = 0
    keys = ", ".join(KEYS)
    for name, seq in _cuts(db, before).items():
        piece = "SELECT entry FROM entries WHERE chain = ? AND seq <= ?"
        totals = [
            (row[: len(KEYS)], row[len(KEYS) :])
            for row in db.execute(
                f"SELECT {keys}, {SUMS} FROM receipts WHERE entry IN ({piece}) GROUP BY {keys}",
                (name, seq),
            )
        ]
        if not totals:  # nothing, or only notes of compactions
            continue
        db.execute(
            "INSERT INTO checkpoints SELECT chain, seq, hash, ? FROM entries"
            " WHERE chain = ? AND seq = ?",
            (canonical(totals), name, seq),
        )
        for table in ("windows", "receipts", "entries"):
            removed = db.execute(f"DELETE FROM {table} WHERE entry IN ({piece})", (name, seq))
            receipts += removed.rowcount if table == "receipts" else 0
            rows += removed.rowcount if table == "entries" else 0
    if rows:
        db.execute("DELETE FROM domains WHERE domain NOT IN (SELECT domain FROM windows)")
        chain.Writer(db).append(own, canonical(_note(db)))
    return Compaction(rows=rows, receipts=receipts)


def _cuts(db: Database, before: str) -> dict[str, int]:
    """The last row to remove of each chain."""
    cuts = {
        name: first - 1
        for name, first in db.execute(
            "SELECT chain, MIN(seq) FROM entries LEFT JOIN receipts USING (entry)"
            " WHERE started_at >= ? GROUP BY chain",
            (before,),
        )
    }
    for name, last in db.execute("SELECT chain, MAX(seq) FROM entries GROUP BY chain"):
        cuts.setdefault(name, last)
    while _spare_overlapping(db, cuts):
        pass
    return cuts


def _spare_overlapping(db: Database, cuts: dict[str, int]) -> bool:
    """Lower the cuts where a row to be removed overlaps one that stays; whether any was lowered."""
    db.execute("CREATE TEMP TABLE IF NOT EXISTS cuts (chain TEXT PRIMARY KEY, seq INTEGER)")
    db.execute("DELETE FROM temp.cuts")
    db.executemany("INSERT INTO temp.cuts VALUES (?, ?)", cuts.items())
    lowered = db.execute(
        """
        WITH shared AS (
            SELECT chain, entries.seq AS seq, domain, begin_ns, end_ns,
                entries.seq <= cuts.seq AS old
            FROM receipts JOIN entries USING (entry) JOIN windows USING (entry)
                JOIN temp.cuts USING (chain)
            WHERE overlaps != 0
        )
        SELECT gone.chain, MIN(gone.seq) - 1 FROM shared AS kept JOIN shared AS gone USING (domain)
        WHERE gone.old AND NOT kept.old
            AND gone.end_ns > kept.begin_ns AND gone.begin_ns < kept.end_ns
        GROUP BY gone.chain
        """
    ).fetchall()
    cuts.update(lowered)
    return bool(lowered)


def _note(db: Database) -> dict[str, object]:
    return {
        "schema": NOTE_SCHEMA,
        "at": clock.utc_now(),
        "checkpoints": [
            chain.checkpoint_hash(*row)
            for row in db.execute("SELECT chain, seq, head, totals FROM checkpoints")
        ],
    }


def noted(document: object) -> list[str]:
    """The checkpoints that a row's document vouches for."""
    if isinstance(document, dict) and document.get("schema") == NOTE_SCHEMA:
        return list(document["checkpoints"])
    return []


def totals_of(text: str) -> list[tuple[Key, Totals]]:
    """The sums of a checkpoint, by rollup."""
    return [(tuple(key), Totals._make(totals)) for key, totals in json.loads(text)]
