"""`leangen report`: what was generated and what it cost, on one page."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from leangen.console import print_json, say
from leangen.errors import RequestError


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add(
        "report",
        run,
        "What was generated and what it cost: trend, models, idle, budgets",
        "leangen report -o report.html --since 30d",
    )
    sub.add_argument("-o", "--output", type=Path, metavar="FILE", help="write one HTML page")
    sub.add_argument("--since", metavar="DAY", help="2026-11-01, or 30d for the last 30 days")
    sub.add_argument("--by", default="model,scheme", help="default: model,scheme")
    sub.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Print the report, or write it as a page; RequestError when there is nothing to report."""
    from leangen import budget, clock
    from leangen import report as reports
    from leangen.ledger import Ledger
    from leangen.store import Store

    store = Store()
    book = Ledger(store.ledger_path)
    limits = [limit for limit in budget.read(store.home) if limit.per != "request"]
    view = reports.overview(
        book,
        by=[name.strip() for name in args.by.split(",")],
        since=None if args.since is None else reports.since_day(args.since),
        budgets=[budget.spent(limit, book, clock.utc_now()).to_json() for limit in limits],
    )
    if view is None:
        since = f" since {args.since}" if args.since else ""
        raise RequestError(f"the ledger holds no generation{since}: `leangen generate` adds to it")
    if args.output is not None:
        from leangen import page

        page.write_overview(args.output, view)
        say(f"wrote {args.output}")
    if args.json:
        print_json(view.to_json())
    elif args.output is None:
        reports.print_overview(view)
    return 0
