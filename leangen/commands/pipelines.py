"""`leangen pipelines`: the ready-made pipelines, their inputs and parts."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from leangen.console import print_json, table


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add(
        "pipelines",
        run,
        "Ready-made pipelines: models connected in a TOML file",
        "leangen pipelines\n  leangen generate MY.toml --prompt 'the first input'",
    )
    sub.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """List them; nothing is loaded."""
    from leangen.pipeline import read, shipped

    specs = [(path, read(path)) for path in shipped().values()]
    if args.json:
        print_json(
            [
                {
                    "name": spec.name,
                    "summary": spec.summary,
                    "inputs": {
                        name: {"about": entry.about, "default": entry.default}
                        for name, entry in spec.inputs.items()
                    },
                    "parts": {part.name: part.model for part in spec.parts},
                    "path": str(path),
                }
                for path, spec in specs
            ]
        )
        return 0
    table(
        ["name", "what it does", "inputs", "parts"],
        [
            [
                spec.name,
                spec.summary,
                ", ".join(
                    name if entry.default is None else f"[{name}]"
                    for name, entry in spec.inputs.items()
                ),
                " -> ".join(f"{part.name} ({part.model})" for part in spec.parts),
            ]
            for _, spec in specs
        ],
    )
    return 0
