"""`leangen budget`: limits of joules or gCO2e."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from leangen.console import figure, print_json, say


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add(
        "budget",
        run,
        "Limits of joules or gCO2e: warn, or refuse to generate",
        "leangen budget set day --joules 5000 --on-exceed refuse",
    )
    _budget_actions(sub)


def _budget_actions(budget: argparse.ArgumentParser) -> None:
    actions = budget.add_subparsers(title="actions", dest="action", required=True, metavar="ACTION")
    sub = actions.add_parser("set", help="add a limit, or change it")
    sub.add_argument("per", choices=("day", "month", "tag", "request"), help="days are UTC")
    limit = sub.add_mutually_exclusive_group(required=True)
    limit.add_argument("--joules", type=float)
    limit.add_argument("--gco2e", type=float, help="grams")
    sub.add_argument("--tag", help="count only generations with this tag")
    sub.add_argument("--on-exceed", choices=("warn", "refuse"), default="warn")
    sub = actions.add_parser("show", help="the limits, and what is spent")
    sub.add_argument("--json", action="store_true")
    sub = actions.add_parser("rm", help="remove a limit")
    sub.add_argument("name", help="as `leangen budget show` names it")


def run(args: argparse.Namespace) -> int:
    """Set, show or remove limits."""
    from leangen import budget as budgets
    from leangen import clock
    from leangen.ledger import Ledger
    from leangen.store import Store

    store = Store()
    if args.action == "rm":
        budgets.remove(store.home, args.name)
        return 0
    if args.action == "set":
        limit = budgets.Budget(
            per=args.per,
            limit=args.joules if args.gco2e is None else args.gco2e,
            unit="J" if args.gco2e is None else "gCO2e",
            tag=args.tag,
            on_exceed=args.on_exceed,
        )
        budgets.keep(store.home, limit)
        print(limit.name)
        return 0
    book, now = Ledger(store.ledger_path), clock.utc_now()
    kept = budgets.read(store.home)
    states = [budgets.spent(limit, book, now) for limit in kept if limit.per != "request"]
    requests = [limit for limit in kept if limit.per == "request"]
    if args.json:
        from dataclasses import asdict

        rows = [{"name": limit.name, "budget": asdict(limit)} for limit in requests]
        print_json([state.to_json() for state in states] + rows)
        return 0
    for state in states:
        print(f"{state} ({state.budget.on_exceed})")
    for limit in requests:
        print(f"budget {limit.name}: {figure(limit.limit)} {limit.unit} a request (warn)")
    if not kept:
        say("there are no budgets: `leangen budget set day --joules 5000` makes one")
    return 0
