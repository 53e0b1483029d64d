"""The ledger's file: its tables, opening it safely, transactions, and what can go wrong.

A `Database` is what the ledger's modules write SQL for: SQLite here, and PostgreSQL where
`leangen.ledger.postgres` translates the little in which it differs.
"""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from leangen import host
from leangen.errors import StorageError

APPLICATION_ID = 0x6C67656E  # "lgen": tells a ledger from any other SQLite file
VERSION = 2
BUSY_S = 30.0
MOST_DAMAGE = 20
ROOM_BYTES = 1 << 20
"""With less than this free, a disk is full: a log and its index begin with tens of kilobytes."""

SCHEMA = """
CREATE TABLE entries (
    entry INTEGER PRIMARY KEY,
    chain TEXT NOT NULL,
    seq INTEGER NOT NULL,
    prev BLOB NOT NULL,
    hash BLOB NOT NULL,
    document TEXT NOT NULL,
    UNIQUE (chain, seq)
) STRICT;
CREATE TABLE checkpoints (
    chain TEXT NOT NULL,
    seq INTEGER NOT NULL,
    head BLOB NOT NULL,
    totals TEXT NOT NULL,
    PRIMARY KEY (chain, seq)
) STRICT, WITHOUT ROWID;
CREATE TABLE receipts (
    entry INTEGER PRIMARY KEY REFERENCES entries (entry),
    id TEXT NOT NULL UNIQUE,
    started_at TEXT NOT NULL,
    day TEXT AS (substr(started_at, 1, 10)),
    month TEXT AS (substr(started_at, 1, 7)),
    model TEXT NOT NULL,
    scheme TEXT NOT NULL,
    family TEXT NOT NULL,
    source TEXT NOT NULL,
    tag TEXT,
    host TEXT NOT NULL,
    device TEXT NOT NULL,
    unit TEXT NOT NULL,
    units REAL NOT NULL,
    duration_ns INTEGER NOT NULL,
    gross_uj INTEGER,
    u_random_j REAL,
    u_systematic_j REAL,
    idle_uj INTEGER,
    idle_u_j REAL,
    carbon_g REAL,
    overlaps INTEGER NOT NULL DEFAULT 0,
    share REAL NOT NULL DEFAULT 1
) STRICT;
CREATE INDEX receipts_by_time ON receipts (started_at);
CREATE TABLE domains (
    domain INTEGER PRIMARY KEY,
    host TEXT NOT NULL,
    boot_id TEXT NOT NULL,
    scope TEXT NOT NULL,
    UNIQUE (host, boot_id, scope)
) STRICT;
CREATE TABLE windows (
    domain INTEGER NOT NULL REFERENCES domains (domain),
    end_ns INTEGER NOT NULL,
    begin_ns INTEGER NOT NULL,
    entry INTEGER NOT NULL REFERENCES receipts (entry),
    energy_uj INTEGER NOT NULL,
    own_ns REAL NOT NULL,
    PRIMARY KEY (domain, end_ns, entry)
) STRICT, WITHOUT ROWID;
CREATE INDEX windows_by_entry ON windows (entry);
CREATE TABLE rollups (
    day TEXT NOT NULL,
    month TEXT AS (substr(day, 1, 7)),
    model TEXT NOT NULL,
    scheme TEXT NOT NULL,
    family TEXT NOT NULL,
    source TEXT NOT NULL,
    tag TEXT,
    host TEXT NOT NULL,
    device TEXT NOT NULL,
    unit TEXT NOT NULL,
    receipts INTEGER NOT NULL,
    unmeasured INTEGER NOT NULL,
    overlapping INTEGER NOT NULL,
    units REAL NOT NULL,
    duration_ns INTEGER NOT NULL,
    gross_uj INTEGER NOT NULL,
    random_j2 REAL NOT NULL,
    systematic_j REAL NOT NULL,
    idle_uj INTEGER NOT NULL,
    idle_u_j REAL NOT NULL,
    idle_of_uj INTEGER NOT NULL,
    carbon_g REAL NOT NULL
) STRICT;
CREATE UNIQUE INDEX rollups_by_key
    ON rollups (day, model, scheme, family, source, tag, host, device, unit);
"""


class Rows(Protocol):
    """What a statement gives."""

    @property
    def rowcount(self) -> int:
        """Rows that it changed."""
        ...

    def fetchone(self) -> Any:
        """The next row; None after the last."""
        ...

    def fetchall(self) -> list[Any]:
        """The rest."""
        ...

    def __iter__(self) -> Iterator[Any]: ...


class Database(Protocol):
    """An open database; statements have `?` for values."""

    def execute(self, sql: str, values: Sequence[Any] = ..., /) -> Rows:
        """Carry out one statement."""
        ...

    def executemany(self, sql: str, values: Iterable[Sequence[Any]], /) -> object:
        """Carry out one statement for each of many rows of values."""
        ...

    def stream(self, sql: str) -> Iterator[Any]:
        """The rows of a query that may have more than fit into memory."""
        ...

    def close(self) -> None:
        """Give up the connection."""
        ...


class Place(Protocol):
    """Where a ledger is kept."""

    errors: tuple[type[Exception], ...]
    """What its statements raise."""

    def exists(self) -> bool:
        """Whether there is anything to read; reading makes no ledger."""
        ...

    def connect(self) -> Database:
        """Open it, made if there is none; statements commit one by one.

        Raises StorageError for what is not a ledger, and `errors`.
        """
        ...

    def transaction(self, db: Any, *, write: bool) -> Any:
        """A context: all of the block or nothing; one state where it only reads."""
        ...

    def origin(self, db: Any) -> str:
        """What tells this copy of the ledger, written on this machine, from any other."""
        ...

    def damage(self, db: Any) -> list[str]:
        """What the database itself finds wrong with its files."""
        ...

    def shrink(self, db: Any) -> None:
        """Give space back after a compaction."""
        ...

    def lost(self, db: Any) -> bool:
        """Whether the connection is of no more use."""
        ...

    def explain(self, error: Exception) -> StorageError:
        """What it raised, as the error that the user meets."""
        ...


class _Connection(sqlite3.Connection):
    def stream(self, sql: str) -> Iterator[Any]:
        return self.execute(sql)


class SqliteFile:
    """A ledger in a file."""

    errors: tuple[type[Exception], ...] = (sqlite3.Error, OSError)

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def exists(self) -> bool:
        return self.path.exists()

    def connect(self) -> _Connection:
        return connect(self.path)

    def transaction(self, db: sqlite3.Connection, *, write: bool) -> Any:
        return transaction(db, "IMMEDIATE" if write else "DEFERRED")

    def origin(self, db: sqlite3.Connection) -> str:
        return f"{host.host().id}:{self.path.stat().st_ino}"

    def damage(self, db: sqlite3.Connection) -> list[str]:
        found = db.execute(f"PRAGMA integrity_check({MOST_DAMAGE})")
        return [f"the file: {text}" for (text,) in found if text != "ok"]

    def shrink(self, db: sqlite3.Connection) -> None:
        # `execute` would take one step of it, which is one page
        db.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE)")

    def lost(self, db: sqlite3.Connection) -> bool:
        return False

    def explain(self, error: Exception) -> StorageError:
        if isinstance(error, sqlite3.Error):
            return explain(error, self.path)
        detail = error.strerror if isinstance(error, OSError) else error
        return StorageError(f"cannot use the ledger {self.path}: {detail}; choose another place")


def _is_still(path: Path) -> bool:
    """Whether all of the ledger is in its file, on a file system that nobody can write to."""
    if os.name != "posix" or not path.exists():
        return False
    log = path.with_name(path.name + "-wal")
    empty = not (log.exists() and log.stat().st_size)
    return empty and bool(os.statvfs(path).f_flag & os.ST_RDONLY)


def connect(path: Path) -> _Connection:
    """Open the ledger at `path`, made if there is none; statements commit one by one.

    Raises StorageError for a file that is not a ledger, sqlite3.Error and OSError otherwise.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    place, by_uri = str(path), False
    if _is_still(path):  # SQLite would make its shared index beside it
        place, by_uri = f"{path.resolve().as_uri()}?immutable=1", True
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
    # Only SQLite may open the file: on closing it, a process loses the locks of every connection
    # that it has there, and another process then removes the log that those go on writing to.
    db = sqlite3.connect(
        place,
        timeout=BUSY_S,
        isolation_level=None,
        check_same_thread=False,
        factory=_Connection,
        uri=by_uri,
    )
    try:
        _prepare(db, path)
    except BaseException as error:
        db.close()
        if getattr(error, "sqlite_errorname", "") == "SQLITE_NOTADB":
            raise StorageError(
                f"{path} is not a ledger (it is no SQLite file): move it away or choose another "
                "place"
            ) from error
        raise
    return db


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    """Make the tables in an empty file; refuse one that is not a ledger this leangen can read."""
    db.execute("PRAGMA synchronous=FULL")
    db.execute("PRAGMA temp_store=MEMORY")
    if _identity(db) == (0, 0):
        db.execute("PRAGMA auto_vacuum=INCREMENTAL")  # compaction gives space back without a copy
        with transaction(db):
            empty = db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone() == (0,)
            if empty and _identity(db) == (0, 0):  # no other process was quicker
                for statement in SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id={APPLICATION_ID}")
                db.execute(f"PRAGMA user_version={VERSION}")
    application, version = _identity(db)
    if application != APPLICATION_ID:
        raise StorageError(
            f"{path} is a SQLite file of another program: move it away or choose another place"
        )
    if version > VERSION:
        raise StorageError(
            f"{path} is a ledger of version {version}, this leangen knows {VERSION}: update leangen"
        )
    if version < VERSION:
        raise StorageError(
            f"{path} is a ledger of version {version}, from before the first release, which this "
            f"leangen does not read (it knows {VERSION}): move it away, a new one is made on use"
        )
    if db.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        try:
            db.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            # Another process is at work: it, or a later open, switches. Until then a rollback
            # journal is as safe, only slower. A read-only file needs no journal.
            if not error.sqlite_errorname.startswith(("SQLITE_BUSY", "SQLITE_READONLY")):
                raise


def _identity(db: sqlite3.Connection) -> tuple[int, int]:
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    return application, version


@contextmanager
def transaction(db: sqlite3.Connection, mode: str = "IMMEDIATE") -> Iterator[None]:
    """All of the block or nothing.

    IMMEDIATE takes the write lock at once, so it cannot deadlock later; DEFERRED is for reading one
    state with several queries.
    """
    db.execute(f"BEGIN {mode}")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # SQLite may have rolled back by itself
            db.execute("ROLLBACK")
        raise


def _is_full(folder: Path) -> bool:
    with suppress(OSError):
        return shutil.disk_usage(folder).free < ROOM_BYTES
    return False


def explain(error: sqlite3.Error, path: Path) -> StorageError:
    """What SQLite raised, as the error that the user meets."""
    name = getattr(error, "sqlite_errorname", "")
    # Without room for its shared index, SQLite says no more than that reading or writing failed.
    if name == "SQLITE_FULL" or name.startswith("SQLITE_IOERR") and _is_full(path.parent):
        return StorageError(
            f"disk full: the ledger {path} took no more, what it holds is intact; free some space "
            "(`leangen gc`, `leangen rm`) and try again"
        )
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")):
        return StorageError(
            f"the ledger {path} is damaged ({error}): nothing was changed; move it away to start a "
            "new one, `sqlite3 FILE .recover` may save its rows"
        )
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        return StorageError(
            f"the ledger {path} was locked by another process for {BUSY_S:g} s: try again"
        )
    if name.startswith("SQLITE_ERROR"):
        return StorageError(
            f"the tables of the ledger {path} are not as leangen makes them ({error}): nothing was "
            "changed; move it away to start a new one"
        )
    return StorageError(f"cannot use the ledger {path}: {error}; choose a writable place")
