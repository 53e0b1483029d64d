"""The ledger: what it acknowledges stays, sums neither mix nor double, foreign files stay."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ledger_fakes import receipt

from leangen.errors import RequestError, StorageError
from leangen.ledger import COLUMNS, Ledger, own_time
from leangen.records import Units


@pytest.fixture
def ledger(place):
    with Ledger(place("ledger")) as opened:
        yield opened


@pytest.fixture
def file_ledger(tmp_path):
    with Ledger(tmp_path / "ledger.db") as opened:
        yield opened


def fill(ledger, *receipts):
    for number, entry in enumerate(receipts):
        ledger.append(replace(entry, id=f"r{number}"))
    ledger.flush()


def test_what_goes_in_comes_out_newest_first(ledger):
    first, second = receipt(1), receipt(2, tag="x", scheme="int8")
    ledger.append(first)
    ledger.append(second)
    assert ledger.entries() == [second.to_json(), first.to_json()]
    assert ledger.entries(limit=1) == [second.to_json()]
    assert ledger.entries({"scheme": "int4"}) == [first.to_json()]
    assert ledger.entries({"tag": "x", "day": "2026-11-21"}) == [second.to_json()]
    with Ledger(ledger.path) as again:
        assert len(again.entries()) == 2


def test_a_ledger_that_is_not_there_is_empty_and_not_made(tmp_path):
    ledger = Ledger(tmp_path / "none" / "ledger.db")
    assert ledger.entries() == []
    assert ledger.summary() == []
    assert not ledger.path.parent.exists()


def test_sums_by_model_and_scheme(ledger):
    fill(
        ledger,
        receipt(gross_uj=2_000_000),
        receipt(gross_uj=3_000_001),
        receipt(gross_uj=7_000_000, scheme="int8"),
    )
    int4, int8 = ledger.summary()
    assert int4.group == {"model": "smollm2-135m", "scheme": "int4"}
    assert (int4.receipts, int4.units, int4.duration_s) == (2, 128, 2.0)
    assert int4.gross_uj == 5_000_001
    assert int4.u_j == pytest.approx((0.3**2 + 0.3**2 + 0.2**2) ** 0.5)
    assert int4.carbon_g == pytest.approx(0.5)
    assert int4.per_unit_j == pytest.approx(5.000001 / 128)
    assert (int8.gross_uj, int8.overlapping) == (7_000_000, 0)
    assert int8.to_json()["gross_j"] == 7.0


def test_an_estimate_and_an_unknown_are_kept_apart_from_what_was_measured(ledger):
    fill(
        ledger,
        receipt(gross_uj=1_000_000),
        receipt(gross_uj=50_000_000, source="estimated", scope=("process-1",)),
        receipt(gross_uj=None, source="unavailable"),
    )
    by_source = {row.source: row for row in ledger.summary()}
    assert by_source["measured"].gross_uj == 1_000_000
    assert by_source["estimated"].gross_uj == 50_000_000
    unknown = by_source["unavailable"]
    assert (unknown.receipts, unknown.units) == (1, 64)
    assert (unknown.gross_uj, unknown.u_j, unknown.carbon_g, unknown.per_unit_j) == (None,) * 4


def test_units_of_different_kinds_are_not_added(ledger):
    fill(ledger, receipt(), receipt(units=Units(kind="pixel", count=9)))
    assert {(row.unit, row.units) for row in ledger.summary(by=())} == {("token", 64), ("pixel", 9)}


@pytest.mark.parametrize("name", sorted(COLUMNS))
def test_every_column_groups_and_filters(ledger, name):
    fill(ledger, receipt(tag="t"), receipt(tag="t"))
    [row] = ledger.summary(by=(name,))
    assert row.receipts == 2
    [row] = ledger.summary(by=("model", name), where={name: row.group[name]})
    assert row.receipts == 2


def test_unknown_columns_are_refused_even_without_a_file(tmp_path):
    ledger = Ledger(tmp_path / "none.db")
    for call in (
        lambda: ledger.summary(by=("modle",)),
        lambda: ledger.summary(where={"1=1; --": "x"}),
        lambda: ledger.entries({"modle": "x"}),
    ):
        with pytest.raises(RequestError, match="expected one of model, scheme"):
            call()


def test_two_windows_over_the_same_time_count_once(ledger):
    fill(ledger, receipt(begin_ns=0), receipt(begin_ns=0, scheme="int8"))
    rows = ledger.summary()
    assert [row.gross_uj for row in rows] == [1_000_000, 1_000_000]
    assert [row.overlapping for row in rows] == [1, 1]
    assert sum(row.carbon_g for row in rows) == pytest.approx(0.2)
    [filtered] = ledger.summary(where={"scheme": "int8"})
    assert filtered.gross_uj == 1_000_000


def test_partly_overlapping_windows_count_their_union(ledger):
    second = 1_000_000_000
    fill(
        ledger,
        receipt(begin_ns=0, gross_uj=10_000_000),
        receipt(begin_ns=second // 2, gross_uj=10_000_000),
        receipt(begin_ns=3 * second, gross_uj=10_000_000),
    )
    [row] = ledger.summary()
    assert row.gross_uj == 25_000_000  # 1.5 s and 1 s at 10 W
    assert row.overlapping == 2


@pytest.mark.parametrize(
    "other",
    [
        {"begin_ns": 1_000_000_000},  # begins when the first ends
        {"begin_ns": 0, "host": "h2"},
        {"begin_ns": 0, "boot_id": "b2"},
        {"begin_ns": 0, "scope": ("package-1",)},
        {"begin_ns": None},
    ],
)
def test_windows_apart_in_time_machine_boot_or_domain_are_summed(ledger, other):
    fill(ledger, receipt(begin_ns=0), receipt(**other))
    [row] = ledger.summary()
    assert (row.gross_uj, row.overlapping) == (4_000_000, 0)


def test_only_the_shared_domain_is_counted_once(ledger):
    fill(
        ledger,
        receipt(begin_ns=0, scope=("package-0",), gross_uj=2_000_000),
        receipt(begin_ns=0, scope=("package-0", "gpu-0"), gross_uj=8_000_000),
    )
    [row] = ledger.summary()
    assert row.gross_uj == 1_000_000 + 2_000_000 + 4_000_000


@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(1, 40)), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
)
def test_own_time_adds_up_to_the_union(spans, seed):
    windows = [(key, begin, begin + length) for key, (begin, length) in enumerate(spans)]
    own = own_time(windows)
    covered = {instant for _, begin, end in windows for instant in range(begin, end)}
    total = sum(own[key] * (end - begin) for key, begin, end in windows)
    assert total == pytest.approx(len(covered))
    assert all(0 < fraction <= 1 + 1e-12 for fraction in own.values())
    shuffled = list(windows)
    seed.shuffle(shuffled)
    assert own_time(shuffled) == pytest.approx(own)


@settings(max_examples=15)
@given(
    spans=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 15)), min_size=1, max_size=8),
)
def test_machine_energy_is_counted_once_in_any_order_of_arrival(tmp_path_factory, spans):
    """A machine at 10 W measured by overlapping generations: sums give 10 W x covered time."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.db"
    covered = {s for begin, length in spans for s in range(begin, begin + length)}
    with Ledger(path) as ledger:
        fill(
            ledger,
            *(
                receipt(
                    begin_ns=begin * 10**9,
                    duration_ns=length * 10**9,
                    gross_uj=length * 10_000_000,
                )
                for begin, length in spans
            ),
        )
        [row] = ledger.summary()
        assert ledger.verify().problems == []
    assert row.gross_uj == pytest.approx(len(covered) * 10_000_000, abs=len(spans))


def test_the_same_receipt_twice_is_refused_and_changes_nothing(ledger):
    ledger.append(receipt(1))
    with pytest.raises(StorageError, match="holds receipt r1 already"):
        ledger.append(receipt(1, gross_uj=9_000_000)).wait()
    assert [row.gross_uj for row in ledger.summary()] == [2_000_000]


FOREIGN = {
    "text": b"model,joules\nsmollm2,4.1\n" * 100,
    "zeros": bytes(8192),
    "half a header": b"SQLite form",
    "header and garbage": b"SQLite format 3\0" + b"\xff" * 8192,
}


@pytest.mark.parametrize("kind", sorted(FOREIGN))
def test_a_foreign_or_damaged_file_is_refused_and_left_alone(tmp_path, kind):
    path = tmp_path / "ledger.db"
    path.write_bytes(FOREIGN[kind])
    for use in (lambda x: x.append(receipt()).wait(), lambda x: x.entries(), lambda x: x.summary()):
        with Ledger(path) as ledger, pytest.raises(StorageError, match="ledger"):
            use(ledger)
    assert path.read_bytes() == FOREIGN[kind]


ANOTHER_PROCESS = """
import sys
from pathlib import Path
import ledger_fakes
from leangen.ledger import Ledger
with Ledger(Path(sys.argv[1])) as ledger:
    ledger.append(ledger_fakes.receipt(1)).wait()
"""


def test_several_ledgers_of_a_process_beside_those_of_another(file_ledger):
    file_ledger.append(receipt(0)).wait()
    with Ledger(file_ledger.path) as second:
        assert len(second.entries()) == 1
    subprocess.run(
        [sys.executable, "-c", ANOTHER_PROCESS, str(file_ledger.path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, sys.path))},
        check=True,
    )
    file_ledger.append(receipt(2)).wait()
    with Ledger(file_ledger.path) as again:
        assert [entry["id"] for entry in again.entries()] == ["r2", "r1", "r0"]


def test_another_programs_database_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "other.db"
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE receipts (mine)")
    db.commit()
    db.close()
    before = path.read_bytes()
    with Ledger(path) as ledger, pytest.raises(StorageError, match="of another program"):
        ledger.append(receipt()).wait()
    assert path.read_bytes() == before


def test_a_ledger_with_other_tables_is_named_and_left_alone(tmp_path):
    path = tmp_path / "ledger.db"
    with Ledger(path) as ledger:
        ledger.append(receipt()).wait()
    db = sqlite3.connect(path)
    db.execute("ALTER TABLE receipts RENAME COLUMN model TO modell")
    db.close()
    with Ledger(path) as ledger, pytest.raises(StorageError, match="not as leangen makes them"):
        ledger.append(receipt(1)).wait()


def test_a_newer_ledger_is_refused(file_ledger):
    file_ledger.append(receipt())
    file_ledger.close()
    db = sqlite3.connect(file_ledger.path)
    db.execute("PRAGMA user_version=99")
    db.close()
    with pytest.raises(StorageError, match="version 99, this leangen knows 2: update leangen"):
        file_ledger.entries()


def test_a_ledger_cut_short_is_damaged_not_empty(file_ledger):
    for number in range(200):
        file_ledger.append(receipt(number))
    file_ledger.close()
    data = file_ledger.path.read_bytes()
    file_ledger.path.write_bytes(data[: len(data) // 2])
    with pytest.raises(StorageError, match="damaged"):
        file_ledger.entries()


def test_a_folder_in_place_of_the_file(tmp_path):
    with Ledger(tmp_path) as ledger, pytest.raises(StorageError, match="Is a directory"):
        ledger.append(receipt()).wait()


FULL_DISK = """
import resource, sys
from pathlib import Path
import ledger_fakes
from leangen.errors import StorageError
from leangen.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]))
for number in range(20):
    ledger.append(ledger_fakes.receipt(number)).wait()
limit = Path(sys.argv[1] + "-wal").stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
done = 20
try:
    for number in range(20, 10_000):
        ledger.append(ledger_fakes.receipt(number)).wait()
        done += 1
except StorageError as error:
    print(done, error)
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


def test_when_the_disk_takes_no_more_the_error_is_clear_and_old_rows_stay(file_ledger):
    child = python(FULL_DISK, file_ledger.path)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err
    done, message = out.split(" ", 1)
    assert "ledger" in message
    # Whatever was acknowledged, and nothing else, is there and can be added to again.
    assert len(file_ledger.entries()) == int(done)
    file_ledger.append(receipt(10_001)).wait()
    assert len(file_ledger.entries()) == int(done) + 1


WRITER = """
import sys
import ledger_fakes
from leangen.ledger import Ledger
name, count = sys.argv[2], int(sys.argv[3])
ledger = Ledger(sys.argv[1])
for number in range(count):
    ledger.append(ledger_fakes.receipt(f"{name}-{number}")).wait()
    print(f"r{name}-{number}", flush=True)
"""


def test_several_processes_write_at_once_from_the_first_moment_on(ledger):
    writers = [python(WRITER, ledger.path, name, 25) for name in "abcd"]
    acknowledged = set()
    for writer in writers:
        out, err = writer.communicate(timeout=60)
        assert writer.returncode == 0, err
        acknowledged |= set(out.split())
    assert len(acknowledged) == 100
    assert {entry["id"] for entry in ledger.entries()} == acknowledged


def test_many_threads_and_a_fork_share_one_ledger(ledger):
    ledger.append(receipt("first"))
    threads = [
        threading.Thread(target=lambda name=name: ledger.append(receipt(name)))
        for name in "abcdefgh"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pid = os.fork()
    if pid == 0:
        try:
            ledger.append(receipt("child")).wait()
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    ledger.append(receipt("parent"))
    assert len(ledger.entries()) == 11


def test_reading_a_ledger_loads_no_runtime(file_ledger):
    file_ledger.append(receipt())
    child = python(
        "import sys; from pathlib import Path; from leangen.ledger import Ledger\n"
        "ledger = Ledger(Path(sys.argv[1])); ledger.entries(); ledger.summary(); ledger.close()\n"
        "print({'onnxruntime', 'onnx', 'numpy', 'gguf'} & set(sys.modules))",
        file_ledger.path,
    )
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out.strip()) == (0, "set()"), err
