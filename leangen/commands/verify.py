"""`leangen verify`: whether a bundle, or each part of a pipeline, computes what it should."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from leangen.console import say

if TYPE_CHECKING:
    from leangen.bundle import Bundle
    from leangen.session import Kernels


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add(
        "verify",
        run,
        "Hash every file, check the graphs, compute what was recorded at export; of a pipeline, "
        "each part, and that they fit",
        "leangen verify smollm2-135m:int4",
    )
    sub.add_argument("model", metavar="MODEL", help="a model, a bundle's folder, or PIPELINE.toml")
    sub.add_argument(
        "--kernels", choices=("auto", "ort"), default="auto", help="what computes the probe"
    )


def run(args: argparse.Namespace) -> int:
    """Print what was checked; BundleError names the first place that is wrong."""
    from leangen import api, pipeline
    from leangen.store import Store

    path = pipeline.find(args.model)
    if path is None:
        bundle = Store().resolve(args.model, notify=say)
        lines = _verify(f"{bundle.name}:{bundle.scheme}", bundle, args.kernels)
    else:
        loaded = pipeline.load(path, api.load_model)  # which finds parts that do not fit
        lines = []
        for name, atom in loaded.atoms.items():
            bundle = atom.engine.bundle
            lines += _verify(f"{name} ({bundle.name}:{bundle.scheme})", bundle, args.kernels)
        lines.append(f"{loaded.name}: {_joined(list(loaded.atoms))} fit together")
    print("\n".join(lines))
    return 0


def _verify(title: str, bundle: Bundle, kernels: Kernels) -> list[str]:
    from leangen import verification

    found = verification.verify(bundle, kernels=kernels)
    return [f"{title} {bundle.digest}", *(f"  {line}" for line in found)]


def _joined(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
