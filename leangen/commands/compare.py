"""`leangen compare`: one model at several schemes, quality against joules."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from leangen.commands.options import on_every_machine, run_options, share
from leangen.commands.request import request, request_options
from leangen.commands.task import task_of, task_options
from leangen.console import print_json, progress_bar, say, table

if TYPE_CHECKING:
    from leangen.bundle import Bundle
    from leangen.console import Progress
    from leangen.store import Store


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add(
        "compare",
        run,
        "One model at several schemes: quality, joules, time, size, memory; what is significant",
        "leangen compare smollm2-135m --schemes fp32,int8,int4 -o compare.html",
    )
    sub.conflict_handler = "resolve"  # --data and --steps are the task's
    sub.add_argument("model", metavar="MODEL", help="NAME, hf:org/name or a folder")
    sub.add_argument(
        "--schemes",
        default="fp32,int8,int4",
        metavar="A,B,...",
        help="schemes of the model, or folders of bundles; the first is the reference",
    )
    sub.add_argument("--rounds", type=int, default=10, help="measured windows per scheme")
    sub.add_argument(
        "--precision", type=share, default=0.05, metavar="5%", help="wanted ± of a window's edges"
    )
    sub.add_argument("-o", "--output", type=Path, metavar="FILE", help="write one HTML page")
    sub.add_argument("--csv", type=Path, metavar="FILE", help="write a CSV file")
    request_options(sub)
    task_options(sub)
    run_options(sub)
    on_every_machine(sub)


def run(args: argparse.Namespace) -> int:
    """Print a table and what can be said, or one JSON document; write the files asked for."""
    from leangen import compare
    from leangen.compare import show
    from leangen.store import Store

    store = Store()
    prompt, options = request(args)
    options.pop("data", None)
    names = (
        *("threads", "activations", "kernels", "kv"),
        *("region", "intensity", "embodied", "meter"),
    )
    with progress_bar() as progress:
        bundles = _bundles(args, store, progress)
        found = compare.compare(
            bundles,
            task=task_of(args, store, next(iter(bundles.values())), progress),
            prompt=prompt,
            options=options,
            loading={name: getattr(args, name) for name in names} | {"tag": "compare"},
            rounds=args.rounds,
            precision=args.precision,
            progress=progress,
        )
    if args.csv is not None:
        show.write_csv(args.csv, found)
        say(f"wrote {args.csv}")
    if args.output is not None:
        show.write_html(args.output, found)
        say(f"wrote {args.output}")
    if args.json:
        print_json(found.to_json())
        return 0
    table(show.COLUMNS, [show.cells(row) for row in found.rows])
    for finding in found.findings:
        print(finding)
    say(found.cost_reason)
    for note in found.notes:
        say(f"note: {note}")
    return 0


def _bundles(args: argparse.Namespace, store: Store, progress: Progress) -> dict[str, Bundle]:
    """The bundle of each scheme by its label; a scheme that stands for another comes once."""
    from leangen.errors import RequestError

    bundles: dict[str, Bundle] = {}
    for scheme in filter(None, (part.strip() for part in args.schemes.split(","))):
        folder = "/" in scheme or Path(scheme).is_dir()
        ref = scheme if folder else f"{_name(args.model)}:{scheme}"
        bundle = store.resolve(ref, notify=say, progress=progress)
        if any(bundle.digest == other.digest for other in bundles.values()):
            raise RequestError(f"{scheme} is the same bundle as one given before: name it once")
        label = bundle.scheme
        if label in bundles:
            label = Path(scheme).name if folder else scheme
        bundles[label] = bundle
    return bundles


def _name(model: str) -> str:
    """The model without a scheme; a folder's is read from its manifest."""
    from leangen.bundle import open_bundle

    if Path(model).is_dir():
        return open_bundle(Path(model)).name
    head, _, last = model.rpartition(":")
    return model if not head or head == "hf" else head if not last.count("/") else model
