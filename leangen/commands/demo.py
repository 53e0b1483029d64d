"""`leangen demo`: published models at three precisions, with joules."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from leangen.commands.options import json_and_threads


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add(
        "demo", run, "Three published models at three precisions, with joules", "leangen demo"
    )
    sub.add_argument("--out", type=Path, default=Path("leangen-demo"), help="folder to write into")
    sub.add_argument(
        "--zoo", action="store_true", help="a gallery of the models that come with leangen"
    )
    json_and_threads(sub)


def run(args: argparse.Namespace) -> int:
    """Write the demonstration into `--out`."""
    from leangen import demo as demonstration

    show = demonstration.ZOO if args.zoo else demonstration.PUBLISHED
    return demonstration.run(args.out, show, threads=args.threads, as_json=args.json)
