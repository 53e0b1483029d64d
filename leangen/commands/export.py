"""`leangen export`: turn a model file or folder into a bundle."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from leangen.console import human_bytes, print_json, say


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add(
        "export",
        run,
        "Turn a GGUF, a folder of transformers or diffusers, a Piper voice, a pzflow file or a"
        " plain ONNX into a bundle",
        "leangen export voice.onnx -o my-voice",
    )
    sub.add_argument("source", type=Path)
    sub.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    sub.add_argument("--name", help="name in the manifest; default: the file's")
    sub.add_argument("--form", choices=("fp32", "gguf"), help="GGUF: dequantized, or bit for bit")
    sub.add_argument("--family", choices=("diffusion", "oneshot"), help="plain ONNX: what it is")
    sub.add_argument(
        "--check",
        action="store_true",
        help="transformers, diffusers: compare with torch; exit 2 if it differs",
    )
    sub.add_argument("--force", action="store_true", help="replace DIR")
    sub.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Export, and compare with torch when asked; 2 where they differ."""
    from leangen import exporters, host, probe

    given = {name: getattr(args, name) for name in ("form", "family")}
    options = {name: value for name, value in given.items() if value is not None}
    bundle = exporters.export(
        args.source, args.output, name=args.name, replace=args.force, **options
    )
    peak_bytes = host.peak_rss_bytes()
    bundle = probe.attach(bundle)
    found = exporters.check(args.source, bundle) if args.check else []
    if args.json:
        print_json(
            {
                "name": bundle.name,
                "scheme": bundle.scheme,
                "size_bytes": bundle.size_bytes,
                "path": str(bundle.path),
                "peak_rss_bytes": peak_bytes,
                "check": [
                    asdict(difference) | {"passed": difference.passed} for difference in found
                ],
            }
        )
    else:
        print(f"{bundle.name}:{bundle.scheme} {human_bytes(bundle.size_bytes)} {bundle.path}")
        say(f"peak memory {human_bytes(peak_bytes)}")
        for difference in found:
            print(difference.text + ("" if difference.passed else ": too much"))
    return 0 if all(difference.passed for difference in found) else 2
