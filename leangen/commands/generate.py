"""`leangen generate`: one generation and its receipt."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from leangen.commands.options import device_option, loading, run_options
from leangen.commands.request import request, request_options
from leangen.console import print_json, say
from leangen.errors import StorageError


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add(
        "generate",
        run,
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
    device_option(sub)


def run(args: argparse.Namespace) -> int:
    """Stream the text, save what else came, and print the receipt."""
    import leangen as lg
    from leangen import media
    from leangen.preview import Preview

    prompt, options = request(args)
    engine = lg.load(args.model, tag=args.tag, **loading(args))
    if args.output is not None:
        kind = engine.media if args.data is None else "table"  # of scores
        media.suffix_for(kind, args.output)  # before the work, not after it
    stream = engine.stream(prompt, **options)
    sample, seen, made_s, written = 0, Preview(sys.stderr), 0.0, False
    sound = isinstance(engine, lg.Engine) and engine.family.UNIT == "audio-second"
    for step in stream:
        if step.picture is not None:
            seen.show(step.picture)
        if sound:
            made_s += step.units
            seen.tell(f"{made_s:.2f} s of sound")
        if not args.json:
            print("\n---\n" * (step.sample - sample) + step.text, end="", flush=True)
            sample, written = step.sample, written or bool(step.text)
    if sound:
        seen.tell("")
    if written:
        print()
    unkept = None
    try:
        result = stream.result
    except StorageError as error:  # what was made is handed over all the same
        result, unkept = stream.made, error
    _hand_over(result, engine, args)
    if unkept is not None:
        raise unkept
    return 0


def _hand_over(result: Any, engine: Any, args: argparse.Namespace) -> None:
    """Save and print the output and its receipt."""
    from leangen import media, report
    from leangen.families import properties

    saved = None
    if args.output is not None:
        saved = result.save(args.output)
    elif result.output.media != "text":
        suffix = media.SUFFIXES[result.output.media][0]
        saved = result.save(_unused(engine.name, suffix))
    if args.json:
        print_json(_document(result, saved))
        return
    for reply in result.output.extra.get("samples", ()):
        if reply.properties:
            print(properties.told(reply.properties))
    if saved is not None:
        print(saved)
    say(report.summary(result.receipt))


def _document(result: Any, saved: Path | None) -> dict[str, Any]:
    from leangen.pipeline import PipelineResult

    document: dict[str, Any] = {"text": result.text}
    if "samples" in result.output.extra:
        document["samples"] = [reply.to_json() for reply in result.output.extra["samples"]]
    if isinstance(result, PipelineResult):
        texts = {name: part.text for name, part in result.parts.items()}
        document["parts"] = {name: text for name, text in texts.items() if text is not None}
    if saved is not None:
        document["path"] = str(saved)
    return document | {"receipt": result.receipt.to_json()}


def _unused(stem: str, suffix: str) -> Path:
    """A name in the current folder that nothing has yet."""
    path = Path(f"{stem}{suffix}")
    number = 1
    while path.exists():
        number += 1
        path = Path(f"{stem}-{number}{suffix}")
    return path
