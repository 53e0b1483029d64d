"""`leangen rm`, `du` and `gc`: what lies in the store."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from leangen.console import human_bytes, print_json, say, table


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parsers."""
    sub = add("rm", remove, "Remove a model from the store", "leangen rm smollm2-135m:int8")
    sub.add_argument("model", metavar="NAME[:SCHEME]")

    sub = add("du", usage, "What the store holds and how large it is", "leangen du")
    sub.add_argument("--json", action="store_true")

    sub = add("gc", collect, "Remove what can be fetched or made again", "leangen gc --dry-run")
    sub.add_argument("--dry-run", action="store_true", help="only say what would go")
    sub.add_argument("--json", action="store_true")


def remove(args: argparse.Namespace) -> int:
    """Print what was removed."""
    from leangen.store import Store

    for path, size_bytes in Store().remove(args.model):
        print(f"removed {path} ({human_bytes(size_bytes)})")
    return 0


def usage(args: argparse.Namespace) -> int:
    """Print a row for each thing the store holds."""
    from leangen.store import Store

    rows = Store().usage()
    if args.json:
        print_json(rows)
        return 0
    total = sum(row["bytes"] for row in rows)
    table(
        ["what", "size", "path"],
        [[row["what"], human_bytes(row["bytes"]), row["path"]] for row in rows]
        + [["total", human_bytes(total), str(Store().home)]],
    )
    return 0


def collect(args: argparse.Namespace) -> int:
    """Print what was, or with `--dry-run` would be, removed."""
    from leangen.store import Store

    rows = Store().collect_garbage(dry_run=args.dry_run)
    if args.json:
        print_json(rows)
        return 0
    for row in rows:
        print(
            f"{'would remove' if args.dry_run else 'removed'} {row['path']} "
            f"({human_bytes(row['bytes'])})"
        )
    say(f"{human_bytes(sum(row['bytes'] for row in rows))} in all")
    return 0
