"""Plans of published models, so that nobody measures again what was measured once.

`assets/plans.json` maps the digest of a model's fp32 graphs (structure and weights) to the
treatment of every node in each precision. A model whose export differs in a single byte has
another digest and is measured. `bench/record_plans.py` writes the file from bundles in the store.
"""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import PurePosixPath

from leangen.bundle import Bundle
from leangen.precision import Precision

PLANS = "assets/plans.json"


def digest(bundle: Bundle) -> str:
    """Names these very graphs and weights."""
    stems = {PurePosixPath(name).name for name in bundle.graphs.values()}
    held = sorted(
        (name, entry["sha256"])
        for name, entry in bundle.files.items()
        if any(PurePosixPath(name).name.startswith(stem) for stem in stems)
    )
    return hashlib.sha256(json.dumps(held).encode()).hexdigest()[:32]


def plan(bundle: Bundle, precision: Precision) -> dict[str, str] | None:
    """Treatment by node (`role:node` where there are several graphs), or None: not recorded."""
    text = files("leangen").joinpath(PLANS).read_text(encoding="utf-8")
    found = json.loads(text).get(digest(bundle), {}).get(str(precision))
    if found is None:
        return None
    return {node: treatment for treatment, nodes in found.items() for node in nodes}
