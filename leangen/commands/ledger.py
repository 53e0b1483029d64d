"""`leangen ledger`: what was generated and what it cost."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from leangen.console import print_json


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add("ledger", run, "What was generated and what it cost", "leangen ledger --last 5")
    sub.add_argument("--last", type=_whole, default=10, metavar="N", help="generations to list")
    sub.add_argument("--model", help="only this model")
    sub.add_argument("--scheme", help="only this scheme")
    sub.add_argument("--tag", help="only this tag")
    sub.add_argument("--json", action="store_true")
    _ledger_actions(sub)


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 0 or more")
    return int(text)


def _ledger_actions(ledger: argparse.ArgumentParser) -> None:
    actions = ledger.add_subparsers(title="actions", dest="action", metavar="ACTION")

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=summary, description=summary)
        sub.add_argument("--json", action="store_true", default=argparse.SUPPRESS)
        return sub

    sub = add("verify", "Find changed, missing and cut rows")
    sub.add_argument("--head", metavar="HASH", help="what `leangen ledger head` printed once")
    add("head", "The heads of all chains as one hash, to be noted elsewhere")
    sub = add("sum", "Sums over groups")
    sub.add_argument("--by", default="model,scheme", help="model,scheme,device,day,month,tag ...")
    for name in ("model", "scheme", "tag"):
        sub.add_argument(f"--{name}", help=f"only this {name}", default=argparse.SUPPRESS)
    sub = add("merge", "Take in the ledgers of other machines")
    sub.add_argument("files", nargs="+", metavar="FILE", help="or postgresql://...")
    sub = add("export", "Write all receipts to a file")
    sub.add_argument("--format", choices=("csv", "jsonl", "parquet", "codecarbon"), required=True)
    sub.add_argument("-o", "--output", type=Path, required=True, metavar="FILE")
    sub = add("import", "Append the receipts of such a file, or of codecarbon's emissions.csv")
    sub.add_argument("file", type=Path, metavar="FILE")
    sub = add("compact", "Remove old receipts; their sums and the heads of their chains stay")
    sub.add_argument("--older-than", type=int, required=True, metavar="DAYS")


def run(args: argparse.Namespace) -> int:
    """Print sums and the last generations, or carry out an action."""
    from leangen.ledger import Ledger
    from leangen.report import ledger_tables
    from leangen.store import Store

    filters = {
        name: getattr(args, name)
        for name in ("model", "scheme", "tag")
        if getattr(args, name) is not None
    }
    with Ledger(Store().ledger_path) as book:
        if args.action is not None:
            from leangen.ledger import commands

            args.filters = filters
            return commands.run(book, args)
        sums = book.summary(where=filters)
        entries = book.entries(filters, limit=args.last)
        if args.json:
            print_json({"summary": [row.to_json() for row in sums], "entries": entries})
        else:
            ledger_tables(sums, entries)
        return 0
