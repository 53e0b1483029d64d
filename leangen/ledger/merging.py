"""Taking the rows of another ledger in."""

from __future__ import annotations

import json
from dataclasses import dataclass

from leangen.errors import StorageError
from leangen.ledger import chain
from leangen.ledger.compaction import totals_of
from leangen.ledger.database import Database
from leangen.ledger.derived import Derived
from leangen.ledger.rows import canonical, derive, is_receipt


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """What a merge or an import did."""

    added: int
    """Rows that were new."""
    known: int
    """Rows that were here already."""


def is_known(db: Database, id: str, document: str | None, origin: str) -> bool:
    """Whether the receipt is in the ledger.

    Raises StorageError when another one has its id, unless `document` is None: not to be compared.
    """
    row = db.execute(
        "SELECT document FROM receipts JOIN entries USING (entry) WHERE id = ?", (id,)
    ).fetchone()
    if row and document is not None and row[0] != document:
        raise StorageError(
            f"conflict: receipt {id} of {origin} differs from the one that the ledger holds; "
            "one of them was changed, nothing was added"
        )
    return row is not None


def merge(theirs: Database, db: Database, origin: str) -> Merged:
    """Add to `db` the rows of the verified ledger `theirs`, within the caller's transactions.

    A receipt that arrives in a second chain (it was exported and imported) keeps its row, and is
    counted once.
    """
    for name in sorted(chain.heads(theirs)):
        _start(theirs, db, name, origin)
    writer, derived = chain.Writer(db), Derived(db)
    last = {name: head.seq for name, head in chain.heads(db).items()}
    added = known = 0
    for name, seq, digest, document in theirs.stream(
        "SELECT chain, seq, hash, document FROM entries ORDER BY entry"
    ):
        if seq <= last.get(name, 0):
            _same(db, name, seq, digest, origin)
            known += 1
            continue
        entry = writer.append(name, document)
        _same(db, name, seq, digest, origin)
        added += 1
        receipt = json.loads(document)
        if is_receipt(receipt):
            row, windows = derive(receipt)
            if not is_known(db, row.id, canonical(receipt), origin):
                derived.add(entry, row, windows)
    derived.finish()
    return Merged(added=added, known=known)


def _start(theirs: Database, db: Database, name: str, origin: str) -> None:
    """Bring a chain that was compacted over there to where its rows go on."""
    first = chain.checkpointed(theirs).get(name, chain.START)
    ours = chain.head_of(db, name)
    if first.seq <= ours.seq:
        _same(db, name, first.seq, first.hash, origin)
        return
    if ours.seq:
        raise StorageError(
            f"cannot merge {origin}: it has compacted rows {ours.seq + 1} to {first.seq} of chain "
            f"{name}, which are not here; merge this ledger into that one, and merge before you "
            "compact"
        )
    derived = Derived(db)
    for row in theirs.execute(
        "SELECT chain, seq, head, totals FROM checkpoints WHERE chain = ?", (name,)
    ):
        db.execute("INSERT INTO checkpoints VALUES (?, ?, ?, ?)", row)
        for key, totals in totals_of(row[3]):
            derived.add_totals(key, totals)
    derived.finish()


def _same(db: Database, name: str, seq: int, digest: bytes, origin: str) -> None:
    """Raise StorageError unless our row has the hash `digest`; a compacted one has none to tell."""
    row = db.execute(
        "SELECT hash FROM entries WHERE chain = ? AND seq = ? UNION ALL"
        " SELECT head FROM checkpoints WHERE chain = ? AND seq = ?",
        (name, seq, name, seq),
    ).fetchone()
    if row and row[0] != digest:
        raise StorageError(
            f"conflict: row {seq} of chain {name} in {origin} is not the one that this ledger "
            "holds; one of the two was changed, or both went on from one copy. Nothing was merged; "
            "the receipts of one can be brought over with `leangen ledger export` and `import`"
        )
