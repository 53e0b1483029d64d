"""Writes an ONNX graph operator by operator, with stable names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 21
IR_VERSION = 10

Array: TypeAlias = np.ndarray[Any, Any]
"""A NumPy array of any type."""


class GraphWriter:
    """An ONNX graph being written, operator by operator."""

    def __init__(self) -> None:
        self.scope = ""
        self._nodes: list[onnx.NodeProto] = []
        self._names: Counter[str] = Counter()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], onnx.TensorProto] = {}

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append a node named `scope/Kind` (numbered from the second on); its output's name."""
        return self._append(kind, inputs, 1, attributes)[0]

    def split(self, x: str, sizes: Sequence[int], axis: int = -1) -> list[str]:
        """Cut an axis into parts of the given sizes."""
        inputs = [x, self.constant(sizes, np.int64)]
        return self._append("Split", inputs, len(sizes), {"axis": axis})

    def result(self, tensor: str, name: str) -> None:
        """Give a tensor the name of an output of the graph."""
        self._nodes.append(helper.make_node("Identity", [tensor], [name], name=f"/{name}"))

    def _append(
        self, kind: str, inputs: Sequence[str], count: int, attributes: dict[str, Any]
    ) -> list[str]:
        stem = f"{self.scope}/{kind}"
        name = f"{stem}_{self._names[stem]}" if self._names[stem] else stem
        self._names[stem] += 1
        outputs = [f"{name}_output_{i}" for i in range(count)]
        self._nodes.append(helper.make_node(kind, inputs, outputs, name=name, **attributes))
        return outputs

    def constant(self, value: Any, dtype: type = np.float64, name: str = "") -> str:
        """The name of an initializer with this value; equal unnamed ones are stored once."""
        array: Array = np.asarray(value, dtype)
        key = (name or array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            name = name or f"constant_{len(self._constants)}"
            self._constants[key] = numpy_helper.from_array(array, name)
        return self._constants[key].name

    def model(
        self, inputs: dict[str, list[str | int]], outputs: dict[str, list[str | int]]
    ) -> onnx.ModelProto:
        """The finished model, checked; inputs and outputs are float64 with these shapes."""
        graph = helper.make_graph(
            self._nodes,
            "flow",
            [helper.make_tensor_value_info(n, TensorProto.DOUBLE, s) for n, s in inputs.items()],
            [helper.make_tensor_value_info(n, TensorProto.DOUBLE, s) for n, s in outputs.items()],
            list(self._constants.values()),
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="leangen",
        )
        onnx.checker.check_model(model, full_check=True)
        return model
