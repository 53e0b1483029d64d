"""Chains: what is changed, missing or cut is found; ledgers merge; compaction keeps the sums."""

from __future__ import annotations

import shutil
import sqlite3
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_fakes import receipt

from leangen.errors import StorageError
from leangen.ledger import COLUMNS, Ledger

OLD, NEW = "2026-01-05T08:00:00.000Z", "2026-11-21T08:00:00.000Z"
SECOND = 1_000_000_000


def make(path, *receipts):
    """A ledger with these receipts, closed."""
    with Ledger(path) as ledger:
        for entry in receipts:
            ledger.append(entry)
    return ledger


@pytest.fixture
def rich(tmp_path):
    """Two chains, one compacted, with overlaps, two domains, and a receipt that came twice."""
    theirs = make(
        tmp_path / "theirs.db",
        receipt("t1", host="h2", started_at=OLD),
        receipt("t2", host="h2", started_at=NEW, tag="x", begin_ns=0, scope=("package-0", "gpu-0")),
        receipt("t3", host="h2", started_at=NEW, begin_ns=SECOND // 2),
        receipt("both", started_at=NEW),
    )
    theirs.compact("2026-06-01")
    with make(
        tmp_path / "ours.db",
        receipt("both", started_at=NEW),
        receipt("o1", started_at=NEW, begin_ns=0),
        receipt("o2", gross_uj=None, source="unavailable", started_at=NEW),
    ) as ours:
        ours.merge(theirs.path)
    return ours


def state(ledger):
    """All that a reader can see."""
    return (
        ledger.entries(),
        ledger.head(),
        {name: ledger.summary(by=(name,)) for name in COLUMNS},
    )


def cells(path):
    """(table, key condition, column, value) of every stored cell."""
    db = sqlite3.connect(path)
    for (table,) in db.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND sql NOT NULL"
    ).fetchall():
        columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
        for row in db.execute(f"SELECT {', '.join(columns)} FROM {table}").fetchall():
            for column, value in zip(columns, row, strict=True):
                yield table, dict(zip(columns, row, strict=True)), column, value
    db.close()


def other_values(value):
    if value is None:
        return [1, "x"]
    if isinstance(value, int):
        return [value + 1, value - 1, None]
    if isinstance(value, float):
        return [value * 1.01 + 0.01, None]
    if isinstance(value, bytes):
        return [bytes([value[0] ^ 1]) + value[1:], value[:-1], b""]
    return [value[:-1], value + " ", value.swapcase(), None]


def change(path, statement, values):
    """Whether the change was possible at all."""
    db = sqlite3.connect(path)
    db.execute("PRAGMA synchronous=OFF")
    try:
        with db:
            return db.execute(statement, values).rowcount > 0
    except sqlite3.IntegrityError:
        return False
    finally:
        db.close()


def where(row):
    return " AND ".join(f"{column} IS ?" for column in row), list(row.values())


def assert_found_or_harmless(path, before, what):
    with Ledger(path) as ledger:
        found = ledger.verify().problems
        try:
            harmless = found or state(ledger) == before
        except (ValueError, TypeError, KeyError):  # no JSON any more, and yet not found
            harmless = False
        assert harmless, what


def test_any_changed_or_deleted_cell_is_found(rich, tmp_path):
    """Exhaustive: every cell of every table, several other values each; every row deleted."""
    rich.close()
    with rich as ledger:
        assert ledger.verify().problems == []
        before = state(ledger)
    copy = tmp_path / "copy.db"
    tried = 0
    for table, row, column, value in cells(rich.path):
        condition, values = where(row)
        for other in other_values(value):
            shutil.copyfile(rich.path, copy)
            if other != value and change(
                copy, f"UPDATE {table} SET {column} = ? WHERE {condition}", [other, *values]
            ):
                tried += 1
                assert_found_or_harmless(copy, before, (table, column, value, other))
        if column == next(iter(row)):
            shutil.copyfile(rich.path, copy)
            change(copy, f"DELETE FROM {table} WHERE {condition}", values)
            assert_found_or_harmless(copy, before, (table, "deleted", row))
    assert tried > 400


@settings(max_examples=25)
@given(data=st.data())
def test_any_changed_byte_of_a_receipt_is_found(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("ledger") / "ledger.db"
    make(path, receipt(1), receipt(2), receipt(3))
    db = sqlite3.connect(path)
    entry = data.draw(st.integers(1, 3))
    (text,) = db.execute("SELECT document FROM entries WHERE entry = ?", (entry,)).fetchone()
    raw = bytearray(text.encode())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    with db:
        db.execute(
            "UPDATE entries SET document = CAST(? AS TEXT) WHERE entry = ?", (bytes(raw), entry)
        )
    db.close()
    with Ledger(path) as ledger:
        assert any("was changed" in problem for problem in ledger.verify().problems)


def test_a_rewritten_row_with_a_right_hash_breaks_the_link(tmp_path):
    from leangen.ledger.chain import link

    path = make(tmp_path / "l.db", receipt(1), receipt(2), receipt(3)).path
    db = sqlite3.connect(path)
    name, prev, text = db.execute(
        "SELECT chain, prev, document FROM entries WHERE seq = 2"
    ).fetchone()
    text = text.replace('"gross_j":2.0', '"gross_j":1.0')
    with db:
        db.execute(
            "UPDATE entries SET document = ?, hash = ? WHERE seq = 2",
            (text, link(name, 2, prev, text.encode())),
        )
    db.close()
    with Ledger(path) as ledger:
        assert "row 3 does not link" in " ".join(ledger.verify().problems)


def test_the_hash_is_what_the_documentation_says(tmp_path):
    """SHA-256 over plain lines, so that any other program can check a ledger."""
    import hashlib

    path = make(tmp_path / "l.db", receipt(1), receipt(2)).path
    db = sqlite3.connect(path)
    prev = bytes(32)
    for number, (name, seq, digest, document) in enumerate(
        db.execute("SELECT chain, seq, hash, document FROM entries ORDER BY seq"), 1
    ):
        lines = ["leangen.ledger/1", name, str(number), prev.hex(), document]
        assert seq == number
        assert hashlib.sha256("\n".join(lines).encode()).digest() == digest
        prev = digest
    db.close()


def test_a_cut_tail_is_found_by_a_head_that_was_noted(tmp_path):
    path, earlier = tmp_path / "l.db", tmp_path / "earlier.db"
    make(path, receipt(1), receipt(2))
    shutil.copyfile(path, earlier)
    with Ledger(path) as ledger:
        first = ledger.head()
        ledger.append(receipt(3)).wait()
        head = ledger.head()
        assert head != first
        assert ledger.verify(first).problems == ledger.verify(head).problems == []
        ledger.append(receipt(4)).wait()
        assert ledger.verify(head).problems == []
    shutil.copyfile(earlier, path)
    with Ledger(path) as ledger:
        assert ledger.verify().problems == []
        assert ledger.verify(first).problems == []
        [problem] = ledger.verify(head).problems
        assert "cut off its end" in problem


def test_a_ledger_that_is_gone_does_not_have_the_head(tmp_path):
    with Ledger(tmp_path / "none.db") as ledger:
        assert ledger.verify().problems == []
        assert ledger.verify("00" * 32).problems != []
        assert not ledger.path.exists()


def test_merging_keeps_chains_apart_and_twice_is_once(place):
    a = make(place("a"), receipt("a1"), receipt("a2", tag="x"))
    b = make(place("b"), receipt("b1", host="h2"))
    with make(place("sum"), receipt("c1", host="h3")) as total:
        assert total.merge(a.path).added == 2
        assert total.merge(b.path).added == 1
        before = state(total)
        again = total.merge(a.path)
        assert (again.added, again.known) == (0, 2)
        assert state(total) == before
        assert total.verify().chains == 3
        assert total.verify().problems == []
        assert {entry["id"] for entry in total.entries()} == {"ra1", "ra2", "rb1", "rc1"}
        a.append(receipt("a3")).wait()
        a.close()
        assert total.merge(a.path).added == 1
        assert sum(row.gross_uj for row in total.summary()) == 5 * 2_000_000
        b.merge(total.path)
        assert b.head() == total.head()
        b.close()


def test_a_copied_ledger_goes_on_in_a_chain_of_its_own(tmp_path):
    first = make(tmp_path / "first.db", receipt(1))
    shutil.copyfile(first.path, tmp_path / "copy.db")
    make(first.path, receipt(2))
    copy = make(tmp_path / "copy.db", receipt(3))
    with first:
        assert first.merge(copy.path).added == 1
        assert first.verify().problems == []
        assert {entry["id"] for entry in first.entries()} == {"r1", "r2", "r3"}


def test_a_ledger_restored_in_place_is_a_conflict_and_changes_nothing(tmp_path):
    mine, backup = tmp_path / "mine.db", tmp_path / "backup"
    make(mine, receipt(1))
    shutil.copyfile(mine, backup)
    make(mine, receipt(2))
    with make(tmp_path / "total.db", receipt(9)) as total:
        total.merge(mine)
        before = state(total)
        shutil.copyfile(backup, mine)  # the same inode: it goes on with the same chain
        make(mine, receipt(3))
        with pytest.raises(StorageError, match=r"conflict: row 2 of chain .* Nothing was merged"):
            total.merge(mine)
        assert state(total) == before


def test_a_changed_receipt_under_the_same_id_is_a_conflict(place):
    a = make(place("a"), receipt(1))
    b = make(place("b"), receipt(1, gross_uj=1))
    with a, pytest.raises(StorageError, match="conflict: receipt r1"):
        a.merge(b.path)


def test_a_damaged_ledger_is_not_merged(tmp_path):
    a, b = make(tmp_path / "a.db", receipt(1)), make(tmp_path / "b.db", receipt(2))
    assert change(b.path, "UPDATE entries SET document = replace(document, '2.0', '1.0')", [])
    with a:
        with pytest.raises(StorageError, match="it is damaged: chain .* row 1 was changed"):
            a.merge(b.path)
        with pytest.raises(StorageError, match="there is no ledger"):
            a.merge(tmp_path / "none.db")
        assert len(a.entries()) == 1


def test_a_receipt_that_comes_in_two_chains_counts_once(place):
    a = make(place("a"), receipt(1))
    b = make(place("b"), receipt(1))
    with a:
        a.merge(b.path)
        assert a.verify().problems == []
        assert a.verify().rows == 2
        [row] = a.summary()
        assert (row.receipts, row.gross_uj) == (1, 2_000_000)


def old_and_new(count=6):
    for number in range(count):
        begin_ns = number * 10 * SECOND
        yield receipt(f"old{number}", started_at=OLD, begin_ns=begin_ns, tag=f"t{number % 2}")
        yield receipt(f"old{number}b", started_at=OLD, begin_ns=begin_ns + SECOND // 2)
    for number in range(count, 2 * count):
        yield receipt(f"new{number}", started_at=NEW, begin_ns=number * 10 * SECOND)


def sums_of(ledger):
    """Sums by every column, without the last digits of floats."""
    return {
        name: [
            {
                key: round(value, 9) if isinstance(value, float) else value
                for key, value in asdict(row).items()
            }
            for row in ledger.summary(by=(name,))
        ]
        for name in COLUMNS
    }


def test_compaction_keeps_sums_heads_and_verification(place):
    with make(place("l"), *old_and_new()) as ledger:
        before, head = sums_of(ledger), ledger.head()
        done = ledger.compact("2026-11-21")
        assert (done.rows, done.receipts) == (12, 12)
        assert sums_of(ledger) == before
        assert {entry["id"][:4] for entry in ledger.entries()} == {"rnew"}
        assert ledger.verify(head).problems == []
        assert ledger.verify().compacted == 12
        assert ledger.compact("2026-11-21").rows == 0
        noted = ledger.head()
        ledger.append(receipt("later", started_at=NEW)).wait()
        assert ledger.verify(noted).problems == []
        everything = sums_of(ledger)
        assert ledger.compact("2030-01-01").receipts == 7
        assert ledger.compact("2030-01-01").rows == 0  # its own note does not count
        assert sums_of(ledger) == everything
        assert ledger.entries() == []
        [problem] = ledger.verify(noted).problems
        assert "a compaction removed rows that came after" in problem
        ledger.append(receipt("last")).wait()
        assert ledger.verify().problems == []


def test_compaction_gives_the_space_back(tmp_path):
    rows = [receipt(number, started_at=OLD) for number in range(2000)]
    ledger = make(tmp_path / "l.db", *rows)
    size = ledger.path.stat().st_size
    with ledger:
        ledger.compact("2026-11-21")
    assert ledger.path.stat().st_size < size / 5


def test_compaction_spares_what_overlaps_a_receipt_that_stays(place):
    with make(
        place("l"),
        receipt(1, started_at=OLD, begin_ns=0),
        receipt(2, started_at=OLD, begin_ns=10 * SECOND),
        receipt(3, started_at=NEW, begin_ns=10 * SECOND + SECOND // 2),
    ) as ledger:
        before = sums_of(ledger)
        assert ledger.compact("2026-11-21").receipts == 1
        assert sums_of(ledger) == before
        assert ledger.verify().problems == []
        ledger.append(receipt(4, started_at=NEW, begin_ns=10 * SECOND)).wait()
        assert ledger.verify().problems == []


def test_the_sums_of_a_checkpoint_cannot_be_changed_unnoticed(tmp_path):
    with make(tmp_path / "l.db", *old_and_new()) as ledger:
        ledger.compact("2026-11-21")
    assert change(
        ledger.path, "UPDATE checkpoints SET totals = replace(totals, '4500000', '500000')", []
    )
    with ledger:
        assert any("checkpoint was changed" in problem for problem in ledger.verify().problems)


def test_a_compacted_ledger_merges_where_its_rows_are_or_none_of_them(place):
    source = make(place("s"), *old_and_new())
    with make(place("early")) as early, make(place("full")) as full:
        full.merge(source.path)
        with source:
            source.compact("2026-11-21")
            expected = sums_of(source)
        early.merge(source.path)
        assert sums_of(early) == expected
        assert early.verify().problems == []
        assert early.merge(source.path).added == 0
        assert full.merge(source.path).added == 1  # the note of the compaction
        assert sums_of(full) == expected
        assert full.verify().problems == []


def test_rows_that_were_compacted_before_they_were_merged_are_missed(place):
    path = place("s")
    make(path, receipt(1, started_at=OLD))
    with make(place("total")) as total:
        total.merge(path)
        with make(path, receipt(2, started_at=OLD)) as source:
            source.compact("2026-11-21")
        with pytest.raises(StorageError, match="has compacted rows 2 to 2 .* before you compact"):
            total.merge(path)
        assert len(total.entries()) == 1
