"""`leangen eval`: how far a low-precision model is from its reference."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from leangen.commands.options import json_and_threads, kv_option
from leangen.commands.task import reference_of, task_of, task_options
from leangen.console import print_json, progress_bar, say, table, with_u


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add(
        "eval",
        run,
        "How far a low-precision model is from its reference, with the spread of every figure",
        "leangen eval smollm2-135m:int4 --reference fp32",
    )
    sub.add_argument("model", metavar="MODEL[:SCHEME]")
    sub.add_argument(
        "--reference", default="fp32", metavar="SCHEME|MODEL", help="what it is held against"
    )
    task_options(sub)
    group = sub.add_argument_group("questions of lm-evaluation-harness (leangen[eval])")
    group.add_argument("--tasks", metavar="A,B", help="its tasks, or YAML files of your own")
    group.add_argument("--limit", type=int, metavar="N", help="questions of each task")
    group.add_argument("--few-shot", type=int, metavar="N", help="worked examples before each")
    group.add_argument("--chat", action="store_true", help="ask through the chat template")
    kv_option(sub)
    json_and_threads(sub)


def run(args: argparse.Namespace) -> int:
    """Print a table or one JSON document; 0 when all was measured."""
    from leangen import quality
    from leangen.quality import harness
    from leangen.session import Session
    from leangen.store import Store

    store = Store()
    with progress_bar() as progress:
        candidate = store.resolve(args.model, notify=say, progress=progress)
        reference = store.resolve(
            reference_of(candidate, args.reference), notify=say, progress=progress
        )
        sessions = [
            Session(candidate, threads=args.threads, kv=args.kv),
            Session(reference, threads=args.threads),
        ]
        if args.tasks is None:
            task = task_of(args, store, candidate, progress)
            (found,) = quality.evaluate(sessions[:1], sessions[1], task, progress)
        else:
            names = [name.strip() for name in args.tasks.split(",") if name.strip()]
            asked = harness.Asked(names, args.limit, args.few_shot, args.chat)
            found = harness.evaluate(sessions[0], sessions[1], asked, progress)
    names = [f"{bundle.name}:{bundle.scheme}" for bundle in (candidate, reference)]
    if args.json:
        measures = [measure.to_json() for measure in found]
        print_json({"model": names[0], "reference": names[1], "measures": measures})
        return 0
    table(
        ["measure", f"{names[0]} against {names[1]}", "over"],
        [[m.name, with_u(m.value, m.u, m.unit).strip(), f"{m.n} {m.of}"] for m in found],
    )
    return 0
