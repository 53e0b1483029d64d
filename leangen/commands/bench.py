"""`leangen bench`: models side by side, in random order."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from leangen.commands.options import device_option, loading, on_every_machine, run_options, share
from leangen.commands.request import request, request_options


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add(
        "bench",
        run,
        "Repeat generations of several models in random order; medians and intervals",
        "leangen bench smollm2-135m:int4 smollm2-135m:int8 --repeats 10",
    )
    sub.add_argument("models", nargs="+", metavar="MODEL")
    sub.add_argument("--repeats", type=int, default=10, help="measured windows per model")
    sub.add_argument(
        "--precision",
        type=share,
        default=0.05,
        metavar="5%",
        help="wanted ± of a window's edges: plans how many generations one window holds",
    )
    request_options(sub)
    run_options(sub)
    device_option(sub)
    on_every_machine(sub)


def run(args: argparse.Namespace) -> int:
    """Print a row for each model, or one JSON document."""
    from leangen import benchmark

    prompt, options = request(args)
    return benchmark.run(
        args.models,
        prompt=prompt,
        options=options,
        repeats=args.repeats,
        precision=args.precision,
        loading=loading(args),
        as_json=args.json,
    )
