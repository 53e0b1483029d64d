"""`leangen export`: turn a model file or folder into a bundle."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from leangen.console import human_bytes, print_json, say


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add(
        "export",
        run,
        "Turn a GGUF, a folder of transformers or diffusers, one of ONNX by optimum or"
        " onnxruntime-genai, a CTranslate2 Whisper, a Piper voice, a pzflow file, a plain ONNX or a"
        " torch module of your own into a bundle",
        "leangen export voice.onnx -o my-voice; leangen export flow.py:make -o my-flow --check",
    )
    sub.add_argument(
        "source",
        type=Path,
        help="file, folder, or MODULE:FACTORY / FILE.py:FACTORY: a function that returns a torch"
        " module (flow, decoder, generator, encoder, denoiser, velocity) and an example input;"
        " this runs the Python code that you name",
    )
    sub.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    sub.add_argument("--name", help="name in the manifest; default: the file's")
    sub.add_argument("--form", choices=("fp32", "gguf"), help="GGUF: dequantized, or bit for bit")
    sub.add_argument("--family", choices=("diffusion", "oneshot"), help="plain ONNX: what it is")
    sub.add_argument(
        "--context",
        type=int,
        metavar="N",
        help="language models, text encoders: most tokens of a text; default: what the model says,"
        " and by longrope the original length, beyond which its long factors hold at every length",
    )
    sub.add_argument(
        "--check",
        action="store_true",
        help="transformers, diffusers, torch modules: compare with torch; exit 2 if it differs",
    )
    sub.add_argument("--weights", type=Path, metavar="FILE", help="torch module: its weights")
    sub.add_argument(
        "--option",
        dest="options",
        action="append",
        default=[],
        type=_option,
        metavar="NAME=VALUE",
        help="torch module, plain ONNX: kind=velocity, steps=8, range=[-1,1] ...; may be repeated",
    )
    sub.add_argument("--force", action="store_true", help="replace the bundle in DIR")
    sub.add_argument("--json", action="store_true")


def _option(text: str) -> tuple[str, Any]:
    """`steps=8`, `kind=flow` or `range=[-1, 1]`: a JSON value, or else a text."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE, such as steps=8")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def run(args: argparse.Namespace) -> int:
    """Export, and compare with torch when asked; 2 where they differ."""
    from dataclasses import asdict

    from leangen import exporters, host, probe

    given = {name: getattr(args, name) for name in ("form", "family", "weights", "context")}
    options = {name: value for name, value in given.items() if value is not None}
    options |= dict(args.options)
    if args.check:
        exporters.must_check(args.source)
    bundle = exporters.export(
        args.source, args.output, name=args.name, replace=args.force, **options
    )
    peak_bytes = host.peak_rss_bytes()
    bundle = probe.attach(bundle)
    found = exporters.check(args.source, bundle, **options) if args.check else []
    if args.json:
        print_json(
            {
                "name": bundle.name,
                "scheme": bundle.scheme,
                "size_bytes": bundle.size_bytes,
                "path": str(bundle.path),
                "peak_rss_bytes": peak_bytes,
                "reasons": bundle.config.get("reasons", {}),
                "check": [
                    asdict(difference) | {"passed": difference.passed} for difference in found
                ],
            }
        )
    else:
        print(f"{bundle.name}:{bundle.scheme} {human_bytes(bundle.size_bytes)} {bundle.path}")
        for line in bundle.reasons:
            say(line)
        say(f"peak memory {human_bytes(peak_bytes)}")
        for difference in found:
            print(f"{difference}{'' if difference.passed else ': too much'}")
    return 0 if all(difference.passed for difference in found) else 2
