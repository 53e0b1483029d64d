"""Looking for changed, missing and cut rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from leangen.ledger import chain
from leangen.ledger.compaction import noted, totals_of
from leangen.ledger.database import Database
from leangen.ledger.derived import counted
from leangen.ledger.rows import KEYS, NOTHING, SUMS, Key, Row, Totals, Window, derive, is_receipt
from leangen.ledger.sums import own_time

MOST_PROBLEMS = 20
TOLERANCE = 1e-6  # of floats, whose last digits depend on the order of adding


@dataclass(slots=True)
class Verification:
    """What was checked and found; all is well when `problems` is empty."""

    rows: int = 0
    chains: int = 0
    compacted: int = 0
    """Rows that a compaction removed: their sums were checked, they themselves cannot be."""
    head: str = chain.combined({})
    problems: list[str] = field(default_factory=list)
    """The first of them, in words."""

    def found(self, problem: str) -> None:
        """Note a problem."""
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(problem)


def verify(db: Database | None, head: str | None, damage: Iterable[str] = ()) -> Verification:
    """The checks of `Ledger.verify` on one state of the database; None is an empty ledger.

    `damage` is what the database itself has found.
    """
    result = Verification()
    if db is not None:
        for problem in damage:
            result.found(problem)
        _chains(db, result, head)
        _shares(db, result)
        _rollups(db, result)
    elif head is not None and head != result.head:
        result.found(f"there is no ledger, so its head is not {head}")
    return result


def _chains(db: Database, result: Verification, wanted: str | None) -> None:
    """Every row against its chain, its narrow row and its windows; the wanted head on the way."""
    heads = chain.checkpointed(db)
    checkpoints = {
        chain.checkpoint_hash(*row)
        for row in db.execute("SELECT chain, seq, head, totals FROM checkpoints")
    }
    reached = wanted is None or chain.combined(heads) == wanted
    stored = _Stored(db)
    for entry, name, seq, prev, digest, document in db.stream(
        "SELECT entry, chain, seq, prev, hash, CAST(document AS BLOB) FROM entries ORDER BY entry"
    ):
        result.rows += 1
        last = heads.get(name, chain.START)
        if seq != last.seq + 1:
            result.found(f"chain {name}: row {seq} follows row {last.seq}: rows are missing")
        elif prev != last.hash:
            result.found(f"chain {name}: row {seq} does not link to the row before it")
        if digest != chain.link(name, seq, prev, document):
            result.found(f"chain {name}: row {seq} was changed")
        heads[name] = chain.Head(seq, digest)
        reached = reached or chain.combined(heads) == wanted
        try:
            parsed = json.loads(document)
            row, windows = derive(parsed) if is_receipt(parsed) else (None, [])
            checkpoints -= set(noted(parsed))
        except ValueError as error:
            result.found(f"chain {name}: row {seq} does not hold a receipt: {error}")
            continue
        for problem in stored.compare(entry, row, windows):
            result.found(f"chain {name}: row {seq}: {problem}")
    for problem in stored.rest():
        result.found(problem)
    if checkpoints:
        result.found("a checkpoint was changed, or the note that vouches for it is missing")
    if not reached:
        result.found(
            f"no state of this ledger has the head {wanted}: rows were cut off its end or changed"
            + (", or a compaction removed rows that came after" if heads and stored.cut else "")
        )
    result.chains = len(heads)
    result.compacted = sum(head.seq for head in chain.checkpointed(db).values())
    result.head = chain.combined(heads)


class _Stored:
    """The derived rows, read alongside the entries."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self.cut = db.execute("SELECT 1 FROM checkpoints").fetchone() is not None
        self._rows = _by_entry(
            db.stream(f"SELECT entry, {', '.join(Row._fields)} FROM receipts ORDER BY entry")
        )
        self._windows = _by_entry(
            db.stream(
                "SELECT entry, host, boot_id, scope, begin_ns, end_ns, energy_uj"
                " FROM windows LEFT JOIN domains USING (domain) ORDER BY entry"
            )
        )
        self._row = next(self._rows, None)
        self._window = next(self._windows, None)

    def compare(self, entry: int, row: Row | None, windows: list[Window]) -> Iterator[str]:
        """What is stored for an entry against what it should be."""
        yield from self._strays(entry)
        rows, self._row = _take(self._row, self._rows, entry)
        spans, self._window = _take(self._window, self._windows, entry)
        if not rows and row is not None and self._counted_elsewhere(row.id):
            row, windows = None, []
        if [tuple(found) for found in rows] != ([] if row is None else [tuple(row)]):
            yield "the columns that sums read differ from the receipt"
        if sorted(map(repr, spans)) != sorted(repr(tuple(window)) for window in windows):
            yield "its measured windows differ from the receipt"

    def rest(self) -> Iterator[str]:
        """What is stored for no entry."""
        yield from self._strays(None)

    def _strays(self, entry: int | None) -> Iterator[str]:
        while self._row is not None and (entry is None or self._row[0] < entry):
            yield f"there are sums' columns of a row {self._row[0]} that is not in the ledger"
            self._row = next(self._rows, None)
        while self._window is not None and (entry is None or self._window[0] < entry):
            yield f"there are windows of a row {self._window[0]} that is not in the ledger"
            self._window = next(self._windows, None)

    def _counted_elsewhere(self, id: str) -> bool:
        """A receipt that came in two chains counts once; a compaction may have removed the other.

        If it did not, the rollups tell.
        """
        found = self._db.execute("SELECT 1 FROM receipts WHERE id = ?", (id,)).fetchone()
        return found is not None or self.cut


Group = tuple[int, list[tuple[Any, ...]]]


def _by_entry(cursor: Iterable[Any]) -> Iterator[Group]:
    group: Group | None = None
    for entry, *values in cursor:
        if group is None or group[0] != entry:
            if group is not None:
                yield group
            group = (entry, [])
        group[1].append(tuple(values))
    if group is not None:
        yield group


def _take(
    group: Group | None, groups: Iterator[Group], entry: int
) -> tuple[list[tuple[Any, ...]], Group | None]:
    """The values of `entry`, if it is the next one, and the group that follows."""
    if group is None or group[0] != entry:
        return [], group
    return group[1], next(groups, None)


def _shares(db: Database, result: Verification) -> None:
    """How much of each receipt counts, against a sweep over all windows."""
    energies: dict[int, list[tuple[int, float]]] = {}
    met: set[int] = set()
    for cluster in _clusters(db):
        own = own_time([window[:3] for window in cluster])
        for entry, begin_ns, end_ns, energy_uj, own_ns in cluster:
            if not math.isclose(own_ns / (end_ns - begin_ns), own[entry], abs_tol=TOLERANCE):
                result.found(f"receipt {entry}: its part of the shared time is {own_ns} ns")
            if len(cluster) == 1:
                continue
            met.add(entry)
            energies.setdefault(entry, []).append((energy_uj, own[entry]))
    several = db.execute(
        "SELECT entry, energy_uj FROM windows WHERE entry IN"
        " (SELECT entry FROM windows GROUP BY entry HAVING COUNT(*) > 1)"
    )
    alone: dict[int, int] = {}
    for entry, energy_uj in several:
        alone[entry] = alone.get(entry, 0) + energy_uj
    for entry, found in energies.items():
        rest_uj = alone.get(entry, 0) - sum(energy_uj for energy_uj, _ in found)
        if rest_uj > 0:
            found.append((rest_uj, 1.0))  # domains of this receipt that nothing else measured
    for entry, overlaps, share in db.execute(
        "SELECT entry, overlaps, share FROM receipts WHERE overlaps != 0 OR share != 1"
    ):
        right = counted(energies.pop(entry, []))
        if overlaps != int(entry in met) or not math.isclose(share, right, abs_tol=TOLERANCE):
            result.found(f"receipt {entry}: the share of it that counts is {share}, not {right}")
    for entry in energies:
        result.found(f"receipt {entry} overlaps others, and is counted whole")


class Spell(NamedTuple):
    """One window as `_shares` reads it."""

    entry: int
    begin_ns: int
    end_ns: int
    energy_uj: int
    own_ns: float


def _clusters(db: Database) -> Iterator[Sequence[Spell]]:
    """The windows of one domain that hang together in time."""
    cluster: list[Spell] = []
    domain, until_ns = None, 0
    for at, *window in db.stream(
        "SELECT domain, entry, begin_ns, end_ns, energy_uj, own_ns FROM windows"
        " WHERE end_ns > begin_ns ORDER BY domain, begin_ns"
    ):
        spell = Spell._make(window)
        if at != domain or spell.begin_ns >= until_ns:
            if cluster:
                yield cluster
            cluster, domain, until_ns = [], at, 0
        cluster.append(spell)
        until_ns = max(until_ns, spell.end_ns)
    if cluster:
        yield cluster


def _rollups(db: Database, result: Verification) -> None:
    """The rollups against the receipts and the checkpoints."""
    expected: dict[Key, Totals] = {}
    keys = ", ".join(KEYS)
    for row in db.execute(f"SELECT {keys}, {SUMS} FROM receipts GROUP BY {keys}"):
        expected[row[: len(KEYS)]] = Totals(*row[len(KEYS) :])
    for (text,) in db.execute("SELECT totals FROM checkpoints"):
        try:
            for key, totals in totals_of(text):
                expected[key] = expected.get(key, NOTHING).plus(totals)
        except (ValueError, TypeError):
            result.found("a checkpoint's sums are unreadable")
    for row in db.execute(f"SELECT {keys}, {', '.join(Totals._fields)} FROM rollups"):
        key, found = row[: len(KEYS)], Totals(*row[len(KEYS) :])
        right = expected.pop(key, NOTHING)
        if not _alike(found, right):
            result.found(f"the sums of {_named(key)} differ from its receipts")
    for key in expected:
        result.found(f"the sums of {_named(key)} are missing")


def _alike(found: Totals, right: Totals) -> bool:
    return all(
        a == b if isinstance(b, int) else math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-12)
        for a, b in zip(found, right, strict=True)
    )


def _named(key: Key) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(KEYS, key, strict=True) if value)
