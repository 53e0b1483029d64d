"""What a trap costs on this machine: its pattern alone as a small model, before and after the fix.

Runs of the two alternate, so that a busy machine slows both; medians are told. Inputs are random,
of the shapes that the graph states (an unknown batch or sequence is 1, an unknown height or width
`SIDE`), so costs are of one row or one picture.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper, shape_inference

from leangen import clock, threads
from leangen.errors import BundleError
from leangen.graph_edit import Array, Graph, tensor_names
from leangen.lint.rules import MICROSOFT, Hit, Rule, option

SIDE = 64
LEAST_RUNS, BUDGET_S = 5, 0.4

Tensors = dict[str, tuple[int, tuple[int, ...]]]
"""Type and shape by tensor name."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Medians of one run of the pattern, or of opening it where the rule says so."""

    before_s: float
    after_s: float
    difference: float
    """Largest difference of the outputs, relative to the largest output."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def tensors(graph: Graph) -> Tensors:
    """Types and shapes of the graph's tensors, as far as ONNX infers them."""
    model = graph.proto()
    model.graph.ClearField("output")
    for entry in model.graph.input:
        dims = entry.type.tensor_type.shape.dim
        for axis, dim in enumerate(dims):
            if not dim.dim_value:
                dim.dim_value = SIDE if len(dims) == 4 and axis > 1 else 1
    for name in dict.fromkeys(tensor_names(graph.nodes)):
        if graph.has(name):
            if np.prod(graph.shape(name), dtype=np.int64) <= 64:
                values = graph.array(name)
                model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
            else:
                kind, shape = graph.dtype(name), graph.shape(name)
                model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
    try:
        model = shape_inference.infer_shapes(model, data_prop=True)
    except shape_inference.InferenceError:
        return {}
    found: Tensors = {}
    for entry in (*model.graph.input, *model.graph.value_info):
        kind = entry.type.tensor_type
        shape = tuple(dim.dim_value for dim in kind.shape.dim)
        if kind.HasField("shape") and all(shape):
            found[entry.name] = (kind.elem_type, shape)
    return found


def measure(graph: Graph, hit: Hit, rule: Rule, known: Tensors) -> Cost | None:
    """Time the pattern as it is and fixed; None where its shapes are unknown or there is no fix."""
    if rule.fix is None or not hit.fixable or not hit.nodes:
        return None
    with tempfile.TemporaryDirectory(prefix="leangen-") as name:
        before, after = Path(name) / "before.onnx", Path(name) / "after.onnx"
        feeds = _extract(graph, hit.nodes, known, before)
        if feeds is None:
            return None
        small = Graph(before)
        for again in list(rule.find(small))[:1]:
            rule.fix(small, again)
        tidy(small)
        small.save(after)
        try:
            return _time(before, after, feeds, rule.at_opening)
        except _Failed:  # a pattern cut out of its surroundings need not run alone
            return None


class _Failed(Exception):
    """ONNX Runtime does not run the small model."""


def _extract(
    graph: Graph, nodes: Sequence[NodeProto], known: Tensors, path: Path
) -> dict[str, Array] | None:
    """Write the nodes as a model of their own; random feeds, or None for unknown shapes."""
    ordered = [node for node in graph.nodes if any(node is other for other in nodes)]
    made = {name for node in ordered for name in node.output}
    needed = [
        name
        for name in dict.fromkeys(tensor_names(ordered))
        if name not in made and not graph.has(name)
    ]
    shapes = {name: _shape(graph, name, ordered, known) for name in needed}
    rng = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    model = graph.proto()
    for field in ("node", "input", "output"):
        model.graph.ClearField(field)
    for name, entry in shapes.items():
        if entry is None:
            return None
        kind, shape = entry
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        if dtype.kind == "f":
            feeds[name] = rng.standard_normal(shape).astype(dtype)
        elif dtype.kind in "iu":
            info = np.iinfo(dtype)
            feeds[name] = rng.integers(max(info.min, -128), min(info.max, 255), shape, dtype)
        else:
            return None
        model.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
    model.graph.node.extend(ordered)
    read = set(tensor_names(ordered))
    for node in ordered:
        for name in node.output:
            if name and name not in read:
                model.graph.output.append(helper.make_empty_tensor_value_info(name))
    graph.save(path, model)
    return feeds


def _shape(
    graph: Graph, name: str, nodes: Sequence[NodeProto], known: Tensors
) -> tuple[int, tuple[int, ...]] | None:
    """Type and shape; one row for a linear layer, whose weight says how long the row is."""
    for node in nodes:
        if not node.input or node.input[0] != name:
            continue
        if node.op_type == "MatMulNBits" and node.domain == MICROSOFT:
            kind = known[name][0] if name in known else TensorProto.FLOAT
            return kind, (1, option(node, "K", 0))
        if node.op_type == "MatMul" and graph.has(node.input[1]):
            return graph.dtype(node.input[1]), (1, graph.shape(node.input[1])[0])
    return known.get(name)


def _time(before: Path, after: Path, feeds: dict[str, Array], opening: bool) -> Cost:
    sessions = [_open(path) for path in (before, after)]
    outputs = [_run(session, feeds) for session in sessions]  # also a warm-up
    spent: list[list[float]] = [[], []]
    end_ns = clock.monotonic_ns() + round(BUDGET_S * 1e9)
    while clock.monotonic_ns() < end_ns or len(spent[0]) < LEAST_RUNS:
        for path, session, times in zip((before, after), sessions, spent, strict=True):
            begin_ns = clock.monotonic_ns()
            if opening:
                _open(path)
            else:
                session.run(None, feeds)
            times.append((clock.monotonic_ns() - begin_ns) / 1e9)
    return Cost(float(np.median(spent[0])), float(np.median(spent[1])), _difference(*outputs))


def _open(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads, _ = threads.choose(None)
    options.log_severity_level = 4
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ORT raises many unrelated types from its C++ side
        raise _Failed from error


def _run(session: ort.InferenceSession, feeds: dict[str, Array]) -> list[Array]:
    try:
        return list(session.run(None, feeds))
    except Exception as error:  # as above
        raise _Failed from error


def _difference(before: Sequence[Array], after: Sequence[Array]) -> float:
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
        largest = float(np.abs(x).max(initial=0.0)) or 1.0
        worst = max(worst, float(np.abs(x - y).max(initial=0.0)) / largest)
    return worst


def tidy(graph: Graph) -> None:
    """Drop nodes that nothing reads, and put the rest in an order in which each can run.

    Raises BundleError for a graph with a cycle.
    """
    outputs = {output.name for output in graph.model.graph.output}
    while True:
        read = outputs | set(tensor_names(graph.nodes))
        kept = [node for node in graph.nodes if not node.output or read & set(node.output)]
        if len(kept) == len(graph.nodes):
            break
        graph.nodes[:] = kept
    made = {name for node in graph.nodes for name in node.output if name}
    done: set[str] = set()
    ordered: list[NodeProto] = []
    waiting = list(graph.nodes)
    while waiting:
        later = []
        for node in waiting:
            if all(name in done or name not in made for name in tensor_names([node])):
                ordered.append(node)
                done.update(node.output)
            else:
                later.append(node)
        if len(later) == len(waiting):
            raise BundleError(f"the graph in {graph.folder} has a cycle at {later[0].name!r}")
        waiting = later
    graph.nodes[:] = ordered
