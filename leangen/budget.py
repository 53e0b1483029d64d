"""Budgets: how many joules or gCO2e a day, a month, a tag or one request may take.

They are kept in `budgets.json` in the store. Before each generation what the ledger holds is
compared with them; a request's own cost is known, and compared, only afterwards. Days and months
are UTC, as the ledger's. Measured and estimated figures count alike, and the message tells them
apart; generations without a figure count as nothing, and the message says how many there were.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal, get_args

from leangen import clock
from leangen.console import figure, say
from leangen.errors import RequestError, StorageError
from leangen.files import write_atomic
from leangen.ledger import Ledger
from leangen.records import Receipt

FILE = "budgets.json"
SCHEMA = "leangen.budgets/1"

Per = Literal["day", "month", "tag", "request"]
Unit = Literal["J", "gCO2e"]
OnExceed = Literal["warn", "refuse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A limit. Raises RequestError for one that makes no sense."""

    per: Per
    limit: float
    unit: Unit = "J"
    tag: str | None = None
    """Only generations with this tag; needed when `per` is `tag`, which is over all time."""
    on_exceed: OnExceed = "warn"

    def __post_init__(self) -> None:
        for name, kind in (("per", Per), ("unit", Unit), ("on_exceed", OnExceed)):
            if getattr(self, name) not in get_args(kind):
                raise RequestError(
                    f"budget: {name} is {getattr(self, name)!r}, expected one of "
                    f"{', '.join(get_args(kind))}"
                )
        known = isinstance(self.limit, int | float) and not isinstance(self.limit, bool)
        if not known or not (math.isfinite(self.limit) and self.limit >= 0):
            raise RequestError(
                f"budget: limit is {self.limit!r}, expected {self.unit} of 0 or more"
            )
        if self.per == "tag" and not self.tag:
            raise RequestError("budget: a budget per tag needs the tag")
        if self.per == "request" and self.on_exceed == "refuse":
            raise RequestError(
                "budget: a request's cost is known only afterwards, so its budget can only warn"
            )

    @property
    def name(self) -> str:
        """What it is removed by: `day-J`, `month-gCO2e`, `tag-J:experiment-1`."""
        return f"{self.per}-{self.unit}" + (f":{self.tag}" if self.tag else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """How far a budget is used up."""

    budget: Budget
    amount: float
    """In the budget's unit: what is known, by whatever source."""
    by_source: dict[str, float]
    unmeasured: int
    """Generations without a figure, which are not in `amount`."""
    resets_at: str | None
    """UTC; None when it does not reset."""

    @property
    def exceeded(self) -> bool:
        """Whether nothing is left."""
        return self.amount >= self.budget.limit

    def to_json(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {"name": self.budget.name} | asdict(self) | {"exceeded": self.exceeded}

    def __str__(self) -> str:
        budget = self.budget
        parts = [f"{figure(amount)} {source}" for source, amount in self.by_source.items()]
        spent = f"{figure(self.amount)} of {figure(budget.limit)} {budget.unit} spent"
        text = f"budget {budget.name}: {spent}"
        text += f" ({', '.join(parts)})" if parts else ""
        if self.unmeasured:
            text += f"; {self.unmeasured} generations were not measured and are not in it"
        return text + (f"; it resets at {self.resets_at}" if self.resets_at else "")


def read(home: Path) -> list[Budget]:
    """The budgets kept in a store; StorageError for a damaged file."""
    path = home / FILE
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA:
            raise ValueError(f"its schema is {document['schema']!r}, expected {SCHEMA!r}")
        return [Budget(**entry) for entry in document["budgets"]]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RequestError) as error:
        raise StorageError(
            f"{path} holds no budgets ({error}): remove it and set them again"
        ) from error


def keep(home: Path, budget: Budget) -> None:
    """Add a budget to a store; it replaces the one of the same name."""
    _write(home, [*(kept for kept in read(home) if kept.name != budget.name), budget])


def remove(home: Path, name: str) -> None:
    """Remove a budget by its name; RequestError when there is none."""
    budgets = read(home)
    if name not in {budget.name for budget in budgets}:
        names = ", ".join(budget.name for budget in budgets) or "none"
        raise RequestError(f"there is no budget {name!r}: there are {names}")
    _write(home, [budget for budget in budgets if budget.name != name])


def _write(home: Path, budgets: Sequence[Budget]) -> None:
    document = {"schema": SCHEMA, "budgets": [asdict(budget) for budget in budgets]}
    write_atomic(home / FILE, json.dumps(document, indent=1).encode())


def spent(budget: Budget, ledger: Ledger, now: str) -> Spent:
    """What the ledger holds against a budget at `now` (ISO 8601, UTC); not for `request`."""
    where = {"day": {"day": now[:10]}, "month": {"month": now[:7]}}.get(budget.per, {})
    if budget.tag is not None:
        where = where | {"tag": budget.tag}
    by_source: dict[str, float] = {}
    unmeasured = 0
    for row in ledger.summary(by=(), where=where):
        unmeasured += row.unmeasured
        amount = _amount(budget, row.gross_uj, row.carbon_g)
        if amount is not None:
            by_source[row.source] = by_source.get(row.source, 0.0) + amount
    return Spent(
        budget=budget,
        amount=math.fsum(by_source.values()),
        by_source=by_source,
        unmeasured=unmeasured,
        resets_at=_reset(budget.per, now),
    )


def _amount(budget: Budget, gross_uj: int | None, carbon_g: float | None) -> float | None:
    if budget.unit == "gCO2e":
        return carbon_g
    return None if gross_uj is None else gross_uj / 1e6


def _reset(per: Per, now: str) -> str | None:
    if per == "day":
        return f"{date.fromisoformat(now[:10]) + timedelta(days=1)}T00:00Z"
    if per == "month":
        year, month = divmod(int(now[:4]) * 12 + int(now[5:7]), 12)  # months from 0: the next one
        return f"{year:04d}-{month + 1:02d}-01T00:00Z"
    return None


class Guard:
    """Holds generations against budgets: the engine calls it before and after each.

    The store's budgets are read each time, so that a change in them holds at once.
    """

    def __init__(
        self,
        home: Path,
        ledger: Ledger,
        budgets: Sequence[Budget] = (),
        *,
        notify: Callable[[str], None] = say,
    ) -> None:
        self._home = home
        self._ledger = ledger
        self._own = tuple(budgets)
        self._notify = notify

    def before(self, tag: str | None) -> None:
        """Warn of, or refuse with RequestError, a generation when a budget is used up."""
        state = self.refusing(tag)
        if state is not None:
            raise RequestError(
                f"{state}; nothing was generated, raise the limit with `leangen budget set` "
                f"or remove it with `leangen budget rm {state.budget.name}`"
            )

    def refusing(self, tag: str | None) -> Spent | None:
        """The state of the budget that forbids a generation, None where none does; warns too."""
        for budget in self._budgets(tag):
            if budget.per == "request":
                continue
            state = spent(budget, self._ledger, clock.utc_now())
            if state.exceeded and budget.on_exceed == "refuse":
                return state
            if state.exceeded:
                self._notify(f"warning: {state}")
        return None

    def after(self, receipt: Receipt) -> None:
        """Warn of a generation that took more than a request may."""
        for budget in self._budgets(receipt.tag):
            if budget.per != "request":
                continue
            amount = _amount(budget, receipt.energy.gross_uj, receipt.carbon.g)
            if amount is None:
                self._notify(f"warning: budget {budget.name}: this generation was not measured")
            elif amount > budget.limit:
                self._notify(
                    f"warning: budget {budget.name}: this generation took {figure(amount)} "
                    f"{budget.unit} ({receipt.energy.source}), the limit is {figure(budget.limit)}"
                )

    def _budgets(self, tag: str | None) -> list[Budget]:
        return [
            budget
            for budget in (*self._own, *read(self._home))
            if budget.tag is None or budget.tag == tag
        ]
