"""The ledger: an append-only SQLite file of receipts.

    receipts    one narrow row per generation: what sums and filters need
    documents   the receipt's JSON
    windows     when each domain of a receipt's total was measured, and its energy
    domains     what was measured: one domain (`package-0`) of one machine in one boot

What `append` has returned from is on the disk: each receipt is one transaction in WAL mode with
`synchronous=FULL`, as NORMAL may lose the last transactions in a power cut. Any number of
processes may append at once. Rows are never changed, but for `overlaps`.

Energy is summed by source: an estimate is never added to a measurement. Where windows on one domain
overlap in time (two processes generating at once), each of them measured the whole domain, so
their plain sum would count that time twice; a window then counts by the part of its time that falls
to it when every instant is split evenly among the windows that cover it.

Reading a ledger loads neither ONNX Runtime nor NumPy.
"""

from __future__ import annotations

import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from leangen.errors import StorageError
from leangen.ledger.database import connect, explain, transaction
from leangen.ledger.sums import COLUMNS, Sum, column, condition_of, own_time, summarize
from leangen.records import Receipt

__all__ = ["COLUMNS", "Ledger", "Sum", "own_time"]


class Ledger:
    """The ledger in the file `path`, which the first `append` makes. Usable from many threads.

    Every method raises StorageError for a file that is damaged, foreign, locked for long, or of a
    newer leangen, and for a full or read-only disk; such a file is left as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self._pid = os.getpid()
        self._inherited: list[sqlite3.Connection] = []

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        with self._lock:
            if self._db is not None and self._pid == os.getpid():
                self._db.close()
                self._db = None

    def append(self, receipt: Receipt) -> None:
        """Add a receipt; when this returns, it is on the disk.

        Raises StorageError also for a receipt that is in the ledger already.
        """
        with self._use() as db, transaction(db):
            _insert(db, receipt)

    def entries(
        self, where: Mapping[str, str] | None = None, *, limit: int | None = None
    ) -> list[dict[str, Any]]:
        """Receipts as JSON dicts, the newest first; none when there is no file yet.

        `where` maps keys of `COLUMNS` to the value wanted. Raises RequestError for another key.
        """
        condition, values = condition_of(where)
        if not self.path.exists():
            return []
        with self._use() as db:
            rows = db.execute(
                f"SELECT receipt FROM receipts JOIN documents USING (seq) {condition}"
                " ORDER BY seq DESC LIMIT ?",
                [*values, -1 if limit is None else limit],
            )
            return [json.loads(text) for (text,) in rows]

    def summary(
        self, by: Sequence[str] = ("model", "scheme"), *, where: Mapping[str, str] | None = None
    ) -> list[Sum]:
        """Sums over groups, one per source and unit within a group; none when there is no file.

        `by` and the keys of `where` are keys of `COLUMNS`; RequestError for another. The energy and
        carbon of overlapping windows are counted once, also when a group holds only one of them.
        """
        for name in [*by, *(where or {})]:
            column(name)
        if not self.path.exists():
            return []
        with self._use() as db:
            return summarize(db, by, where)

    @contextmanager
    def _use(self) -> Iterator[sqlite3.Connection]:
        """The open database, held by this thread; what SQLite raises becomes a StorageError."""
        with self._lock:
            try:
                yield self._connect()
            except sqlite3.Error as error:
                raise explain(error, self.path) from error
            except OSError as error:
                raise StorageError(
                    f"cannot use the ledger {self.path}: {error.strerror}; choose another place"
                ) from error

    def _connect(self) -> sqlite3.Connection:
        if self._db is not None and self._pid != os.getpid():
            # A connection must not cross a fork, not even to be closed (sqlite.org/howtocorrupt).
            self._inherited.append(self._db)
            self._db = None
        if self._db is None:
            self._db, self._pid = connect(self.path), os.getpid()
        return self._db


def _insert(db: sqlite3.Connection, receipt: Receipt) -> None:
    energy = receipt.energy
    seq = db.execute(
        "INSERT INTO receipts (id, started_at, host, device, model, scheme, family, tag, unit,"
        " units, duration_ns, source, gross_uj, u_random_j, u_systematic_j, carbon_g)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            receipt.id,
            receipt.started_at,
            receipt.host.id,
            receipt.host.device,
            receipt.model,
            receipt.scheme,
            receipt.family,
            receipt.tag,
            receipt.units.kind,
            receipt.units.count,
            receipt.duration_ns,
            energy.source,
            energy.gross_uj,
            energy.u_random_j,
            energy.u_systematic_j,
            receipt.carbon.g,
        ),
    ).lastrowid
    text = json.dumps(receipt.to_json(), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    db.execute("INSERT INTO documents VALUES (?, ?)", (seq, text))
    begin_ns = receipt.begin_boottime_ns
    if energy.gross_uj is None or begin_ns is None or receipt.duration_ns <= 0:
        return
    end_ns = begin_ns + receipt.duration_ns
    for scope, window in zip(energy.scope, energy.meters, strict=True):
        key = (receipt.host.id, receipt.host.boot_id, scope)
        db.execute("INSERT OR IGNORE INTO domains (host, boot_id, scope) VALUES (?, ?, ?)", key)
        (domain,) = db.execute(
            "SELECT domain FROM domains WHERE (host, boot_id, scope) = (?, ?, ?)", key
        ).fetchone()
        met = db.execute(
            "SELECT seq FROM windows WHERE domain = ? AND end_ns > ? AND begin_ns < ?",
            (domain, begin_ns, end_ns),
        ).fetchall()
        db.executemany(
            "UPDATE receipts SET overlaps = 1 WHERE seq = ?", [*met, (seq,)] if met else []
        )
        db.execute(
            "INSERT INTO windows VALUES (?, ?, ?, ?, ?)",
            (domain, end_ns, begin_ns, seq, window.energy_uj),
        )
