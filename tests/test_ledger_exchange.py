"""Files of receipts: nothing is lost on the way out and back; codecarbon's columns and units."""

from __future__ import annotations

import csv
import json
import sys

import pytest
from ledger_fakes import receipt

from leangen.cli import main
from leangen.errors import DependencyError, RequestError, SourceError, StorageError
from leangen.ledger import Ledger, codecarbon
from leangen.ledger.exchange import export, load

RECEIPTS = (
    receipt("a", tag='quote " , and\nline ☕', begin_ns=0, gross_uj=1_234_567),
    receipt("b", gross_uj=None, source="unavailable"),
    receipt("c", scope=("package-0", "dram", "gpu-0"), gross_uj=6_000_000, begin_ns=500_000_000),
    receipt("d", source="estimated", scope=("process-1",)),
)


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.db") as opened:
        for entry in RECEIPTS:
            opened.append(entry)
        yield opened


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
def test_what_was_exported_is_imported_exactly(ledger, tmp_path, form):
    assert export(ledger, tmp_path / "out", form) == 4
    with Ledger(tmp_path / "again.db") as again:
        done = load(again, tmp_path / "out")
        assert (done.added, done.known) == (4, 0)
        assert again.entries() == ledger.entries()
        assert again.summary() == ledger.summary()
        done = load(again, tmp_path / "out")
        assert (done.added, done.known) == (0, 4)
        assert again.verify().problems == []
        assert export(again, tmp_path / "twice", form) == 4
    assert (tmp_path / "twice").read_bytes() == (tmp_path / "out").read_bytes()


def test_the_csv_is_flat_and_unknown_is_empty(ledger, tmp_path):
    export(ledger, tmp_path / "out.csv", "csv")
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["gross_j"] for row in rows] == ["1.234567", "", "6.0", "2.0"]
    assert rows[0]["tag"] == 'quote " , and\nline ☕'
    assert rows[1]["source"] == "unavailable"


def test_a_receipt_may_be_long_and_the_process_s_csv_is_as_it_was(tmp_path):
    before = csv.field_size_limit()
    with Ledger(tmp_path / "long.db") as ledger, Ledger(tmp_path / "again.db") as again:
        ledger.append(receipt(tag="x" * (before + 1)))
        export(ledger, tmp_path / "long.csv", "csv")
        assert load(again, tmp_path / "long.csv").added == 1
        assert again.summary() == ledger.summary()
        with pytest.raises(SourceError):
            load(again, tmp_path / "long.db")
    assert csv.field_size_limit() == before


def test_an_empty_ledger_exports_an_empty_file(tmp_path):
    with Ledger(tmp_path / "none.db") as ledger:
        assert export(ledger, tmp_path / "out.csv", "csv") == 0
        assert load(ledger, tmp_path / "out.csv").added == 0


def test_codecarbon_columns_and_units(ledger, tmp_path):
    export(ledger, tmp_path / "emissions.csv", "codecarbon")
    with (tmp_path / "emissions.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == codecarbon.COLUMNS
    first, unknown, parts, _ = rows
    assert float(first["energy_consumed"]) == pytest.approx(1.234567 / 3.6e6)
    assert float(first["emissions"]) == pytest.approx(1.234567 * 0.1 / 1000)
    assert first["timestamp"] == "2026-11-21T08:00:01"
    assert (unknown["energy_consumed"], unknown["emissions"]) == ("", "")
    for part in ("cpu", "gpu", "ram"):
        assert float(parts[f"{part}_energy"]) == pytest.approx(2 / 3.6e6)
        assert float(parts[f"{part}_power"]) == pytest.approx(2.0)


def emissions(tmp_path, *rows):
    """An `emissions.csv` as codecarbon 2.3 wrote it, with fewer columns than today."""
    columns = (
        "timestamp,project_name,run_id,duration,emissions,emissions_rate,cpu_power,gpu_power,"
        "ram_power,cpu_energy,gpu_energy,ram_energy,energy_consumed,country_name,country_iso_code,"
        "region,python_version,codecarbon_version,tracking_mode,on_cloud,pue"
    )
    start = "codecarbon,123e4567-e89b-12d3-a456-426614174000,10.0"
    end = "Canada,CAN,quebec,3.10.12,2.3.5,machine,N,1.0"
    path = tmp_path / "emissions.csv"
    lines = [f"2024-07-19T15:57:43,{start},{row},{end}" for row in rows]
    path.write_text("\n".join([columns, *lines]) + "\n")
    return path


def test_codecarbon_rows_become_receipts_that_say_how_little_is_known(tmp_path):
    path = emissions(
        tmp_path,
        "0.002,0.0002,42.5,0,3,0.009,0,0.001,0.01",
        "0.002,0.0002,0,300,0,0,0.01,0,0.01",
        "0.0,0.0,0,0,0,0,0,0,0.0",
    )
    with Ledger(tmp_path / "l.db") as ledger:
        assert load(ledger, path).added == 3
        assert load(ledger, path).known == 3
        rows = {entry["energy"]["source"]: entry for entry in ledger.entries()}
    estimated, measured, unknown = rows["estimated"], rows["measured"], rows["unavailable"]
    assert estimated["energy"]["gross_j"] == pytest.approx(0.01 * 3.6e6)
    assert estimated["energy"]["u_j"] == pytest.approx(0.6 * 0.01 * 3.6e6)
    assert "does not say which parts were read" in estimated["energy"]["reason"]
    assert estimated["carbon"]["g"] == pytest.approx(2.0)
    assert estimated["carbon"]["intensity_g_per_kwh"] == pytest.approx(200)
    assert estimated["started_at"] == "2024-07-19T15:57:33.000Z"
    assert "its file gives no uncertainty" in measured["energy"]["reason"]
    assert unknown["energy"]["gross_j"] is None
    assert unknown["carbon"]["g"] is None
    assert "or 0, as it does when it measured nothing" in unknown["energy"]["reason"]


def test_our_own_codecarbon_export_is_not_counted_twice(tmp_path):
    with Ledger(tmp_path / "l.db") as ledger:
        ledger.append(receipt(id="0123456789abcdef" * 2))
        export(ledger, tmp_path / "emissions.csv", "codecarbon")
        assert load(ledger, tmp_path / "emissions.csv").known == 1


GOOD = json.dumps(receipt("good").to_json())
BAD = {
    "not JSON": "{",
    "a list": "[1]",
    "another schema": '{"schema": "leangen.receipt/9"}',
    "a part is missing": json.dumps({**receipt("x").to_json(), "energy": {}}),
    "a wrong type": json.dumps({**receipt("x").to_json(), "units": 3}),
    "an infinity": GOOD.replace('"duration_ns"', '"more": 1e999, "duration_ns"'),
    "a NaN": GOOD.replace('"gross_j": 2.0', '"gross_j": NaN'),
    "a negative energy": GOOD.replace('"gross_j": 2.0', '"gross_j": -2.0'),
    "a huge duration": GOOD.replace('"duration_ns": 1000000000', '"duration_ns": 1' + "0" * 30),
    "nested too deep": '{"a":' * 100_000,
}


@pytest.mark.parametrize("kind", sorted(BAD))
def test_what_is_no_receipt_is_refused_with_its_number_and_nothing_is_added(tmp_path, kind):
    path = tmp_path / "bad.jsonl"
    path.write_text(GOOD.replace("rgood", "r0") + "\n" + BAD[kind] + "\n")
    with Ledger(tmp_path / "l.db") as ledger:
        with pytest.raises(SourceError, match="receipt 2 cannot be read: .* nothing was imported"):
            load(ledger, path)
        assert ledger.entries() == []


@pytest.mark.parametrize(
    "content", [b"", b"a,b\n1,2\n", b"\x00\xff" * 50, b"PAR1" + b"\x00" * 50, b'receipt\n"x\n']
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with Ledger(tmp_path / "l.db") as ledger:
        with pytest.raises(SourceError, match="expected"):
            load(ledger, tmp_path / "file")
        with pytest.raises(SourceError, match="No such file"):
            load(ledger, tmp_path / "none")
        assert ledger.entries() == []


def test_a_changed_receipt_is_a_conflict(ledger, tmp_path):
    changed = {**RECEIPTS[0].to_json(), "model": "another"}
    (tmp_path / "changed.jsonl").write_text(json.dumps(changed))
    with pytest.raises(StorageError, match="conflict: receipt ra"):
        load(ledger, tmp_path / "changed.jsonl")


def test_a_failed_export_leaves_what_was_there(ledger, tmp_path, monkeypatch):
    (tmp_path / "out").write_text("old")
    with pytest.raises(RequestError, match="expected one of csv, jsonl, parquet, codecarbon"):
        export(ledger, tmp_path / "out", "xml")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DependencyError, match=r"pip install 'leangen\[parquet\]'"):
        export(ledger, tmp_path / "out", "parquet")
    assert (tmp_path / "out").read_text() == "old"
    assert not list(tmp_path.glob(".out*"))


def test_the_commands(tmp_path, home, capsys):
    def run(*argv):
        code = main(["ledger", *map(str, argv)])
        return code, capsys.readouterr()

    with Ledger(home / "ledger.sqlite") as ledger:
        for entry in RECEIPTS:
            ledger.append(entry)
    code, shown = run("head")
    head = shown.out.strip()
    assert (code, len(head)) == (0, 64)
    assert run("verify", "--head", head)[0] == 0
    code, shown = run("verify", "--head", "00" * 32)
    assert (code, shown.out) == (2, "")
    assert "no state of this ledger has the head 00" in shown.err
    code, shown = run("sum", "--by", "source", "--json", "--model", "smollm2-135m")
    assert [row["receipts"] for row in json.loads(shown.out)] == [1, 2, 1]
    assert run("sum", "--by", "colour")[0] == 2
    assert run("export", "--format", "jsonl", "-o", tmp_path / "out.jsonl")[0] == 0
    _, shown = run("import", tmp_path / "out.jsonl", "--json")
    assert json.loads(shown.out) == {"added": 0, "known": 4}
    _, shown = run("compact", "--older-than", "0", "--json")
    assert "before" in json.loads(shown.out)
    with Ledger(tmp_path / "other.db") as other:
        other.append(receipt("z"))
    _, shown = run("merge", tmp_path / "other.db", "--json")
    assert json.loads(shown.out)[0]["added"] == 1
    assert run("verify")[0] == 0
    code, shown = run("--json", "--last", "1")
    assert len(json.loads(shown.out)["entries"]) == 1
