"""What each treatment of each node alone does to a model's output: measured once, then kept.

Nodes are tried inside the whole graph (`leangen.sensitivity`), on inputs that the model makes
itself. The figure is the squared relative error of the graph's output, for a language model the KL
divergence of its predictions; for small disturbances both add up over nodes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from leangen import calibrate, calibration_data, quantize
from leangen.bundle import Bundle
from leangen.calibrate import Feeds
from leangen.console import Progress
from leangen.errors import BundleError
from leangen.files import write_atomic
from leangen.graph_edit import Array, Graph
from leangen.quality.language import kl_and_top1
from leangen.sensitivity import Probe, isolate
from leangen.sites import Site
from leangen.treatments import Treatments, code_bits

Harms = dict[str, dict[str, float]]
"""Squared relative error by node and treatment."""

LEAST_TOKENS, MOST_TOKENS, WORK = 96, 2048, 1.2e10
"""A language model reads so much of its own text while its nodes are tried that a run multiplies
about so many weights."""
_COARSE = 0.25
"""A group of nodes that together does less harm than a quarter of what a node does on average at 4
bits is not looked into: its nodes share the figure."""
_FORM = 2
"""Of what is kept: raised when rounding changes, so that harms are measured again."""
_LANGUAGE = (
    *("matmul2", "matmul3-g128", "matmul3", "matmul4-g128", "matmul4"),
    *("matmul4-g16", "matmul4-asym-g16", "matmul8", "w16"),
)
_EMBEDDING = ("gather4", "gather8", "gather16")
_FP32_ARITHMETIC = ("w3", "w4-g128", "w4", "w4-asym-g16", "w8", "w16")
_INT8_ARITHMETIC = ("w8a8", "matmul4", "matmul8")


def candidates(
    bundle: Bundle, site: Site, treatments: Treatments, *, tied: bool = False
) -> list[str]:
    """The treatments to choose from for a node.

    tied: whether another node reads its weight. An output head of 8 bits shares an embedding's.
    """
    if site.kind == "embedding":
        names: tuple[str, ...] = ("gather8",) if tied else _EMBEDDING
    elif bundle.family == "language":
        names = _LANGUAGE
    else:
        names = _FP32_ARITHMETIC
        if quantize.weights_only(bundle, site.node.name) is None:
            names += _INT8_ARITHMETIC
    return [name for name in names if treatments.fits(site, name)]


def feeds(bundle: Bundle, calibration: quantize.Calibration) -> Mapping[str, Sequence[Feeds]]:
    """Inputs of each graph: one, of a language model as much text as time allows."""
    if bundle.family != "language":
        return {role: inputs[:1] for role, inputs in calibration.feeds.items()}
    weights = sum(Graph(bundle.graph("model")).float_parameters().values())
    left, found = min(max(round(WORK / weights), LEAST_TOKENS), MOST_TOKENS), list[Feeds]()
    for feed in calibration.feeds["model"]:
        if left > 0:
            text = feed["input_ids"][0][:left]
            found.append(calibration_data.prefill(bundle, text))
            left -= len(text)
    return {"model": found}


def measure(
    bundle: Bundle, calibration: quantize.Calibration, home: Path, progress: Progress
) -> Harms:
    """The harm of every candidate; what `home` has from before is not measured again.

    Every treatment is kept as soon as it is measured. Raises BundleError for a family that cannot
    be calibrated without data.
    """
    about = f"{bundle.digest} {calibration.method} {MOST_TOKENS} {WORK:g} {_COARSE} {_FORM}"
    key = hashlib.sha256(about.encode()).hexdigest()[:16]
    path = home / "tune" / f"{bundle.name.replace('/', '_')}-{key}.json"
    try:
        kept: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # not yet, or damaged: measure
        kept = {}
    found: Harms = {}
    distance = _divergence if bundle.family == "language" else calibrate.relative_error
    for role, inputs in feeds(bundle, calibration).items():
        if not inputs:
            raise BundleError(
                f"{bundle.name} ({bundle.family}) makes no inputs for graph {role!r} by itself: "
                "its nodes cannot be tried one by one"
            )
        graph, sites, treatments = calibration.prepared(role)
        _only_logits(graph)
        readers = Counter(site.weight for site in sites)
        offered = {
            site.node.name: candidates(bundle, site, treatments, tied=readers[site.weight] > 1)
            for site in sites
        }
        names = sorted({name for each in offered.values() for name in each}, key=_order)
        negligible = kept.get(f"{role} negligible", {}).get("", 0.0)
        for done, treatment in enumerate(names):
            part = f"{role} {treatment}"
            if part not in kept:
                chosen = [site for site in sites if treatment in offered[site.node.name]]
                progress(done, len(names), f"{role}: trying {len(chosen)} nodes at {treatment}")
                stand_ins = {site.node.name: treatments.apply(site, treatment) for site in chosen}
                # This puts the nodes in order; what they do together is checked end to end.
                probe = Probe(graph, stand_ins, inputs, distance)
                if not negligible:  # of the first treatment
                    negligible = _COARSE * probe.error(stand_ins) / len(stand_ins)
                    kept[f"{role} negligible"] = {"": negligible}
                kept[part] = isolate(list(stand_ins), probe.error, negligible)
                write_atomic(path, json.dumps(kept).encode())
            for node, harm in kept[part].items():
                each = found.setdefault(node, {})
                each[treatment] = each.get(treatment, 0.0) + max(harm, 0.0)
    return found


def _order(treatment: str) -> tuple[bool, bool, int, str]:
    """Layers of 4 bits first, which say what is negligible: choices are made around there."""
    bits = code_bits(treatment)
    return bits != 4, treatment in _EMBEDDING, bits, treatment


def _only_logits(graph: Graph) -> None:
    """A language model's caches are no outputs that count."""
    outputs = graph.model.graph.output
    kept = [entry for entry in outputs if entry.name == "logits"]
    if kept:
        del outputs[:]
        outputs.extend(kept)


def _divergence(outputs: Sequence[Array], reference: Sequence[Array]) -> float:
    """Mean KL divergence of the predictions, in nats."""
    (ours,), (exact,) = outputs, reference
    vocabulary = exact.shape[-1]
    kl, _ = kl_and_top1(exact.reshape(-1, vocabulary), ours.reshape(-1, vocabulary))
    return float(kl.mean())
