"""`leangen metrics`: the ledger's sums for Prometheus."""

from __future__ import annotations

import argparse
from collections.abc import Callable


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add(
        "metrics",
        run,
        "The ledger's sums in Prometheus' text format",
        "leangen metrics --listen 127.0.0.1:9464",
    )
    sub.add_argument(
        "--listen",
        nargs="?",
        const="127.0.0.1:9464",
        metavar="HOST:PORT",
        help="serve them until interrupted; default 127.0.0.1:9464",
    )


def run(args: argparse.Namespace) -> int:
    """Print them, or serve them until interrupted."""
    from leangen import metrics as exposition
    from leangen.ledger import Ledger
    from leangen.store import Store

    book = Ledger(Store().ledger_path)
    if args.listen is None:
        print(exposition.text(book), end="")
    else:
        exposition.serve(book, args.listen)
    return 0
