"""Hash chains: why a changed, missing or cut row cannot hide.

A writer is one copy of a ledger on one machine, and has one chain: its rows are numbered from 1,
and each carries

    hash = SHA-256("leangen.ledger/1\\n" chain "\\n" seq "\\n" hex(prev) "\\n" document)

with the previous row's hash as `prev` (32 zero bytes before the first). All processes of a machine
that write to a ledger go on with the same chain, inside its write lock. A ledger that was copied or
restored elsewhere starts a chain of its own, so that the two can be merged.

A chain's name is `ORIGIN-RANDOM`; the origin is what tells this copy from another: the machine's id
and the file's inode, or the database's identity. Whoever rewrites a chain from some row on to its
end leaves no trace within the ledger: compare with a head that was noted elsewhere (`leangen ledger
head`, `verify --head`).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from typing import NamedTuple

from leangen.ledger.database import Database

ZERO = bytes(32)


class Head(NamedTuple):
    """The last row of a chain."""

    seq: int
    hash: bytes


START = Head(0, ZERO)


def link(chain: str, seq: int, prev: bytes, document: bytes) -> bytes:
    """The hash of a row."""
    start = f"leangen.ledger/1\n{chain}\n{seq}\n{prev.hex()}\n".encode()
    return hashlib.sha256(start + document).digest()


def checkpoint_hash(chain: str, seq: int, head: bytes, totals: str) -> str:
    """What a compaction's note says of a checkpoint, so that its totals are in a chain too."""
    text = f"leangen.checkpoint/1\n{chain}\n{seq}\n{head.hex()}\n{totals}"
    return hashlib.sha256(text.encode()).hexdigest()


def combined(heads: Mapping[str, Head]) -> str:
    """All heads as one hash; the same for any order in which rows arrived."""
    lines = (f"{chain} {head.seq} {head.hash.hex()}\n" for chain, head in sorted(heads.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def head_of(db: Database, chain: str) -> Head:
    """The last row of a chain, which a compaction may have removed; `START` when it has none."""
    row = db.execute(
        "SELECT seq, hash FROM entries WHERE chain = ? UNION ALL"
        " SELECT seq, head FROM checkpoints WHERE chain = ? ORDER BY seq DESC LIMIT 1",
        (chain, chain),
    ).fetchone()
    return Head(*row) if row else START


def checkpointed(db: Database) -> dict[str, Head]:
    """Where each compacted chain goes on."""
    rows = db.execute("SELECT chain, seq, head FROM checkpoints ORDER BY chain, seq")
    return {chain: Head(seq, head) for chain, seq, head in rows}


def heads(db: Database) -> dict[str, Head]:
    """The head of every chain."""
    chains = db.execute("SELECT chain FROM entries UNION SELECT chain FROM checkpoints").fetchall()
    return {chain: head_of(db, chain) for (chain,) in chains}


def own_chain(db: Database, about: str) -> str:
    """The chain that this copy of the ledger writes; a fresh name when it has none yet.

    `about` is its `Place.origin`.
    """
    origin = hashlib.sha256(about.encode()).hexdigest()[:8]
    row = db.execute(
        "SELECT chain FROM entries WHERE chain > ? AND chain < ? ORDER BY chain LIMIT 1",
        (f"{origin}-", f"{origin}."),  # "." follows "-"
    ).fetchone()
    return str(row[0]) if row else f"{origin}-{secrets.token_hex(8)}"


class Writer:
    """Adds rows to chains within one transaction."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._heads: dict[str, Head] = {}

    def append(self, chain: str, document: str) -> int:
        """Add a row at the chain's end; its number in this file."""
        last = self._heads.get(chain) or head_of(self._db, chain)
        seq = last.seq + 1
        digest = link(chain, seq, last.hash, document.encode())
        (entry,) = self._db.execute(
            "INSERT INTO entries (chain, seq, prev, hash, document) VALUES (?, ?, ?, ?, ?)"
            " RETURNING entry",
            (chain, seq, last.hash, digest, document),
        ).fetchone()
        self._heads[chain] = Head(seq, digest)
        return int(entry)
