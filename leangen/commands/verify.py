"""`leangen verify`: hash every file of a bundle, and of what was lowered from it."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from leangen.console import say


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add("verify", run, "Hash every file of a bundle", "leangen verify smollm2-135m:int4")
    sub.add_argument("model", metavar="MODEL")


def run(args: argparse.Namespace) -> int:
    """Print what was checked; BundleError names the first file that differs."""
    from leangen.bundle import verify
    from leangen.lowering import cache
    from leangen.store import Store

    bundle = Store().resolve(args.model, notify=say)
    verify(bundle)
    lowered = cache.verify(bundle)
    print(f"{bundle.name}:{bundle.scheme} {len(bundle.files)} files as the manifest says", end="")
    print(f", {lowered} lowered ones as they were written" if lowered else "")
    return 0
