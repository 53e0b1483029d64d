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
    json_and_threads(sub)


def run(args: argparse.Namespace) -> int:
    """Write the demonstration into `--out`."""
    from leangen import demo as demonstration

    return demonstration.run(args.out, threads=args.threads, as_json=args.json)
