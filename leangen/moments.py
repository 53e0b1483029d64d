"""Second moments of a graph's tensors over calibration data: what GPTQ, AWQ and imatrix look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import NodeProto, TensorProto, ValueInfoProto, helper

from leangen import threads
from leangen.calibrate import Feeds
from leangen.errors import BundleError
from leangen.graph_edit import Array, tensor_names

_LIMIT_BYTES = 1 << 29


class Moments:
    """The mean of x x^T [k, k] of each tensor [..., k], computed when first asked for.

    Products are formed inside the graph, so activations never leave it. The graph is run part by
    part, as many tensors at once as fit `limit_bytes`: of a large model few layers are in memory,
    and none is computed twice if you ask in the order of `widths`. A part's moments are dropped
    with the next one's.
    """

    def __init__(
        self,
        path: Path,
        widths: Mapping[str, int],
        feeds: Sequence[Feeds],
        *,
        limit_bytes: int = _LIMIT_BYTES,
        note: Callable[[str], None] = lambda what: None,
    ) -> None:
        """`widths` holds k by tensor, in graph order; `path` is the fp32 graph."""
        self._path = path
        self._widths = widths
        self._feeds = feeds
        self._note = note
        self._parts = _parts(self._load().graph.node, _batches(widths, limit_bytes))
        self._next = 0
        self._given: list[dict[str, Array]] = [{} for _ in feeds]
        """What parts before `_next` made of each feed and later ones take."""
        self._held: dict[str, Array] = {}
        self._divided: dict[str, Array] = {}

    def __getitem__(self, tensor: str) -> Array:
        """float32 [k, k]; BundleError where the data made the tensor NaN or infinite."""
        if tensor not in self._held:
            self._held.clear()
            wanted = next(i for i, part in enumerate(self._parts) if tensor in part.tensors)
            if wanted < self._next:
                self._next, self._given = 0, [{} for _ in self._feeds]
            while self._next < wanted:
                self._run(measured=False)
            self._held = self._run(measured=True)
        moment, scale = self._held[tensor], self._divided.get(tensor)
        return moment if scale is None else moment / np.outer(scale, scale)

    def divide(self, tensor: str, scale: Array) -> None:
        """Take note that the graph now divides a tensor by `scale` [k]."""
        self._divided[tensor] = scale

    def _load(self) -> onnx.ModelProto:
        return onnx.load(self._path, load_external_data=False)

    def _run(self, *, measured: bool) -> dict[str, Array]:
        """Run the next part; the moments of its tensors where they are to be measured."""
        part, later = self._parts[self._next], self._parts[self._next + 1 :]
        tensors = part.tensors if measured else []
        taken = {name for other in later for name in other.takes}
        model = self._load()
        _cut(model.graph, part, self._given[0], taken)
        for index, name in enumerate(tensors):
            _add_moment(model.graph, name, f"moments/{index}")
        self._next += 1
        if not model.graph.output:
            return {}
        session = self._open(model)
        inputs = {entry.name for entry in session.get_inputs()}
        outputs = [entry.name for entry in session.get_outputs()]
        moments = {name: np.zeros((self._widths[name],) * 2, np.float32) for name in tensors}
        rows = dict.fromkeys(tensors, 0)
        for index, (feed, given) in enumerate(zip(self._feeds, self._given, strict=True)):
            if measured:
                self._note(f"calibrating, {index + 1} of {len(self._feeds)}")
            values = {**feed, **given}
            found = session.run(None, {name: values[name] for name in inputs})
            made = dict(zip(outputs, found, strict=True))
            for number, name in enumerate(tensors):
                moments[name] += made.pop(f"moments/{number}/xx")
                rows[name] += int(made.pop(f"moments/{number}/size")) // self._widths[name]
            self._given[index] = {k: v for k, v in (given | made).items() if k in taken}
        for name, moment in moments.items():
            moment /= max(1, rows[name])
            if not np.isfinite(moment).all():
                raise BundleError(
                    f"tensor {name!r} became NaN or infinite while calibrating: "
                    "give other data, or export the model again"
                )
        return moments

    def _open(self, model: onnx.ModelProto) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads, _ = threads.choose(None)
        options.log_severity_level = 3
        for key, value in (
            ("session.model_external_initializers_file_folder_path", str(self._path.parent)),
            ("session.disable_prepacking", "1"),  # a second copy of the weights
        ):
            options.add_session_config_entry(key, value)
        return ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


@dataclass(frozen=True, slots=True)
class _Part:
    """Nodes that run together, to make `tensors`."""

    tensors: list[str]
    nodes: list[int]
    takes: set[str]
    """What parts before it made."""


def _batches(widths: Mapping[str, int], limit_bytes: int) -> list[list[str]]:
    """Tensors in order, together where their moments fit the limit."""
    batches: list[list[str]] = []
    left = 0
    for name, width in widths.items():
        left -= 4 * width**2
        if left < 0 or not batches:
            batches.append([])
            left = limit_bytes - 4 * width**2
        batches[-1].append(name)
    return batches


def _parts(nodes: Sequence[NodeProto], batches: Sequence[list[str]]) -> list[_Part]:
    """For each batch the nodes that it needs and no batch before it needed."""
    maker = {output: index for index, node in enumerate(nodes) for output in node.output}
    made: set[int] = set()
    parts = []
    for tensors in batches:
        mine: set[int] = set()
        takes: set[str] = set()
        needed = list(tensors)
        while needed:
            name = needed.pop()
            index = maker.get(name)
            if index in made:
                takes.add(name)
            elif index is not None and index not in mine:
                mine.add(index)
                needed += tensor_names([nodes[index]])
        made |= mine
        parts.append(_Part(tensors, sorted(mine), takes))
    return parts


def _cut(graph: onnx.GraphProto, part: _Part, given: Mapping[str, Array], taken: set[str]) -> None:
    """Leave a part's nodes, with what it is given as inputs and what is taken of it as outputs."""
    nodes = [graph.node[index] for index in part.nodes]
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
        for name, value in given.items()
        if name in part.takes
    ]
    outputs = [name for node in nodes for name in node.output if name in taken]
    needed = {*part.tensors, *tensor_names(nodes)}
    for kind in (graph.initializer, graph.input):
        there = [entry for entry in kind if entry.name in needed]
        del kind[:]
        kind.extend(there)
    del graph.node[:], graph.output[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.input.extend(inputs)
    graph.output.extend(ValueInfoProto(name=name) for name in outputs)


def _add_moment(graph: onnx.GraphProto, tensor: str, stem: str) -> None:
    """x^T x of a tensor and its size as outputs."""
    graph.node.extend(
        [
            helper.make_node("Flatten", [tensor], [f"{stem}/x"], axis=-1),
            helper.make_node("Gemm", [f"{stem}/x", f"{stem}/x"], [f"{stem}/xx"], transA=1),
            helper.make_node("Size", [tensor], [f"{stem}/size"]),
        ]
    )
    graph.output.extend(
        [
            helper.make_tensor_value_info(f"{stem}/xx", TensorProto.FLOAT, None),
            helper.make_tensor_value_info(f"{stem}/size", TensorProto.INT64, None),
        ]
    )
