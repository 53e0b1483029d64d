"""What is known of tensors' shapes before a graph runs, enough to tell that two are alike."""

from __future__ import annotations

from collections.abc import Hashable

import onnx

from leangen.graph_edit import attributes
from leangen.lowering.draft import Draft

_ELEMENTWISE = ("LeakyRelu", "Relu", "Sigmoid", "Tanh", "QuantizeLinear", "DequantizeLinear")


class Shapes:
    """The shapes of a graph's tensors as they were when this was made."""

    def __init__(self, graph: Draft) -> None:
        """Infers shapes by ONNX's rules; `graph` may be changed afterwards."""
        model = onnx.ModelProto()
        model.CopyFrom(graph.model)
        del model.graph.value_info[:]
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        self._dims = {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in (*inferred.value_info, *inferred.input, *inferred.output)
            if value.type.tensor_type.HasField("shape")
        }
        self._makers = {name: node for node in graph.model.graph.node for name in node.output}
        self._constants = {tensor.name for tensor in graph.model.graph.initializer}
        self._places: dict[str, Hashable] = {}

    def dims(self, tensor: str) -> list[int | str]:
        """A tensor's sizes and the names of those that vary; empty when nothing is known."""
        return self._dims.get(tensor, [])

    def rank(self, tensor: str) -> int | None:
        """How many dimensions a tensor has, or None."""
        return len(self._dims[tensor]) if tensor in self._dims else None

    def channels(self, tensor: str) -> int:
        """The size of a tensor's second dimension, 0 where it is unknown."""
        dims = self._dims.get(tensor, [])
        return dims[1] if len(dims) > 1 and isinstance(dims[1], int) else 0

    def same(self, one: str, other: str) -> bool:
        """Whether two tensors [batch, channels, ...] certainly differ in the batch at most."""
        if one not in self._dims or other not in self._dims:
            return False
        if self.rank(one) != self.rank(other) or not self.channels(one):
            return False
        if self.channels(one) != self.channels(other):
            return False
        sizes, others = self._dims[one][2:], self._dims[other][2:]
        known = bool(sizes) and all(isinstance(size, int) and size for size in sizes)
        return (known and sizes == others) or self._place(one) == self._place(other)

    def _place(self, tensor: str) -> Hashable:
        """Equal for tensors with equal dimensions but the channels."""
        pending = [tensor]
        while pending:  # graphs are deeper than Python's stack
            name = pending[-1]
            needed = [source for source in self._like(name) if source not in self._places]
            if name in self._places or not needed:
                pending.pop()
                if name not in self._places:
                    places = {self._places[source] for source in self._like(name)}
                    self._places[name] = places.pop() if len(places) == 1 else name
            else:
                pending += needed
        return self._places[tensor]

    def _like(self, tensor: str) -> list[str]:
        """The tensors whose place a tensor has if they all have the same one; none: its own."""
        node = self._makers.get(tensor)
        if node is None or node.domain not in ("", "ai.onnx"):
            return []
        options = attributes(node)
        if node.op_type in _ELEMENTWISE:
            return [node.input[0]]
        if node.op_type in ("Add", "Mul", "Sub", "Div"):
            varying = [name for name in node.input if not self._is_scalar(name)]
            return varying if len({self.rank(name) for name in varying}) == 1 else []
        if node.op_type == "Concat" and options.get("axis") == 1:
            return list(node.input)
        if node.op_type == "Conv" and set(options.get("strides", [1])) == {1}:
            kernel = options.get("kernel_shape") or self.dims(node.input[1])[2:]
            rank = len(kernel)
            pads, steps = options.get("pads", [0] * 2 * rank), options.get("dilations", [1] * rank)
            around = [pads[i] + pads[i + rank] for i in range(rank) if len(pads) == 2 * rank]
            if kernel and around == [s * (k - 1) for s, k in zip(steps, kernel, strict=True)]:
                return [node.input[0]]
        return []

    def _is_scalar(self, name: str) -> bool:
        dims = self._dims.get(name)
        return name in self._constants and (dims is None or set(dims) <= {1})
