"""Budgets: what is spent is the ledger's, limits warn or refuse, and unknown is never 0."""

from __future__ import annotations

import json

import pytest
from ledger_fakes import receipt

from leangen import budget as budgets
from leangen import clock
from leangen.budget import Budget, Guard
from leangen.cli import main
from leangen.errors import RequestError, StorageError
from leangen.ledger import Ledger


@pytest.fixture
def ledger(tmp_path):
    """Today 2 J measured and 3 J estimated, tagged; one not measured; a year ago 50 J."""
    now = clock.utc_now()
    with Ledger(tmp_path / "ledger.db") as opened:
        opened.append(receipt(1, started_at=now, tag="x"))
        opened.append(receipt(2, started_at=now, source="estimated", gross_uj=3_000_000))
        opened.append(receipt(3, started_at=now, source="unavailable", gross_uj=None))
        opened.append(receipt(4, started_at="2020-01-01T00:00:00.000Z", gross_uj=50_000_000))
        opened.flush()
        yield opened


@pytest.mark.parametrize(
    ("given", "amount"),
    [
        ({"per": "day"}, 5.0),
        ({"per": "month"}, 5.0),
        ({"per": "day", "tag": "x"}, 2.0),
        ({"per": "tag", "tag": "x"}, 2.0),
        ({"per": "tag", "tag": "none"}, 0.0),
        ({"per": "day", "unit": "gCO2e"}, 0.5),
    ],
)
def test_what_is_spent_is_what_the_ledger_holds(ledger, given, amount):
    state = budgets.spent(Budget(limit=5.0, **given), ledger, clock.utc_now())
    assert state.amount == pytest.approx(amount)
    assert state.exceeded == (amount >= 5.0)
    assert state.unmeasured == (1 if "tag" not in given else 0)


@pytest.mark.parametrize(
    ("per", "now", "resets_at"),
    [
        ("day", "2036-11-30T23:59:59.999Z", "2036-12-01T00:00Z"),
        ("day", "2024-02-28T00:00:00.000Z", "2024-02-29T00:00Z"),
        ("month", "2036-11-30T23:59:59.999Z", "2036-12-01T00:00Z"),
        ("month", "2036-12-31T23:59:59.999Z", "2037-01-01T00:00Z"),
        ("month", "2036-01-01T00:00:00.000Z", "2036-02-01T00:00Z"),
    ],
)
def test_when_it_resets(ledger, per, now, resets_at):
    state = budgets.spent(Budget(per=per, limit=1), ledger, now)
    assert (state.amount, state.resets_at) == (0.0, resets_at)


def test_a_used_up_budget_refuses_and_says_all_that_matters(ledger, tmp_path):
    guard = Guard(tmp_path, ledger, [Budget(per="day", limit=4, on_exceed="refuse")])
    with pytest.raises(RequestError) as refusal:
        guard.before(None)
    text = str(refusal.value)
    assert "budget day-J: 5 of 4 J spent (3 estimated, 2 measured)" in text
    assert "1 generations were not measured and are not in it" in text
    assert "it resets at" in text and "`leangen budget rm day-J`" in text


def test_a_used_up_budget_warns_and_one_with_something_left_is_silent(ledger, tmp_path):
    said = []
    guard = Guard(
        tmp_path,
        ledger,
        [Budget(per="day", limit=4), Budget(per="month", limit=6)],
        notify=said.append,
    )
    guard.before(None)
    [warning] = said
    assert warning.startswith("warning: budget day-J")


def test_a_tags_budget_holds_for_that_tag_only(ledger, tmp_path):
    guard = Guard(tmp_path, ledger, [Budget(per="tag", tag="x", limit=1, on_exceed="refuse")])
    guard.before(None)
    guard.before("y")
    with pytest.raises(RequestError, match="tag-J:x"):
        guard.before("x")


def test_a_request_is_judged_afterwards(ledger, tmp_path):
    said = []
    guard = Guard(tmp_path, ledger, [Budget(per="request", limit=1)], notify=said.append)
    guard.before(None)
    assert said == []
    guard.after(receipt(5, gross_uj=500_000))
    assert said == []
    guard.after(receipt(6))
    assert "took 2 J (measured), the limit is 1" in said[-1]
    guard.after(receipt(7, gross_uj=None, source="unavailable"))
    assert "was not measured" in said[-1]


def test_the_stores_budgets_hold_at_once(ledger, tmp_path):
    guard = Guard(tmp_path, ledger)
    guard.before(None)
    budgets.keep(tmp_path, Budget(per="day", limit=4, on_exceed="refuse"))
    with pytest.raises(RequestError, match="day-J"):
        guard.before(None)
    budgets.keep(tmp_path, Budget(per="day", limit=40, on_exceed="refuse"))
    guard.before(None)
    assert [kept.limit for kept in budgets.read(tmp_path)] == [40]
    budgets.remove(tmp_path, "day-J")
    assert budgets.read(tmp_path) == []
    with pytest.raises(RequestError, match="there is no budget 'day-J': there are none"):
        budgets.remove(tmp_path, "day-J")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"per": "week", "limit": 1}, "per is 'week', expected one of day, month, tag, request"),
        ({"per": "day", "limit": -1}, "limit is -1, expected J of 0 or more"),
        ({"per": "day", "limit": float("nan")}, "limit is nan"),
        ({"per": "day", "limit": "1"}, "limit is '1'"),
        ({"per": "tag", "limit": 1}, "needs the tag"),
        ({"per": "request", "limit": 1, "on_exceed": "refuse"}, "can only warn"),
    ],
)
def test_budgets_that_make_no_sense(given, text):
    with pytest.raises(RequestError, match=text):
        Budget(**given)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"schema": "x"}',
        '{"schema":"leangen.budgets/1","budgets":[{"per":"day","limit":-1}]}',
    ],
)
def test_a_damaged_file_is_named_and_left_alone(tmp_path, content):
    (tmp_path / budgets.FILE).write_text(content)
    with pytest.raises(StorageError, match="holds no budgets .* remove it"):
        budgets.read(tmp_path)
    assert (tmp_path / budgets.FILE).read_text() == content


def test_the_commands(home, capsys):
    assert main(["budget", "show"]) == 0
    assert "there are no budgets" in capsys.readouterr().err
    assert main(["budget", "set", "day", "--joules", "5", "--on-exceed", "refuse"]) == 0
    assert main(["budget", "set", "request", "--gco2e", "0.5"]) == 0
    assert capsys.readouterr().out.split() == ["day-J", "request-gCO2e"]
    assert main(["budget", "show", "--json"]) == 0
    day, request = json.loads(capsys.readouterr().out)
    assert (day["amount"], day["exceeded"], request["name"]) == (0.0, False, "request-gCO2e")
    assert main(["budget", "show"]) == 0
    assert "0 of 5 J spent" in capsys.readouterr().out
    assert main(["budget", "rm", "week-J"]) == 2
    assert main(["budget", "rm", "day-J"]) == 0
