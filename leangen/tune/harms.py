"""What each treatment of each node alone does to a model's output: measured once, then kept.

Nodes are tried inside the whole graph (`leangen.sensitivity`), on inputs that the model makes
itself; a language model reads a text. The figure is the squared relative error of the graph's
output, which for small disturbances adds up over nodes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np

from leangen import calibrate, quantize
from leangen.bundle import Bundle
from leangen.calibrate import Feeds
from leangen.console import Progress
from leangen.errors import BundleError
from leangen.families import language
from leangen.files import write_atomic
from leangen.graph_edit import Graph
from leangen.sensitivity import Probe, isolate
from leangen.session import Session
from leangen.sites import Site
from leangen.treatments import Treatments, code_bits

Harms = dict[str, dict[str, float]]
"""Squared relative error by node and treatment."""

TOKENS = 96
"""Of the text that a language model reads while its nodes are tried."""
_FINEST = 4
"""A group that does less harm than 1 / 4 of what a node does on average at the fewest bits is not
looked into: its nodes share the figure."""
_LANGUAGE = ("matmul4", "matmul8", "w16")
_FP32_ARITHMETIC = ("w4", "w8", "w16")
_INT8_ARITHMETIC = ("w8a8", "matmul4", "matmul8")


def candidates(bundle: Bundle, site: Site, treatments: Treatments) -> list[str]:
    """The treatments to choose from for a node."""
    if site.kind == "embedding":
        names: tuple[str, ...] = ("gather8",)
    elif bundle.family == "language":
        names = _LANGUAGE
    else:
        names = _FP32_ARITHMETIC
        if quantize.weights_only(bundle, site.node.name) is None:
            names += _INT8_ARITHMETIC
    return [name for name in names if treatments.fits(site, name)]


def feeds(bundle: Bundle) -> dict[str, list[Feeds]]:
    """Inputs of each graph."""
    if bundle.family == "language":
        return {"model": [_text_feed(bundle)]}
    return calibrate.record(bundle)[0]


def measure(bundle: Bundle, home: Path, progress: Progress) -> Harms:
    """The harm of every candidate, from `home` when it was measured before.

    Raises BundleError for a family that cannot be calibrated without data.
    """
    key = hashlib.sha256(f"{bundle.digest} {TOKENS} {_FINEST} 2".encode()).hexdigest()[:16]
    path = home / "tune" / f"{bundle.name.replace('/', '_')}-{key}.json"
    try:
        kept: Harms = json.loads(path.read_text(encoding="utf-8"))
        return kept
    except (OSError, ValueError):  # not yet, or damaged: measure
        pass
    found: Harms = {}
    for role, inputs in feeds(bundle).items():
        if not inputs:
            raise BundleError(
                f"{bundle.name} ({bundle.family}) makes no inputs for graph {role!r} by itself: "
                "its nodes cannot be tried one by one"
            )
        _measure_graph(bundle, role, inputs, found, progress)
    write_atomic(path, json.dumps(found).encode())
    return found


def _measure_graph(
    bundle: Bundle, role: str, inputs: Sequence[Feeds], found: Harms, progress: Progress
) -> None:
    graph, sites, treatments = quantize.prepared(bundle, role, inputs)
    _only_logits(graph)
    offered = {site.node.name: candidates(bundle, site, treatments) for site in sites}
    names = list(dict.fromkeys(name for each in offered.values() for name in each))
    negligible = 0.0
    for done, treatment in enumerate(sorted(names, key=code_bits)):
        chosen = [site for site in sites if treatment in offered[site.node.name]]
        progress(done, len(names), f"{role}: {len(chosen)} nodes at {treatment}")
        stand_ins = {site.node.name: treatments.apply(site, treatment) for site in chosen}
        # One input puts the nodes in order; what they do together is checked end to end.
        probe = Probe(graph, stand_ins, inputs[:1])
        if not negligible:  # of the treatment with the fewest bits, which harms most
            negligible = probe.error(stand_ins) / (_FINEST * len(stand_ins))
        for node, value in isolate(list(stand_ins), probe.error, negligible).items():
            each = found.setdefault(node, {})
            each[treatment] = each.get(treatment, 0.0) + max(value, 0.0)


def _only_logits(graph: Graph) -> None:
    """A language model's caches are no outputs that count."""
    outputs = graph.model.graph.output
    kept = [entry for entry in outputs if entry.name == "logits"]
    if kept:
        del outputs[:]
        outputs.extend(kept)


def _text_feed(bundle: Bundle) -> Feeds:
    """A text as the graph reads it at once, with empty caches of its length."""
    session, config = Session(bundle), bundle.config
    text = files("leangen").joinpath("assets/quality.txt").read_text(encoding="utf-8")
    tokens = language.tokenizer(session).encode(text).ids[:TOKENS]
    cache = np.zeros((1, config["kv_heads"], len(tokens), config["head_dim"]), np.float32)
    caches = {
        f"past_{kind}_{layer}": cache
        for layer in range(config["layers"])
        for kind in ("key", "value")
    }
    return caches | {
        "input_ids": np.array([tokens], np.int64),
        "seqlens_k": np.array([len(tokens) - 1], np.int32),
        "total_sequence_length": np.array(len(tokens), np.int32),
        "logits_from": np.zeros(1, np.int64),
    }
