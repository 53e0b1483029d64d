"""Builds an ONNX graph node by node; weights go straight to one external data file.

A weight is written the moment it is named, so that only one is ever held in memory. Large ones
start on page boundaries, which lets ORT map them; the smallest stay inside the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

OPSET = 23
PAGE_BYTES = 4096
INLINE_BYTES = 1024

Array = np.ndarray[Any, Any]


class GraphWriter:
    """One graph `<stem>.onnx` with its weights in `<stem>.onnx.data`; use it as a context."""

    def __init__(self, folder: Path, stem: str = "model") -> None:
        self.path = folder / f"{stem}.onnx"
        self._data_name = f"{stem}.onnx.data"
        self._data = (folder / self._data_name).open("wb")
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._places: dict[str, tuple[int, int]] = {}

    def __enter__(self) -> GraphWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._data.close()

    def node(
        self,
        op: str,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str] | None = None,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node; returns its first output, named `<name>/y` unless `outputs` are given."""
        outputs = outputs or [f"{name}/y"]
        self._nodes.append(
            helper.make_node(op, inputs, outputs, name=name, domain=domain, **attributes)
        )
        return outputs[0]

    def microsoft(self, op: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a one-output node of ORT's own `com.microsoft` domain."""
        return self.node(op, name, inputs, domain="com.microsoft", **attributes)

    def constant(self, name: str, array: Array) -> str:
        """Add a constant tensor and return its name; its bytes are on disk afterwards."""
        array = np.asarray(array, order="C")  # not ascontiguousarray: that has no scalars
        tensor = self._tensor(name, array)
        if array.nbytes < INLINE_BYTES:
            tensor.raw_data = array.tobytes()
        else:
            self._data.seek(-self._data.tell() % PAGE_BYTES, 1)
            self._places[name] = (self._data.tell(), array.nbytes)
            self._data.write(array.reshape(-1).view(np.uint8).data)
            self._point_to_data(tensor, name)
        return name

    def view(self, name: str, array: Array, of: str) -> str:
        """A constant with the bytes of constant `of`, in the shape and type of `array`."""
        tensor = self._tensor(name, array)
        if of in self._places:
            self._point_to_data(tensor, of)
        else:
            tensor.raw_data = np.ascontiguousarray(array).tobytes()
        return name

    def append(self, nodes: Sequence[onnx.NodeProto]) -> None:
        """Add nodes that are made already."""
        self._nodes += nodes

    def save(
        self,
        inputs: Sequence[onnx.ValueInfoProto],
        outputs: Sequence[onnx.ValueInfoProto],
        *,
        opset: int = OPSET,
    ) -> Path:
        """Write the graph, whose weights are written already; returns its path."""
        graph = helper.make_graph(self._nodes, self.path.stem, inputs, outputs, self._initializers)
        model = helper.make_model(
            graph,
            producer_name="leangen",
            ir_version=10,
            opset_imports=[
                helper.make_opsetid("", opset),
                helper.make_opsetid("com.microsoft", 1),
            ],
        )
        self.path.write_bytes(model.SerializeToString())
        return self.path

    def _tensor(self, name: str, array: Array) -> onnx.TensorProto:
        tensor = TensorProto(
            name=name, dims=array.shape, data_type=helper.np_dtype_to_tensor_dtype(array.dtype)
        )
        self._initializers.append(tensor)
        return self._initializers[-1]

    def _point_to_data(self, tensor: onnx.TensorProto, name: str) -> None:
        offset, length = self._places[name]
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self._data_name), ("offset", offset), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
