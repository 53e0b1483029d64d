"""The ledger: an append-only SQLite file of receipts in hash chains.

    entries      the receipts' JSON, numbered and chained (`ledger.chain`): the truth
    checkpoints  what a compaction kept of the rows that it removed (`ledger.compaction`)

and, derived from these within the same transaction (`ledger.derived`), so that questions are quick:

    receipts     one narrow row per generation
    domains, windows   when each domain of a receipt's total was measured, and its energy
    rollups      sums by day, model, scheme, family, source, tag, host, device and unit

`append` queues a receipt and returns at once; a thread writes what has gathered as one transaction
in WAL mode with `synchronous=FULL` (NORMAL may lose the last transactions in a power cut). When the
ticket's `wait`, `flush` or `close` has returned, the receipt is on the disk: acknowledged. Reading
waits for what was appended before. Any number of processes may append at once.

Energy is summed by source: an estimate is never added to a measurement. Overlapping windows on one
domain are counted once. Reading a ledger loads neither ONNX Runtime nor NumPy.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from leangen.console import say
from leangen.errors import RequestError, StorageError
from leangen.ledger import chain, compaction, merging, verification
from leangen.ledger.committer import Committer, Ticket
from leangen.ledger.compaction import Compaction
from leangen.ledger.database import Database, Place, SqliteFile
from leangen.ledger.derived import Derived
from leangen.ledger.merging import Merged
from leangen.ledger.rows import canonical, derive
from leangen.ledger.sums import COLUMNS, Sum, column, condition_of, own_time, summarize, total
from leangen.ledger.verification import Verification
from leangen.records import Receipt

__all__ = [
    "COLUMNS",
    "Compaction",
    "Ledger",
    "Merged",
    "Sum",
    "Ticket",
    "Verification",
    "own_time",
    "total",
]

BATCH = 500


class Ledger:
    """The ledger in the file `path`, which the first `append` makes. Usable from many threads.

    `postgresql://user@host/database` in place of a path is one that many machines write to.

    Every method raises StorageError for a file that is damaged, foreign, locked for long, or of
    another version, and for a full or read-only disk; such a file is left as it is.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path
        self._place = place_of(path)
        self._committer = Committer(self._commit)
        self._lock = threading.RLock()
        self._db: Database | None = None
        self._inherited: list[Database] = []
        _open.add(self)

    def __str__(self) -> str:
        return str(self._place)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what is queued and close the file; the next use opens it again."""
        try:
            self.flush()
        finally:
            with self._lock:
                if self._db is not None:
                    self._db.close()
                    self._db = None

    def append(self, receipt: Receipt) -> Ticket:
        """Queue a receipt; it is on the disk when the ticket's `wait` has returned.

        Raises RequestError for a receipt that JSON cannot hold, such as one with a NaN. The ticket
        raises StorageError also for a receipt that is in the ledger already.
        """
        try:
            document = receipt.to_json()
            ticket = Ticket(canonical(document), *derive(document))
        except (ValueError, TypeError) as error:
            raise RequestError(f"receipt {receipt.id} cannot be kept: {error}") from error
        return self._committer.submit(ticket)

    def writing(self) -> AbstractContextManager[None]:
        """Keep the thread that writes; without it there is one while there is something to write.

        What serves for long does so: a thread may not begin when memory is short.
        """
        return self._committer.held()

    def flush(self) -> None:
        """Wait until all that was appended is on the disk.

        Raises the first failure that no ticket's `wait` and no earlier `flush` has raised.
        """
        self._committer.flush()

    def entries(
        self, where: Mapping[str, str] | None = None, *, limit: int | None = None
    ) -> list[dict[str, Any]]:
        """Receipts as JSON dicts, the newest first; none when there is no file yet.

        `where` maps names of `COLUMNS` to the value wanted. Raises RequestError for another name.
        """
        condition, values = condition_of(where)
        with self._read() as db:
            if db is None:
                return []
            rows = db.execute(
                f"SELECT document FROM receipts JOIN entries USING (entry) {condition}"
                " ORDER BY started_at DESC, entry DESC LIMIT ?",
                [*values, sys.maxsize if limit is None else min(limit, sys.maxsize)],
            )
            return [json.loads(text) for (text,) in rows]

    def receipt(self, receipt_id: str) -> dict[str, Any] | None:
        """The receipt of that id as a JSON dict; None when it is not here."""
        with self._read() as db:
            row = (
                db
                and db.execute(
                    "SELECT document FROM receipts JOIN entries USING (entry) WHERE id = ?",
                    (receipt_id,),
                ).fetchone()
            )
        return json.loads(row[0]) if row else None

    def documents(self) -> Iterator[dict[str, Any]]:
        """All receipts as JSON dicts in the order of arrival, without holding all at once."""
        last = 0
        while True:
            with self._read() as db:
                rows = (
                    []
                    if db is None
                    else db.execute(
                        "SELECT entry, document FROM receipts JOIN entries USING (entry)"
                        " WHERE entry > ? ORDER BY entry LIMIT ?",
                        (last, BATCH),
                    ).fetchall()
                )
            if not rows:
                return
            last = rows[-1][0]
            yield from (json.loads(text) for _, text in rows)

    def summary(
        self,
        by: Sequence[str] = ("model", "scheme"),
        *,
        where: Mapping[str, str] | None = None,
        since: str | None = None,
    ) -> list[Sum]:
        """Sums over groups, one per source and unit within a group; none when there is no file.

        `by` and the keys of `where` are of `COLUMNS`; RequestError for another. `since` is the
        first UTC day that counts (`2026-11-21`). The energy and
        carbon of overlapping windows are counted once, also when a group holds only one of them.
        What a compaction removed is counted.
        """
        for name in [*by, *(where or {})]:
            column(name)
        with self._read() as db:
            return [] if db is None else summarize(db, by, where, since)

    def head(self) -> str:
        """The heads of all chains as one hash, to be noted elsewhere for `verify`."""
        with self._read() as db:
            return chain.combined({} if db is None else chain.heads(db))

    def verify(self, head: str | None = None) -> Verification:
        """Check every row against its chain, and all that is derived against the rows.

        `head` is what `head()` gave once: then it is a problem, too, if the ledger has never been,
        or is no longer, in a state with that head, as when rows were cut off its end.
        """
        with self._read() as db:
            return verification.verify(db, head, [] if db is None else self._place.damage(db))

    def merge(self, other: Path | str) -> Merged:
        """Take in all rows of another ledger that this one lacks; chains stay apart.

        Merging twice changes nothing. Raises StorageError, and changes nothing, when `other` does
        not verify, or when the two hold different rows under the same number or receipt.
        """
        with Ledger(other) as source, source._read() as their_db:
            if their_db is None:
                raise StorageError(f"there is no ledger {source}: give the path of a ledger's file")
            checked = verification.verify(their_db, None)
            if checked.problems:
                raise StorageError(f"cannot merge {source}, it is damaged: {checked.problems[0]}")
            with self._use() as db, self._place.transaction(db, write=True):
                return merging.merge(their_db, db, str(source))

    def add(self, receipts: Iterable[dict[str, Any]], *, partial: bool = False) -> Merged:
        """Append receipts given as JSON dicts, all or none; skip those that are here already.

        Raises StorageError for a different receipt under an id that is here already, and ValueError
        for what is not a receipt. With `partial` the receipts come from a form that drops part of
        them, so one whose id is here is taken as known, whatever it says.
        """
        with self._use() as db, self._place.transaction(db, write=True):
            writer, derived = chain.Writer(db), Derived(db)
            own = chain.own_chain(db, self._place.origin(db))
            added = known = 0
            for receipt in receipts:
                row, windows = derive(receipt)
                document = canonical(receipt)
                if merging.is_known(db, row.id, None if partial else document, "the file"):
                    known += 1
                else:
                    derived.add(writer.append(own, document), row, windows)
                    added += 1
            derived.finish()
        return Merged(added=added, known=known)

    def compact(self, before: str) -> Compaction:
        """Remove receipts that started before the UTC day `before` (`2026-11-21`); keep their sums.

        Rows are removed from the start of each chain up to the first younger one, or the first that
        overlaps one that stays. Totals and the chain's head stay as a checkpoint.
        """
        with self._use() as db:
            with self._place.transaction(db, write=True):
                result = compaction.compact(db, before, chain.own_chain(db, self._place.origin(db)))
            if result.receipts:
                self._place.shrink(db)
        return result

    def _commit(self, tickets: Sequence[Ticket]) -> None:
        """Write a group as one transaction, and settle its tickets."""
        with self._use() as db:
            with self._place.transaction(db, write=True):
                writer, derived = chain.Writer(db), Derived(db)
                own = chain.own_chain(db, self._place.origin(db))
                refused: dict[Ticket, StorageError] = {}
                for ticket in tickets:
                    row = ticket.row
                    if db.execute("SELECT 1 FROM receipts WHERE id = ?", (row.id,)).fetchone():
                        refused[ticket] = StorageError(
                            f"the ledger {self} holds receipt {row.id} already; "
                            "it was not added again"
                        )
                    else:
                        derived.add(writer.append(own, ticket.document), row, ticket.windows)
                derived.finish()
            for ticket in tickets:
                ticket.settle(refused.get(ticket))

    @contextmanager
    def _read(self) -> Iterator[Database | None]:
        """One state of the database, with all that was appended before; None without a file."""
        self._committer.drain()
        if not self._place.exists():
            yield None
            return
        with self._use() as db, self._place.transaction(db, write=False):
            yield db

    @contextmanager
    def _use(self) -> Iterator[Database]:
        """The open database, held by this thread; what it raises becomes a StorageError."""
        with self._lock:
            try:
                if self._db is not None and self._place.lost(self._db):
                    self._db = None
                if self._db is None:
                    self._db = self._place.connect()
                yield self._db
            except self._place.errors as error:
                raise self._place.explain(error) from error

    def _forked(self) -> None:
        """Start afresh in a fork's child."""
        self._committer.forget()
        self._lock = threading.RLock()
        if self._db is not None:
            # A connection must not cross a fork, not even to be closed (sqlite.org/howtocorrupt).
            self._inherited.append(self._db)
            self._db = None


def place_of(path: Path | str) -> Place:
    """The file of a path, or the database of a `postgresql://` address."""
    if isinstance(path, str) and path.startswith(("postgresql://", "postgres://")):
        from leangen.ledger.postgres import Postgres

        return Postgres(path)
    return SqliteFile(Path(path))


_open: weakref.WeakSet[Ledger] = weakref.WeakSet()


_held: list[Ledger] = []


def _before_fork() -> None:
    # No transaction may be under way: the child would inherit SQLite's note of its lock, for ever.
    _held[:] = list(_open)
    for ledger in _held:
        ledger._lock.acquire()


def _after_fork_in_parent() -> None:
    for ledger in _held:
        ledger._lock.release()
    _held.clear()


def _after_fork_in_child() -> None:
    for ledger in _held:
        ledger._forked()
    _held.clear()


def _at_exit() -> None:
    """Say what could not be written and nobody has heard of."""
    for ledger in list(_open):
        for error in ledger._committer.failures():
            say(f"leangen: error: {error}")


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
atexit.register(_at_exit)
