"""`leangen chat`: talk with a language model."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from leangen.commands.options import GUESSES, SPECULATE, device_option, loading, run_options


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add("chat", run, "Talk with a language model", "leangen chat smollm2-135m:int4")
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--system", help="system message")
    sub.add_argument("--max-new-tokens", type=int, default=512)
    sub.add_argument("--temperature", type=float, default=0.2)
    sub.add_argument("--top-p", type=float, default=0.9)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--speculate", **SPECULATE, default=GUESSES)
    sub.add_argument(
        "--no-prefix-cache",
        dest="prefix_cache",
        action="store_false",
        help="compute the whole conversation anew at each turn",
    )
    run_options(sub, as_json=False)
    device_option(sub)


def run(args: argparse.Namespace) -> int:
    """Read lines, answer each; until end of file."""
    from leangen import api
    from leangen import chat as conversation

    return conversation.run(api.load_model(args.model, tag="chat", **loading(args)), args)
