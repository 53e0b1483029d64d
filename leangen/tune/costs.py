"""What each treatment of each node costs here: bytes, or a timed run.

A node is run alone, on the shapes that calibration saw, and nodes of the same shapes once. A
language model decodes as a whole instead, with all of its nodes treated alike: its layers are fused
and stream their weights from memory, of which a node alone, its weights in the nearest cache, says
nothing. Each node then has its weights' share of that. Everything runs as it will: on leangen's
kernels where they fit. Joules come from this machine's counter where it has one; an estimate would
only restate the time, so then time it is, and that is said.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from leangen import calibrate, clock, lowering, meters, quantize
from leangen.bundle import Bundle
from leangen.console import Progress
from leangen.errors import RequestError
from leangen.families import language
from leangen.graph_edit import Graph, Range, attributes
from leangen.meters import Selection
from leangen.recipe import NodeRecipe
from leangen.session import Session
from leangen.sites import Site
from leangen.treatments import Treatments, read
from leangen.tune.harms import Harms

COUNTED = ("measured", "integrated")
LEAST_RUNS, BUDGET_S = 7, 0.15
TOKENS, WHOLE_S = 16, 1.0
"""That a language model generates in a run; how long it is run."""
_TICKS = 30
"""Ticks of the meter that a window over one node's runs should last."""

Costs = dict[str, dict[str, float]]
"""By node and treatment."""


@dataclass(frozen=True, slots=True)
class Objective:
    """What is made small."""

    name: str
    """`size`, `time` or `energy`."""
    unit: str
    reason: str
    selection: Selection | None = None
    """Meters, for energy."""


def objective(wanted: str, meter: str | None = None) -> Objective:
    """`size`, `latency` or `energy`; energy without a counter becomes time, with the reason."""
    if wanted == "size":
        return Objective("size", "B", "bytes of the weights")
    if wanted == "latency":
        return Objective("time", "s", "timed on this machine")
    if wanted != "energy":
        raise RequestError(f"minimize is {wanted!r}, expected size, latency or energy")
    selection = meters.select(meter=meter)
    if selection.source in COUNTED:
        scope = ", ".join(selection.scope)
        return Objective("energy", "J", f"measured on this machine ({scope})", selection)
    return Objective(
        "time",
        "s",
        f"energy is asked for, but no counter can be read here ({selection.reason}): "
        "time is taken in its place",
    )


def measure(
    bundle: Bundle,
    calibration: quantize.Calibration,
    harms: Harms,
    aim: Objective,
    progress: Progress,
    threads: int | None = None,
) -> Costs:
    """The cost of every treatment in `harms` and of fp32, summed over a bundle's graphs.

    threads: that a language model decodes with.
    """
    if bundle.family == "language" and aim.name != "size":
        return _decoding(bundle, calibration, harms, aim, progress, threads)
    found: Costs = {}
    for role in bundle.graphs:
        graph, sites, treatments = calibration.prepared(role)
        spans = calibration.spans(role)
        embedded = {site.weight for site in sites if site.kind == "embedding"}
        known: dict[Any, float] = {}
        for done, site in enumerate(sites):
            progress(done, len(sites), f"{role}: {aim.name} of {site.node.name}")
            each = found.setdefault(site.node.name, {})
            for treatment in ("fp32", *harms.get(site.node.name, {})):
                if aim.name == "size":
                    bits = treatments.stored_bits(site, treatment)
                    shared = treatment == "matmul8" and site.weight in embedded
                    value = 0.0 if shared else bits / 8
                else:
                    value = _run_cost(graph, site, treatments, treatment, spans, aim, known)
                each[treatment] = each.get(treatment, 0.0) + value
    return found


def _decoding(
    bundle: Bundle,
    calibration: quantize.Calibration,
    harms: Harms,
    aim: Objective,
    progress: Progress,
    threads: int | None,
) -> Costs:
    """A token of the whole model with every node alike, shared out by weights."""
    _, sites, _ = calibration.prepared("model")
    weights = {site.node.name: site.weights for site in sites if site.kind != "embedding"}
    offered = {name for node in weights for name in harms.get(node, {})}
    whole = {"fp32": _token(bundle, aim, threads)}
    for done, treatment in enumerate(sorted(offered)):
        progress(done, len(offered), f"{aim.name} of a token at {treatment}")
        nodes = {  # where it does not fit, 8 bits come nearest
            node: treatment if treatment in harms[node] else "matmul8"
            for node in weights
            if {treatment, "matmul8"} & harms.get(node, {}).keys()
        }
        recipe = NodeRecipe(bundle.name, bundle.digest, nodes, method=calibration.method)
        with tempfile.TemporaryDirectory(prefix="leangen-") as folder:
            alike = quantize.replay(bundle, recipe, Path(folder) / "a", calibration=calibration)
            whole[treatment] = _token(alike, aim, threads)
    total = sum(weights.values())
    return {
        site.node.name: {
            treatment: whole.get(treatment, 0.0) * weights.get(site.node.name, 0) / total
            for treatment in ("fp32", *harms.get(site.node.name, {}))
        }
        for site in sites
    }


def _token(bundle: Bundle, aim: Objective, threads: int | None) -> float:
    """Seconds or joules of a token that a language model generates after another."""
    session = Session(bundle, threads=threads)
    request = language.Request(tokens=[0], max_new_tokens=TOKENS, temperature=0.0, ignore_eos=True)

    def run() -> None:
        for _ in language.run(session, request):
            pass

    run()
    return _spent(run, aim, WHOLE_S) / TOKENS


def _run_cost(
    graph: Graph,
    site: Site,
    treatments: Treatments,
    treatment: str,
    spans: Mapping[str, Range],
    aim: Objective,
    known: dict[Any, float],
) -> float:
    node = site.node
    if site.kind in ("embedding", "deconv"):
        return 0.0  # looked up, or always computed as fp32: no choice changes it
    shape = tuple(map(int, spans[node.input[0]].shape))
    options = tuple(sorted((k, str(v)) for k, v in attributes(node).items()))
    alike = (node.op_type, options, graph.shape(site.weight), shape)
    key = (*alike, treatment)
    if key not in known:
        exact = treatment == "fp32"
        nodes = [node] if exact else treatments.apply(site, treatment).nodes
        unpacked = None if exact or read(treatment).kind != "w" else known[*alike, "fp32"]
        known[key] = _measure(graph, nodes, node, shape, aim, unpacked)
    return known[key]


def _measure(
    graph: Graph,
    nodes: Sequence[NodeProto],
    node: NodeProto,
    shape: Sequence[int],
    aim: Objective,
    unpacked: float | None,
) -> float:
    """Seconds or joules of one run of some nodes, fed as `node` is.

    unpacked: the same of fp32, for nodes that only store their weights otherwise: ONNX Runtime
    unpacks them while it loads, unless a kernel of ours takes them.
    """
    model = graph.proto()
    for field in ("node", "input", "output"):
        model.graph.ClearField(field)
    source = node.input[0]
    model.graph.node.extend(nodes)
    model.graph.input.append(helper.make_tensor_value_info(source, TensorProto.FLOAT, shape))
    model.graph.output.append(
        helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
    )
    feed = {source: np.random.default_rng(0).standard_normal(shape).astype(np.float32)}
    with tempfile.TemporaryDirectory(prefix="leangen-") as folder:
        path = Path(folder) / "node.onnx"
        graph.save(path, model)
        lowered = lowering.alone(path, path.with_name("lowered"))
        if lowered is not None:
            session = calibrate.open_session(lowered.path, lowered.library)
        elif unpacked is not None:
            return unpacked
        else:
            session = calibrate.open_session(path)
        session.run(None, feed)
        return _spent(lambda: session.run(None, feed), aim, BUDGET_S)


def _spent(run: Callable[[], object], aim: Objective, budget_s: float) -> float:
    """Seconds or joules of a run that has been warmed up.

    The least time, as what else the machine does only adds.
    """
    spent: list[int] = []
    end_ns = clock.monotonic_ns() + round(budget_s * 1e9)
    while clock.monotonic_ns() < end_ns or len(spent) < LEAST_RUNS:
        begin_ns = clock.monotonic_ns()
        run()
        spent.append(clock.monotonic_ns() - begin_ns)
    run_s = min(spent) / 1e9
    return run_s if aim.selection is None else joules(run, run_s, aim.selection)


def joules(run: Callable[[], object], run_s: float, selection: Selection) -> float:
    """Joules of a run of about `run_s` seconds, from one window over many that begins on a tick."""
    tick_s = max((meter.tick.seconds for meter in selection.meters), default=0.001)
    repeats = max(LEAST_RUNS, int(np.ceil(_TICKS * tick_s / run_s)))
    window = meters.begin(selection, aligned=True)
    for _ in range(repeats):
        run()
    windows = meters.end(window)
    spent = [one.energy_uj for one in windows]
    known = [energy_uj for energy_uj in spent if energy_uj is not None]
    if not known or len(known) < len(spent):
        faults = "; ".join(fault for one in windows for fault in one.faults)
        raise RequestError(
            f"the meter gave no figure while a node was measured ({faults}): "
            "minimize latency instead"
        )
    return sum(known) / 1e6 / repeats
