"""A ledger in PostgreSQL: tampering is found, nodes share it, its server may crash."""

from __future__ import annotations

import json
import threading

import postgres_server
import pytest
from ledger_fakes import receipt

from leangen import doctor, host
from leangen.cli import main
from leangen.errors import StorageError
from leangen.ledger import Ledger

OLD, NEW = "2026-01-05T08:00:00.000Z", "2026-11-21T08:00:00.000Z"


@pytest.fixture
def address():
    return postgres_server.server().database()


def statement(address, sql):
    import psycopg

    with psycopg.connect(address, autocommit=True) as db:
        return db.execute(sql)


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE entries SET document = replace(document, 'int4', 'int8') WHERE seq = 2",
        "UPDATE entries SET hash = prev WHERE seq = 2",
        "UPDATE entries SET prev = hash WHERE seq = 3",
        "UPDATE receipts SET gross_uj = gross_uj - 1 WHERE id = 'r1'",
        "UPDATE receipts SET tag = 'x' WHERE id = 'r1'",
        "UPDATE rollups SET gross_uj = gross_uj - 1",
        "UPDATE rollups SET carbon_g = carbon_g * 0.99",
        "DELETE FROM rollups",
        "UPDATE windows SET energy_uj = energy_uj + 1 WHERE entry = 2",
        "UPDATE checkpoints SET totals = replace(totals, '2000000', '1000000')",
        "DELETE FROM windows; DELETE FROM receipts WHERE id = 'r2';"
        " DELETE FROM entries WHERE document LIKE '%\"r2\"%'",
    ],
)
def test_tampering_is_found(address, tampering):
    with Ledger(address) as ledger:
        ledger.append(receipt("old", started_at=OLD))
        ledger.flush()
        for number in range(3):
            ledger.append(receipt(number, started_at=NEW, begin_ns=number * 5 * 10**8))
        ledger.compact("2026-06-01")
        assert ledger.verify().problems == []
        for part in tampering.split(";"):
            statement(address, part)
        assert ledger.verify().problems


def test_a_cut_tail_is_found_by_a_head_that_was_noted(address):
    with Ledger(address) as ledger:
        for number in range(3):
            ledger.append(receipt(number))
        noted = ledger.head()
        assert ledger.verify(noted).problems == []
        statement(address, "DELETE FROM receipts WHERE id = 'r2'")
        statement(address, "DELETE FROM entries WHERE seq = 3")
        assert any("cut off its end" in problem for problem in ledger.verify(noted).problems)


def test_nodes_have_chains_of_their_own_in_one_ledger(address, monkeypatch):
    for node in ("one", "two"):
        monkeypatch.setattr(host, "host", lambda node=node: receipt(host=node).host)
        with Ledger(address) as ledger:
            for number in range(3):
                ledger.append(receipt(f"{node}-{number}", host=node))
    with Ledger(address) as ledger:
        checked = ledger.verify()
        assert (checked.rows, checked.chains, checked.problems) == (6, 2, [])
        assert [row.receipts for row in ledger.summary(by=("host",))] == [3, 3]


def test_the_ledger_of_a_node_is_merged_in(address, tmp_path, capsys, monkeypatch):
    with Ledger(tmp_path / "node.sqlite") as node:
        node.append(receipt("a"))
        node.append(receipt("b"))
    monkeypatch.setenv("LEANGEN_LEDGER", address)
    for added in (2, 0):
        assert main(["ledger", "merge", str(tmp_path / "node.sqlite"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)[0]["added"] == added
    assert main(["ledger", "verify"]) == 0
    secret = address.replace("postgres@", "postgres:secret@")
    [found] = doctor.ledger(secret)
    assert found.status == "ok"
    assert "secret" not in str(found)
    with Ledger(tmp_path / "copy.sqlite") as copy:
        assert copy.merge(address).added == 2
        assert copy.verify().problems == []


def test_what_was_acknowledged_outlives_the_servers_crash(address):
    server = postgres_server.server()
    with Ledger(address) as ledger:
        acknowledged, stop = set(), threading.Event()

        def write(name):
            for number in range(10_000):
                if stop.is_set():
                    return
                try:
                    ledger.append(receipt(f"{name}-{number}")).wait()
                except StorageError:
                    continue
                acknowledged.add(f"r{name}-{number}")

        threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        while len(acknowledged) < 20:
            pass
        server.stop()
        with pytest.raises(StorageError, match="cannot reach the ledger postgresql://postgres@"):
            ledger.append(receipt("while it is down")).wait()
        server.start()
        before = len(acknowledged)
        while len(acknowledged) < before + 5:
            pass
        stop.set()
        for thread in threads:
            thread.join()
        assert acknowledged <= {entry["id"] for entry in ledger.entries()}
        assert ledger.verify().problems == []


def test_a_foreign_database_is_left_alone(address):
    statement(address, "CREATE TABLE entries (x INTEGER)")
    with pytest.raises(StorageError, match="of another program"):
        Ledger(address).append(receipt()).wait()


def test_another_version_is_refused(address):
    with Ledger(address) as ledger:
        ledger.append(receipt()).wait()
    statement(address, "UPDATE ledger SET version = 99")
    with pytest.raises(StorageError, match="version 99, this leangen knows 2"):
        Ledger(address).entries()


def test_messages_do_not_show_the_password(tmp_path):
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    ledger = Ledger(f"postgresql://ann:secret@/none?host={tmp_path}")
    with pytest.raises(StorageError, match="cannot reach the ledger postgresql://ann@/none") as met:
        ledger.entries()
    assert "secret" not in str(met.value)
    assert "secret" not in str(ledger)
