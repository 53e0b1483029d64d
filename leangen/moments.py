"""Second moments of a graph's tensors over calibration data: what GPTQ, AWQ and imatrix look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import NodeProto, TensorProto, helper

from leangen import threads
from leangen.calibrate import Feeds
from leangen.errors import BundleError
from leangen.graph_edit import Array, tensor_names

_LIMIT_BYTES = 1 << 30


class Moments:
    """The mean of x x^T [k, k] of each tensor [..., k], computed when first asked for.

    Products are formed inside the graph, so activations never leave it; as many tensors are taken
    in one pass over `feeds` as fit `limit_bytes`, and those of the pass before are dropped. Ask in
    the order of `widths`.
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
        self._limit_bytes = limit_bytes
        self._note = note
        self._held: dict[str, Array] = {}
        self._divided: dict[str, Array] = {}

    def __getitem__(self, tensor: str) -> Array:
        """float32 [k, k]; BundleError where the data made the tensor NaN or infinite."""
        if tensor not in self._held:
            self._held.clear()
            self._held = self._pass(self._batch(tensor))
        moment, scale = self._held[tensor], self._divided.get(tensor)
        return moment if scale is None else moment / np.outer(scale, scale)

    def divide(self, tensor: str, scale: Array) -> None:
        """Take note that the graph now divides a tensor by `scale` [k]."""
        self._divided[tensor] = scale

    def _batch(self, first: str) -> list[str]:
        """Tensors from `first` on whose moments fit the limit together, or `first` alone."""
        names = list(self._widths)
        names = names[names.index(first) :]
        sizes = accumulate(4 * self._widths[name] ** 2 for name in names)
        fitting = sum(size <= self._limit_bytes for size in sizes)
        return names[: max(1, fitting)]

    def _pass(self, tensors: list[str]) -> dict[str, Array]:
        model = _moment_graph(onnx.load(self._path, load_external_data=False), tensors)
        options = ort.SessionOptions()
        options.intra_op_num_threads, _ = threads.choose(None)
        options.log_severity_level = 3
        for key, value in (
            ("session.model_external_initializers_file_folder_path", str(self._path.parent)),
            ("session.disable_prepacking", "1"),  # a second copy of the weights
        ):
            options.add_session_config_entry(key, value)
        session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        wanted = {entry.name for entry in session.get_inputs()}
        moments = {name: np.zeros((self._widths[name],) * 2, np.float32) for name in tensors}
        rows = dict.fromkeys(tensors, 0)
        for index, feed in enumerate(self._feeds, start=1):
            self._note(f"calibrating, {index} of {len(self._feeds)}")
            found = session.run(None, {name: feed[name] for name in wanted})
            for name, product, size in zip(tensors, found[0::2], found[1::2], strict=True):
                moments[name] += product
                rows[name] += int(size) // self._widths[name]
        for name, moment in moments.items():
            moment /= max(1, rows[name])
            if not np.isfinite(moment).all():
                raise BundleError(
                    f"tensor {name!r} became NaN or infinite while calibrating: "
                    "give other data, or export the model again"
                )
        return moments


def _moment_graph(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """The part of the graph that makes `tensors`, with x^T x and the size of each as outputs."""
    graph = model.graph
    added: list[NodeProto] = []
    outputs = []
    for index, name in enumerate(tensors):
        stem = f"moments/{index}"
        added += [
            helper.make_node("Flatten", [name], [f"{stem}/x"], axis=-1),
            helper.make_node("Gemm", [f"{stem}/x", f"{stem}/x"], [f"{stem}/xx"], transA=1),
            helper.make_node("Size", [name], [f"{stem}/size"]),
        ]
        outputs += [
            helper.make_tensor_value_info(f"{stem}/xx", TensorProto.FLOAT, None),
            helper.make_tensor_value_info(f"{stem}/size", TensorProto.INT64, None),
        ]
    needed, kept = {output.name for output in outputs}, []
    for node in reversed([*graph.node, *added]):
        if needed & set(node.output):
            kept.append(node)
            needed.update(tensor_names([node]))
    del graph.node[:], graph.output[:], graph.value_info[:]
    graph.node.extend(reversed(kept))
    graph.output.extend(outputs)
    for kind in (graph.initializer, graph.input):
        there = [entry for entry in kind if entry.name in needed]
        del kind[:]
        kind.extend(there)
    return model
