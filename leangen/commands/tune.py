"""`leangen tune`: the cheapest treatment of every node that still meets a quality budget."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leangen.commands.options import METER_HELP, json_and_threads, on_every_machine
from leangen.commands.task import reference_of, task_of, task_options
from leangen.console import human_bytes, print_json, progress_bar, say, table, with_u

if TYPE_CHECKING:
    from leangen.bundle import Bundle
    from leangen.tune import Tuned

KINDS = {"kl": "nats", "nll": "nats", "rmse": "relative", "psnr": "dB", "mel": "dB"}


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add(
        "tune",
        run,
        "A precision for every node: the cheapest that meets a quality budget",
        "leangen tune terrain --max-rmse 0.05 --minimize size -o terrain.json",
    )
    sub.add_argument("model", metavar="MODEL", help="its fp32 bundle is tuned")
    limits = sub.add_mutually_exclusive_group(required=True)
    for kind, unit in KINDS.items():
        name = f"--{'min' if kind == 'psnr' else 'max'}-{kind}"
        limits.add_argument(name, dest=kind, type=float, metavar=unit.upper())
    sub.add_argument(
        "--minimize",
        choices=("energy", "latency", "size"),
        default="energy",
        help="default: energy",
    )
    sub.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="the recipe to write; default: NAME.recipe.json",
    )
    sub.add_argument("--bundle", type=Path, metavar="DIR", help="write the bundle as well")
    sub.add_argument(
        "--against",
        metavar="A,B",
        help="schemes or bundles to hold it against, e.g. int8,int4 (slower)",
    )
    sub.add_argument("--force", action="store_true", help="replace FILE and the bundle in DIR")
    sub.add_argument("--meter", metavar="SPEC", help=METER_HELP)
    task_options(sub)
    json_and_threads(sub)
    on_every_machine(sub)


def run(args: argparse.Namespace) -> int:
    """Write the recipe; print what it costs and loses, and the same of other schemes."""
    from leangen import quantize, tune
    from leangen.bundle import check_place
    from leangen.files import check_free
    from leangen.store import Store

    kind = next(kind for kind in KINDS if getattr(args, kind) is not None)
    store = Store()
    with progress_bar() as progress:
        bundle = store.resolve(args.model, notify=say, progress=progress)
        output = args.output or Path(f"{bundle.name.rpartition('/')[2]}.recipe.json")
        if not args.force:
            check_free(output)
        if args.bundle is not None:
            check_place(args.bundle, replace=args.force)
        task = task_of(args, store, bundle, progress, recogniser="none")
        found = tune.tune(
            bundle,
            tune.Budget(kind, getattr(args, kind)),
            minimize=args.minimize,
            task=task,
            home=store.home,
            progress=progress,
            meter=args.meter,
            threads=args.threads,
        )
        found.recipe.save(output)
        rows = []
        if args.bundle is not None:
            made = quantize.replay(
                bundle, found.recipe, args.bundle, replace=args.force, progress=progress
            )
            rows.append(_row(found, made, found.loss))
        names = [name.strip() for name in (args.against or "").split(",") if name.strip()]
        others = [
            store.resolve(reference_of(bundle, name), notify=say, progress=progress)
            for name in names
        ]
        if others:
            judged = tune.judge_others(bundle, others, task, progress, threads=args.threads)
            budget = tune.Budget(kind, getattr(args, kind))
            rows += [
                _row(found, other, budget.measured(bundle, measures))
                for other, measures in zip(others, judged, strict=True)
            ]
    if args.json:
        print_json({"recipe": str(output), "found": dict(found.recipe.found), "rows": rows})
        return 0
    _print(found, rows, output)
    return 0


def _row(found: Tuned, bundle: Bundle, loss: Any) -> dict[str, Any]:
    return {
        "scheme": bundle.scheme,
        "loss": loss.to_json(),
        "size_bytes": bundle.size_bytes,
        "bits_per_weight": bundle.quantization["bits_per_weight"],
        "modelled_cost": found.cost_of(bundle),
    }


def _print(found: Tuned, rows: list[dict[str, Any]], output: Path) -> None:
    from leangen.charts import si

    loss, aim = found.loss, found.objective
    print(f"{output}: {loss.name} {with_u(loss.value, loss.u, loss.unit).strip()}")
    treatments = Counter(found.solution.choices.values())
    nodes = (f"{n} node{'s' * (n > 1)} at {name}" for name, n in treatments.most_common())
    print(", ".join(nodes))
    print(
        f"modelled {aim.name} of the treated nodes {si(found.solution.cost, None, aim.unit)}, "
        f"within {found.solution.gap:.2%} of the least; {found.trials} end-to-end checks"
    )
    if found.recipe.run:
        told = ", ".join(f"{name} {value}" for name, value in found.recipe.run.items())
        print(f"best run here with {told}")
    if rows:
        table(
            ["scheme", loss.name, "size", "bits/weight", f"modelled {aim.name}"],
            [
                [
                    row["scheme"],
                    with_u(row["loss"]["value"], row["loss"]["u"], row["loss"]["unit"]).strip(),
                    human_bytes(row["size_bytes"]),
                    f"{row['bits_per_weight']:.2f}",
                    "not known"
                    if row["modelled_cost"] is None
                    else si(row["modelled_cost"], None, aim.unit),
                ]
                for row in rows
            ],
        )
    say(aim.reason)
