"""What a ledger has acknowledged survives kill -9, a full disk, and an unawaited end."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from ledger_fakes import receipt

from leangen.errors import RequestError, StorageError
from leangen.ledger import Ledger

WRITER = """
import sys, time
import ledger_fakes
from leangen.ledger import Ledger
name, group = sys.argv[2], int(sys.argv[3])
ledger = Ledger(sys.argv[1])
for number in range(100_000):
    ids = [f"{name}-{number}-{part}" for part in range(group)]
    begin_ns = time.monotonic_ns()  # a few windows of the processes overlap
    receipts = [ledger_fakes.receipt(id, begin_ns=begin_ns, duration_ns=10**6) for id in ids]
    for ticket in [ledger.append(receipt) for receipt in receipts]:
        ticket.wait()
    print(*("r" + id for id in ids), flush=True)
"""


def python(code, *arguments, **options):
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "tests")])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def kill_writers(path, rounds, seed):
    """4 processes write, are killed at some moment, `rounds` times over; what they were told."""
    draw = random.Random(seed)
    acknowledged = set()
    for number in range(rounds):
        writers = [python(WRITER, path, f"{number}{name}", draw.randint(1, 6)) for name in "abcd"]
        first = draw.choice(writers).stdout.readline()  # the others may die before theirs
        acknowledged.update(first.split())
        time.sleep(draw.uniform(0, 0.5))
        for writer in draw.sample(writers, 4):
            writer.kill()
            time.sleep(draw.choice([0, 0.001, 0.02]))
        for writer in writers:
            out, err = writer.communicate(timeout=60)
            assert not err, err
            whole = out[: out.rfind("\n") + 1]  # a line cut by the kill was not acknowledged
            acknowledged.update(whole.split())
    return acknowledged


def assert_nothing_lost(path, acknowledged):
    with Ledger(path) as ledger:
        assert ledger.verify().problems == []
        ids = {entry["id"] for entry in ledger.entries()}
        assert acknowledged <= ids
        assert sum(row.receipts for row in ledger.summary()) == len(ids)


def test_killed_writers_lose_nothing_acknowledged(place):
    acknowledged = kill_writers(place("ledger"), rounds=3, seed=0)
    assert len(acknowledged) > 10
    assert_nothing_lost(place("ledger"), acknowledged)


@pytest.mark.slow
def test_two_hundred_kills_lose_nothing_acknowledged(tmp_path):
    acknowledged = kill_writers(tmp_path / "ledger.db", rounds=50, seed=1)
    print(f"{len(acknowledged)} receipts were acknowledged")
    assert len(acknowledged) > 1000
    assert_nothing_lost(tmp_path / "ledger.db", acknowledged)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_a_clear_error_and_old_rows_stay(small_disk):
    acknowledged = set()
    with Ledger(small_disk / "ledger.db") as ledger:
        with pytest.raises(StorageError, match="disk full: .* is intact; free some space"):
            for number in range(10_000):
                ledger.append(receipt(number, begin_ns=number * 10**9)).wait()
                acknowledged.add(f"r{number}")
        assert len(acknowledged) > 50
        assert {entry["id"] for entry in ledger.entries()} == acknowledged
        assert ledger.verify().problems == []
        with pytest.raises(StorageError, match="disk full"):  # told by flush where nobody waits
            for number in range(200):
                ledger.append(receipt(f"more{number}"))
            ledger.flush()
        assert acknowledged <= {entry["id"] for entry in ledger.entries()}
    with Ledger(small_disk / "ledger.db") as again:
        assert again.verify().problems == []


def test_a_ledger_that_is_opened_on_a_full_disk_says_that_it_is_full(small_disk):
    with Ledger(small_disk / "ledger.db") as ledger:
        ledger.append(receipt("a")).wait()
    with suppress(OSError), (small_disk / "fill").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(StorageError, match="disk full"), Ledger(small_disk / "ledger.db") as full:
        full.entries()
    (small_disk / "fill").unlink()
    with Ledger(small_disk / "ledger.db") as again:
        assert [entry["id"] for entry in again.entries()] == ["ra"]


def test_a_ledger_on_a_read_only_file_system_is_read_and_merged(small_disk, tmp_path):
    with Ledger(small_disk / "ledger.db") as ledger:
        ledger.append(receipt("a")).wait()
        head = ledger.head()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with Ledger(small_disk / "ledger.db") as still, Ledger(tmp_path / "total.db") as total:
        assert still.verify(head).problems == []
        assert [row.receipts for row in still.summary()] == [1]
        assert total.merge(small_disk / "ledger.db").added == 1
        with pytest.raises(StorageError, match="readonly database; choose a writable place"):
            still.append(receipt("b")).wait()


def test_a_killed_process_on_a_full_disk_loses_nothing(small_disk):
    """The log is all that holds the last receipts then: it must be read back."""
    path = small_disk / "ledger.db"
    code = WRITER.replace("\nfor number", "\nimport os, leangen.errors\nfor number").replace(
        "        ticket.wait()",
        "        try:\n            ticket.wait()\n"
        "        except leangen.errors.StorageError:\n            os.kill(os.getpid(), 9)",
    )
    writer = python(code, path, "full", 1)
    out, _ = writer.communicate(timeout=60)
    assert writer.returncode == -9
    assert_nothing_lost(path, set(out.split()))


def test_append_returns_while_another_process_holds_the_ledger(tmp_path):
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.append(receipt("first")).wait()
        other = sqlite3.connect(ledger.path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        tickets = [ledger.append(receipt(number)) for number in range(50)]
        again = ledger.append(receipt(3))
        time.sleep(0.05)
        assert not any(ticket.done for ticket in [*tickets, again])
        with pytest.raises(TimeoutError, match=r"within 0\.01 s"):
            tickets[0].wait(0.01)
        other.execute("ROLLBACK")
        other.close()
        for ticket in tickets:
            ticket.wait()
        with pytest.raises(StorageError, match="holds receipt r3 already"):
            again.wait()  # and spoils it for no other
        ledger.flush()
        assert len(ledger.entries()) == 51


def test_what_is_read_contains_what_was_appended_before(tmp_path):
    with Ledger(tmp_path / "ledger.db") as ledger:
        for number in range(30):
            ledger.append(receipt(number))
            assert len(ledger.entries()) == number + 1


def test_a_receipt_that_json_cannot_hold_is_refused_at_once(tmp_path):
    with Ledger(tmp_path / "ledger.db") as ledger:
        for bad in ({"top_p": float("nan")}, {"data": object()}):
            with pytest.raises(RequestError, match="receipt r1 cannot be kept"):
                ledger.append(receipt(1, request=bad))
        ledger.append(receipt(1, request={"prompt": "half a pair \ud83d"})).wait()
        assert ledger.entries()[0]["request"]["prompt"] == "half a pair \ud83d"
        with pytest.raises(RequestError, match="receipt r2 cannot be kept"):
            ledger.append(receipt(2, tag="\ud83d"))
        ledger.append(receipt(3)).wait()


UNWAITED = """
import sys
from contextlib import suppress
from pathlib import Path
import ledger_fakes
from leangen.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
for number in range(20):
    ledger.append(ledger_fakes.receipt(number))
"""


def test_a_process_that_ends_without_waiting_still_writes(tmp_path):
    child = python(UNWAITED, tmp_path / "ledger.db")
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "")
    with Ledger(tmp_path / "ledger.db") as ledger:
        assert len(ledger.entries()) == 20


def test_a_failure_that_nobody_waited_for_is_said_at_the_end(tmp_path):
    (tmp_path / "ledger.db").write_text("not a ledger")
    child = python(UNWAITED, tmp_path / "ledger.db")
    _, err = child.communicate(timeout=60)
    assert err.startswith("leangen: error: ") and "is not a ledger" in err
    assert "Traceback" not in err


def test_a_server_needs_no_new_thread_to_write(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "ledger.db")

    def no_thread(_):
        raise AssertionError("a thread that cannot begin may be waited for for ever")

    with ledger.writing():
        monkeypatch.setattr(threading.Thread, "start", no_thread)
        for number in range(5):
            ledger.append(receipt(number)).wait(10)
            time.sleep(0.02)  # nothing left to write
        assert threading.active_count() > 1
    monkeypatch.undo()
    ledger.append(receipt("after")).wait(10)
    assert len(ledger.entries()) == 6


def test_without_memory_a_receipt_is_refused_and_the_next_is_written(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "ledger.db")

    def no_memory(*_):
        raise MemoryError

    with ledger.writing():
        monkeypatch.setattr(ledger._committer, "_commit", no_memory)
        with pytest.raises(StorageError, match="no memory"):
            ledger.append(receipt("lost")).wait(10)
        monkeypatch.undo()
        ledger.append(receipt("kept")).wait(10)
    monkeypatch.setattr(threading.Thread, "start", no_memory)
    ledger.append(receipt("by the caller")).wait(10)
    assert {entry["id"] for entry in ledger.entries()} == {"rkept", "rby the caller"}


def test_a_process_that_ends_while_a_thread_is_kept_ends(tmp_path):
    code = """
import sys, ledger_fakes
from leangen.ledger import Ledger
ledger = Ledger(sys.argv[1])
with ledger.writing():
    ledger.append(ledger_fakes.receipt("last"))
    sys.exit(3)
"""
    with python(code, tmp_path / "ledger.db") as ended:
        assert ended.wait(30) == 3, ended.stderr.read()
    assert [entry["id"] for entry in Ledger(tmp_path / "ledger.db").entries()] == ["rlast"]
