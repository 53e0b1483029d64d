"""The ledger's file: its tables, opening it safely, transactions, and what can go wrong."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from leangen.errors import StorageError

APPLICATION_ID = 0x6C67656E  # "lgen": tells a ledger from any other SQLite file
VERSION = 1
BUSY_S = 30.0
HEADER = b"SQLite format 3\0"

SCHEMA = """
CREATE TABLE receipts (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    started_at TEXT NOT NULL,
    host TEXT NOT NULL,
    device TEXT NOT NULL,
    model TEXT NOT NULL,
    scheme TEXT NOT NULL,
    family TEXT NOT NULL,
    tag TEXT,
    unit TEXT NOT NULL,
    units REAL NOT NULL,
    duration_ns INTEGER NOT NULL,
    source TEXT NOT NULL,
    gross_uj INTEGER,
    u_random_j REAL,
    u_systematic_j REAL,
    carbon_g REAL,
    overlaps INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX receipts_by_time ON receipts (started_at);
CREATE INDEX receipts_by_overlap ON receipts (seq) WHERE overlaps;
CREATE TABLE documents (
    seq INTEGER PRIMARY KEY REFERENCES receipts (seq),
    receipt TEXT NOT NULL
);
CREATE TABLE domains (
    domain INTEGER PRIMARY KEY,
    host TEXT NOT NULL,
    boot_id TEXT NOT NULL,
    scope TEXT NOT NULL,
    UNIQUE (host, boot_id, scope)
);
CREATE TABLE windows (
    domain INTEGER NOT NULL REFERENCES domains (domain),
    end_ns INTEGER NOT NULL,
    begin_ns INTEGER NOT NULL,
    seq INTEGER NOT NULL REFERENCES receipts (seq),
    energy_uj INTEGER NOT NULL,
    PRIMARY KEY (domain, end_ns, seq)
) WITHOUT ROWID;
CREATE INDEX windows_by_receipt ON windows (seq);
"""


def _check_header(path: Path) -> None:
    """Refuse a file that is no database before SQLite touches it."""
    try:
        with path.open("rb") as file:
            start = file.read(len(HEADER))
    except FileNotFoundError:
        return
    if start and start != HEADER:
        raise StorageError(
            f"{path} is not a ledger (it is no SQLite file): move it away or choose another place"
        )


def connect(path: Path) -> sqlite3.Connection:
    """Open the ledger at `path`, made if there is none; statements commit one by one.

    Raises StorageError for a file that is not a ledger, sqlite3.Error and OSError otherwise.
    """
    _check_header(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        _prepare(db, path)
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    """Make the tables in an empty file; refuse one that is not a ledger this leangen can read."""
    db.execute("PRAGMA synchronous=FULL")
    db.execute("PRAGMA temp_store=MEMORY")
    if _identity(db) == (0, 0):
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


def explain(error: sqlite3.Error, path: Path) -> StorageError:
    """What SQLite raised, as the error that the user meets."""
    name = getattr(error, "sqlite_errorname", "")
    if name == "SQLITE_FULL":
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
    if name == "SQLITE_CONSTRAINT_UNIQUE":
        return StorageError(f"the ledger {path} holds this receipt already; it was not added again")
    return StorageError(f"cannot use the ledger {path}: {error}; choose a writable place")
