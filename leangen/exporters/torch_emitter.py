"""Writes a trace of a torch function as an ONNX graph, operator by operator.

Linear layers become `MatMul` on constants [k, n] and `Add`; weights keep the names that torch has
for them. The conversions are in `torch_arithmetic`, `torch_layers` and `torch_shapes`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from onnx import TensorProto, helper

from leangen.errors import UnsupportedError
from leangen.exporters.torch_trace import Batch, Constant, Op, Size, Tensor, Trace, Value

Array: TypeAlias = np.ndarray[Any, Any]

ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.uint8: TensorProto.UINT8,
    torch.int8: TensorProto.INT8,
    torch.bool: TensorProto.BOOL,
}


_PLAIN: Mapping[str, Any] = {
    "decimals": 0,
    "divisor_override": None,
    "reduce": None,
    "include_self": True,
}
"""Arguments that no conversion reads, and the values with which there is nothing to read."""


class Writer(Protocol):
    """What nodes and constants are written to: a graph, or the body of a loop in it."""

    def node(self, op: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node; the name of its first output."""
        ...

    def constant(self, name: str, array: Array) -> str:
        """Add a constant; its name."""
        ...


Convert: TypeAlias = Callable[["Emitter", Mapping[str, Any], Op], "str | list[str]"]


def registry() -> tuple[dict[str, Convert], Callable[..., Callable[[Convert], Convert]]]:
    """A dict of conversions by ATen name, and the decorator that fills it."""
    found: dict[str, Convert] = {}

    def aten(*names: str) -> Callable[[Convert], Convert]:
        def register(convert: Convert) -> Convert:
            found.update(dict.fromkeys(names, convert))
            return convert

        return register

    return found, aten


@cache
def conversions() -> Mapping[str, Convert]:
    """All conversions by ATen name."""
    from leangen.exporters import torch_arithmetic, torch_layers, torch_scan, torch_shapes

    return {
        **torch_arithmetic.CONVERSIONS,
        **torch_layers.CONVERSIONS,
        **torch_shapes.CONVERSIONS,
        **torch_scan.CONVERSIONS,
    }


def _key(array: Array) -> str:
    """A short name for the content of a weight."""
    digest = hashlib.sha256(np.ascontiguousarray(array).tobytes())
    digest.update(str(array.shape).encode())
    return digest.hexdigest()[:10]


class Emitter:
    """Writes traces into one graph.

    `shared` holds the keys of the weights that another graph of the bundle has as well. They are
    the layers of networks, named `/net/...`; a matrix that only one direction of a flow has belongs
    to the bijection itself and is named `/bijection/...`. With None all are `/net/...`.
    """

    def __init__(
        self,
        writer: Writer,
        batch_of: str,
        shared: Collection[str] | None = None,
        scope: str = "",
    ) -> None:
        self.writer = writer
        self.shared = shared
        self._scope = scope
        self.batch_of = batch_of
        self.weights: set[str] = set()
        """Keys of the layers' weights so far."""
        self._names: dict[int, str] = {}
        self._counts: Counter[str] = Counter()
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}
        self._sizes: dict[Batch, str] = {}

    def emit(self, trace: Trace, feeds: Sequence[str]) -> list[str]:
        """Write the operators of a trace fed with tensors `feeds`; the names of its outputs."""
        self._names = {value.index: name for value, name in zip(trace.inputs, feeds, strict=True)}
        for op in _used(trace):
            strange = {v.dtype for v in op.outputs if v is not None} - ONNX_TYPES.keys()
            if op.name not in conversions() or strange:
                of_type = f" of {strange.pop()}" if strange else ""
                raise UnsupportedError(
                    f"{op.where}: the operator aten.{op.name}{of_type} has no counterpart here: "
                    "rewrite the line with other operators, or export the module to ONNX yourself "
                    "(torch.onnx) and give leangen the file"
                )
            for argument, plain in _PLAIN.items():
                if op.arguments.get(argument, plain) != plain:
                    raise UnsupportedError(
                        f"{op.where}: aten.{op.name} with {argument}={op.arguments[argument]!r} "
                        "has no counterpart here: rewrite the line without it"
                    )
            made = conversions()[op.name](self, op.arguments, op)
            names = made if isinstance(made, list) else [made]
            for value, name in zip(op.outputs, names, strict=False):
                if value is not None:
                    self._names[value.index] = name
        return [self.full(output) for output in trace.outputs]

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append a node; its first output."""
        return self.writer.node(kind, self._unique(f"{self._scope}/{kind}"), inputs, **attributes)

    def several(self, kind: str, count: int, *inputs: str, **attributes: Any) -> list[str]:
        """Append a node; all of its `count` outputs."""
        name = self._unique(f"{self._scope}/{kind}")
        outputs = [f"{name}/y{i}" for i in range(count)]
        self.writer.node(kind, name, inputs, outputs=outputs, **attributes)
        return outputs

    def weighted(self, kind: str, weight: str, *inputs: str, **attributes: Any) -> str:
        """Append a node with a weight, named after the weight, which is a constant's name."""
        return self.labelled(kind, f"{weight}/{kind}", *inputs, **attributes)

    def labelled(self, kind: str, label: str, *inputs: str, **attributes: Any) -> str:
        """Append a node of a given name."""
        return self.writer.node(kind, self._unique(label), inputs, **attributes)

    def scope(self, name: str) -> str:
        """A name of its own for a part of the graph."""
        return self._unique(f"{self._scope}/{name}")

    def bind(self, value: Value, name: str) -> None:
        """Tell the name that a value has in this graph."""
        self._names[value.index] = name

    def _unique(self, name: str) -> str:
        self._counts[name] += 1
        count = self._counts[name]
        return name if count == 1 else f"{name}_{count}"

    def const(self, value: Any, dtype: Any = np.int64) -> str:
        """The name of a constant; equal ones are stored once."""
        array: Array = np.asarray(value, dtype)
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self._constants:
            name = self._unique(f"{self._scope}constant")
            self._constants[key] = self.writer.constant(name, array)
        return self._constants[key]

    def weight(self, constant: Constant, array: Array | None = None) -> str:
        """The name of a layer's weight, stored as `array` (default: as it is, in fp32 or fp64)."""
        if array is None:
            tensor = constant.tensor.detach()
            array = (tensor if tensor.dtype == torch.float64 else tensor.float()).numpy()
        key = _key(array)
        self.weights.add(key)
        label = constant.name or f"folded.{key}"
        kind = "net" if self.shared is None or key in self.shared else "bijection"
        name = f"/{kind}/{label}"
        found = (name, array.shape, key.encode())
        if found not in self._constants:
            self._constants[found] = self.writer.constant(self._unique(name), array)
        return self._constants[found]

    def name(self, tensor: Tensor | Batch | float, dtype: torch.dtype | None = None) -> str:
        """The name of an operand, brought to `dtype`; a batch of equal constants is one of them."""
        if isinstance(tensor, Value):
            name, now = self._names[tensor.index], tensor.dtype
            if dtype is None or dtype == now:
                return name
            return self.op("Cast", name, to=ONNX_TYPES[dtype])
        if isinstance(tensor, Batch):
            count = self.op("Squeeze", self._batch(tensor))
            return self.cast(count, dtype or torch.int64)
        if isinstance(tensor, Constant):
            array = tensor.tensor.detach().to(dtype or tensor.dtype).numpy()
        else:
            array = torch.tensor(tensor, dtype=dtype).numpy()
        if dtype is None and array.dtype == np.float64:
            array = array.astype(np.float32)
        return self.const(array, array.dtype)

    def full(self, tensor: Tensor, dtype: torch.dtype | None = None) -> str:
        """The name of an operand in its whole shape, batch included."""
        name = self.name(tensor, dtype)
        if isinstance(tensor, Constant) and tensor.repeats is not None:
            return self.op("Expand", name, self.shape(tensor.repeats))
        return name

    def shape(self, sizes: Sequence[Size]) -> str:
        """The name of a shape."""
        if not any(isinstance(size, Batch) for size in sizes):
            return self.const(list(sizes))
        parts = [self._batch(s) if isinstance(s, Batch) else self.const([s]) for s in sizes]
        return self.op("Concat", *parts, axis=0) if len(parts) > 1 else parts[0]

    def _batch(self, size: Batch) -> str:
        if size not in self._sizes:
            count = self.op("Shape", self.batch_of, start=0, end=1)
            if size.times > 1:
                count = self.op("Mul", count, self.const([size.times]))
            self._sizes[size] = count
        return self._sizes[size]

    def reshape(self, x: str, shape: Sequence[Size]) -> str:
        """A view of `x`; one size that depends on the batch is left open."""
        open_sizes = [size for size in shape if isinstance(size, Batch)]
        if len(open_sizes) > 1:
            return self.op("Reshape", x, self.shape(shape))
        target = [-1 if isinstance(size, Batch) else size for size in shape]
        return self.op("Reshape", x, self.const(target))

    def cast(self, x: str, dtype: torch.dtype) -> str:
        """`x` as `dtype`."""
        return self.op("Cast", x, to=ONNX_TYPES[dtype])


def _used(trace: Trace) -> list[Op]:
    """The operators that the outputs need, in order."""
    needed = {output.index for output in trace.outputs if isinstance(output, Value)}
    used = []
    for op in reversed(trace.ops):
        if any(value is not None and value.index in needed for value in op.outputs):
            used.append(op)
            needed |= {value.index for value in values(op.arguments)}
    return used[::-1]


def values(arguments: Any) -> list[Value]:
    """The traced tensors among arguments, in lists too."""
    if isinstance(arguments, Value):
        return [arguments]
    if isinstance(arguments, Mapping):
        arguments = list(arguments.values())
    if isinstance(arguments, list | tuple):
        return [value for argument in arguments for value in values(argument)]
    return []


def value_info(name: str, dtype: torch.dtype, shape: Sequence[Size]) -> Any:
    """The description of a graph's input or output; sizes that follow the batch are `n`."""
    sizes = [
        size if isinstance(size, int) else "n" if size.times == 1 else f"{size.times}n"
        for size in shape
    ]
    return helper.make_tensor_value_info(name, ONNX_TYPES[dtype], sizes)


class _Nowhere:
    """A writer that keeps nothing."""

    def node(self, op: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        return f"{name}/y"

    def constant(self, name: str, array: Array) -> str:
        return name


def layer_weights(trace: Trace) -> frozenset[str]:
    """Keys of the weights of the layers in a trace."""
    emitter = Emitter(_Nowhere(), "x")
    emitter.emit(trace, ["x"] * len(trace.inputs))
    return frozenset(emitter.weights)
