"""What the subcommands of `leangen ledger` do; each returns the exit code."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from dataclasses import asdict
from datetime import date, timedelta

from leangen import clock
from leangen.console import counted, print_json, say, seconds, table, with_u
from leangen.errors import RequestError
from leangen.ledger import Ledger, exchange
from leangen.records import joules


def run(ledger: Ledger, args: argparse.Namespace) -> int:
    """Carry out `args.action`."""
    return ACTIONS[args.action](ledger, args)


def verify(ledger: Ledger, args: argparse.Namespace) -> int:
    """Check the chains and what is derived; 2 when something is wrong."""
    wanted = None if args.head is None else args.head.strip().lower()
    if wanted is not None and not re.fullmatch("[0-9a-f]{64}", wanted):
        raise RequestError(
            f"--head is {args.head!r}, expected the 64 hex digits that `leangen ledger head` prints"
        )
    result = ledger.verify(wanted)
    if args.json:
        print_json(asdict(result))
        return 2 if result.problems else 0
    for problem in result.problems:
        say(f"leangen: error: {problem}")
    if result.problems:
        say(f"{ledger} is not what was written; nothing was changed")
        return 2
    kept = f", {result.compacted} more compacted to their sums" if result.compacted else ""
    print(f"{result.rows} rows in {result.chains} chains as they were written{kept}")
    print(f"head {result.head}")
    return 0


def head(ledger: Ledger, args: argparse.Namespace) -> int:
    """Print the heads of all chains as one hash."""
    if args.json:
        print_json({"head": ledger.head()})
    else:
        print(ledger.head())
    return 0


def merge(ledger: Ledger, args: argparse.Namespace) -> int:
    """Take in other ledgers."""
    results = [ledger.merge(path) for path in args.files]
    if args.json:
        print_json(
            [
                {"file": str(path)} | asdict(result)
                for path, result in zip(args.files, results, strict=True)
            ]
        )
        return 0
    for path, result in zip(args.files, results, strict=True):
        print(f"{path}: {result.added} rows added, {result.known} were here already")
    return 0


def export(ledger: Ledger, args: argparse.Namespace) -> int:
    """Write all receipts to a file."""
    count = exchange.export(ledger, args.output, args.format)
    total = sum(row.receipts for row in ledger.summary(by=()))
    if args.json:
        print_json({"path": str(args.output), "receipts": count})
    else:
        say(f"{count} receipts in {args.output}")
    if total > count:
        say(f"{total - count} older receipts were compacted to their sums: those are not in it")
    return 0


def load(ledger: Ledger, args: argparse.Namespace) -> int:
    """Append the receipts of a file."""
    result = exchange.load(ledger, args.file)
    if args.json:
        print_json(asdict(result))
    else:
        print(f"{result.added} receipts added, {result.known} were here already")
    return 0


def compact(ledger: Ledger, args: argparse.Namespace) -> int:
    """Remove old receipts, keep their sums."""
    if args.older_than < 0:
        raise RequestError(f"--older-than is {args.older_than}, expected days: 0 or more")
    today = date.fromisoformat(clock.utc_now()[:10])
    try:
        before = today - timedelta(days=args.older_than)
    except OverflowError:
        before = date.min
    result = ledger.compact(before.isoformat())
    if args.json:
        print_json(asdict(result) | {"before": before.isoformat()})
    else:
        print(f"{result.receipts} receipts from before {before} compacted to their sums")
    return 0


def sums(ledger: Ledger, args: argparse.Namespace) -> int:
    """Print sums over groups."""
    by = [name.strip() for name in args.by.split(",") if name.strip()]
    rows = ledger.summary(by, where=args.filters)
    if args.json:
        print_json([row.to_json() for row in rows])
        return 0
    table(
        (*by, "runs", "not measured", "units", "time", "energy", "source", "per unit", "gCO2e"),
        [
            [
                *(row.group[name] or "" for name in by),
                str(row.receipts),
                str(row.unmeasured or ""),
                counted(row.units, row.unit),
                seconds(row.duration_s),
                with_u(joules(row.gross_uj), row.u_j, "J"),
                row.source,
                "" if row.per_unit_j is None else with_u(row.per_unit_j, row.per_unit_u_j, "J"),
                "" if row.carbon_g is None else f"{row.carbon_g:.2g}",
            ]
            for row in rows
        ],
    )
    return 0


ACTIONS: dict[str, Callable[[Ledger, argparse.Namespace], int]] = {
    "verify": verify,
    "head": head,
    "merge": merge,
    "export": export,
    "import": load,
    "compact": compact,
    "sum": sums,
}
