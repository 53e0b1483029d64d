"""An ONNX graph whose nodes are replaced, with weights that stay on disk until they are used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, helper, numpy_helper

from leangen.errors import BundleError

Array = np.ndarray[Any, Any]

# Below this size a tensor stays in the .onnx file: ORT reads shapes while it loads.
_INLINE_BYTES = 1024
# External tensors start on page boundaries of every platform ORT maps files on.
_ALIGN = 4096
_DTYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16): TensorProto.BFLOAT16,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int64): TensorProto.INT64,
}
_SMALL = ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2")
_PACKED = {kind for name, kind in TensorProto.DataType.items() if name in _SMALL}
"""Several to a byte: what ONNX has of them depends on its version."""


@dataclass(frozen=True, slots=True)
class Range:
    """The interval a tensor's values were seen in, and its shape at the largest input."""

    low: float
    high: float
    shape: tuple[int, ...]


def attributes(node: NodeProto) -> dict[str, Any]:
    """A node's attributes as plain values."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    """The graphs that a control-flow node holds."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        elif attribute.type == AttributeProto.GRAPHS:
            yield from attribute.graphs


def tensor_names(nodes: Iterable[NodeProto]) -> Iterator[str]:
    """Every tensor that the nodes read, those of their subgraphs included."""
    for node in nodes:
        yield from filter(None, node.input)  # an input that is left out has no name
        for graph in subgraphs(node):
            yield from tensor_names(graph.node)
            yield from (output.name for output in graph.output)


class Graph:
    """A graph opened for editing: `nodes`, and constants by name.

    Raises BundleError when `path` is not an ONNX file.
    """

    def __init__(self, path: Path) -> None:
        try:
            self.model = onnx.load(path, load_external_data=False)
        except DecodeError as error:
            raise BundleError(f"{path} is not an ONNX graph: export the model again") from error
        self.folder = path.parent
        self.nodes: list[NodeProto] = list(self.model.graph.node)
        for index, node in enumerate(self.nodes):
            node.name = node.name or f"{node.op_type}_{index}"
        self._stored = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self._added: dict[str, Array] = {}
        self._shared: dict[bytes, str] = {}
        self._changes: dict[str, list[Callable[[Array], Array]]] = {}

    @property
    def opset(self) -> int:
        """The version of the standard operators that it uses."""
        standard = ("", "ai.onnx")
        return max(int(o.version) for o in self.model.opset_import if o.domain in standard)

    def has(self, name: str) -> bool:
        """Whether `name` is a constant."""
        return name in self._stored or name in self._added

    def shape(self, name: str) -> tuple[int, ...]:
        """A constant's shape, without reading it."""
        if name in self._added:
            return tuple(map(int, self._added[name].shape))
        return tuple(int(size) for size in self._stored[name].dims)

    def is_float(self, name: str) -> bool:
        """Whether a constant holds float32 or float16."""
        if name in self._added:
            return bool(self._added[name].dtype.kind == "f")
        return bool(self._stored[name].data_type in (TensorProto.FLOAT, TensorProto.FLOAT16))

    def dtype(self, name: str) -> int:
        """A constant's `TensorProto` data type; for arrays of other types than ONNX has, 0."""
        if name in self._added:
            return int(_DTYPES.get(self._added[name].dtype, 0))
        kind: int = self._stored[name].data_type
        return kind

    def array(self, name: str) -> Array:
        """A constant's values; memory-mapped when they are external data and not changed."""
        array = self._read(name)
        for change in self._changes.get(name, ()):
            array = change(array).astype(array.dtype, copy=False)
        return array

    def change(self, name: str, change: Callable[[Array], Array]) -> None:
        """Let a constant be what `change` makes of it, whenever it is read from now on."""
        self._changes.setdefault(name, []).append(change)

    def rescale(self, name: str, axis: int, factors: Array) -> None:
        """Multiply a float constant by factors along an axis, whenever it is read from now on."""
        shape = [1] * len(self.shape(name))
        shape[axis] = len(factors)
        by = np.asarray(factors, np.float32).reshape(shape)
        self.change(name, lambda array: array * by)

    def _read(self, name: str) -> Array:
        if name in self._added:
            return self._added[name]
        tensor = self._stored[name]
        if tensor.data_location != TensorProto.EXTERNAL:
            return numpy_helper.to_array(tensor)
        place = {entry.key: entry.value for entry in tensor.external_data}
        dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
        shape = tuple(tensor.dims)
        if not np.prod(shape):
            return np.zeros(shape, dtype)
        offset, file = int(place.get("offset", 0)), self.folder / place["location"]
        if tensor.data_type in _PACKED:
            size = int(place["length"]) if "length" in place else -1
            packed = np.fromfile(file, np.uint8, size, offset=offset)
            plain = TensorProto(data_type=tensor.data_type, dims=shape, raw_data=packed.tobytes())
            return numpy_helper.to_array(plain)
        return np.memmap(file, dtype, "r", offset, shape)

    def external_files(self) -> set[str]:
        """The files beside the graph that hold its constants."""
        return {
            entry.value
            for tensor in self._stored.values()
            for entry in tensor.external_data
            if entry.key == "location"
        }

    def check_files(self) -> None:
        """BundleError when external data is missing or ends early."""
        for tensor in self._stored.values():
            place = {entry.key: entry.value for entry in tensor.external_data}
            if tensor.data_location == TensorProto.EXTERNAL:
                file = self.folder / place["location"]
                end = int(place.get("offset", 0)) + int(place.get("length", 0))
                if not file.is_file() or file.stat().st_size < end:
                    raise BundleError(
                        f"its weight file {place['location']!r} is missing or cut off: "
                        "copy it beside the graph, whole"
                    )

    def check_numbers(self) -> None:
        """BundleError when a float parameter holds NaN; a mask may well hold infinity."""
        for name, size in self.float_parameters().items():
            if size and np.isnan(self.array(name).min()):
                raise BundleError(
                    f"parameter {name!r} of {self.folder} holds NaN: export the model again from "
                    "an intact source"
                )

    def add(self, name: str, array: Array) -> str:
        """A new constant; returns its name."""
        self._added[name] = np.asarray(array)
        return name

    def add_shared(self, array: Array | np.generic) -> str:
        """A small constant that many nodes read, kept once per value; returns its name."""
        array = np.asarray(array)
        key = array.dtype.str.encode() + repr(array.shape).encode() + array.tobytes()
        if key not in self._shared:
            self._shared[key] = self.add(f"const/{len(self._shared)}", array)
        return self._shared[key]

    def replace(self, replacements: Mapping[str, list[NodeProto]]) -> None:
        """Put lists of nodes in place of the nodes of these names, in graph order."""
        self.nodes = [new for node in self.nodes for new in replacements.get(node.name, [node])]

    def float_parameters(self) -> dict[str, int]:
        """Name and size of every float constant that the nodes read."""
        return {
            name: int(np.prod(self.shape(name), dtype=np.int64))
            for name in dict.fromkeys(tensor_names(self.nodes))
            if self.has(name) and self.is_float(name)
        }

    def require(self, domain: str, version: int = 1) -> None:
        """Declare an operator domain that the nodes use."""
        if all(entry.domain != domain for entry in self.model.opset_import):
            self.model.opset_import.append(helper.make_opsetid(domain, version))

    def proto(self) -> onnx.ModelProto:
        """The model without its constants: every node, input and output."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        del model.graph.initializer[:]
        del model.graph.node[:]
        # Shapes and types noted for tensors that no longer exist, or changed, stop ORT.
        del model.graph.value_info[:]
        model.graph.node.extend(self.nodes)
        return model

    def save(self, path: Path, model: onnx.ModelProto | None = None) -> None:
        """Write `path` and `path.data`; constants that no node reads are left out.

        Arrays over the same memory are stored once: two names, one place in the file.
        """
        model = self.proto() if model is None else model
        data_name = path.name + ".data"
        outputs = {output.name for output in model.graph.output}
        placed: dict[tuple[int, int], int] = {}
        with (path.parent / data_name).open("wb") as file:
            for name in dict.fromkeys([*tensor_names(model.graph.node), *outputs]):
                if self.has(name):
                    model.graph.initializer.append(self._store(name, data_name, file, placed))
            empty = file.tell() == 0
        if empty:
            (path.parent / data_name).unlink()
        path.write_bytes(model.SerializeToString())

    def _store(
        self, name: str, data_name: str, file: Any, placed: dict[tuple[int, int], int]
    ) -> TensorProto:
        """Write one constant's bytes unless the same memory is in the file already."""
        stored: TensorProto | None = None if name in self._added else self._stored[name]
        if (
            stored is not None
            and stored.data_location != TensorProto.EXTERNAL
            and name not in self._changes
        ):
            inline = stored.ByteSize() < _INLINE_BYTES
            if inline or stored.data_type not in _DTYPES.values():
                return stored
        array = self.array(name)
        dtype, shape = stored.data_type if stored is not None else _DTYPES[array.dtype], array.shape
        if dtype in _PACKED:
            array = np.frombuffer(numpy_helper.from_array(array).raw_data, np.uint8)
        if array.nbytes < _INLINE_BYTES:
            small: TensorProto = helper.make_tensor(name, dtype, shape, array.tobytes(), raw=True)
            return small
        memory = (array.__array_interface__["data"][0], array.nbytes)
        offset = placed.get(memory) if stored is None else None
        if offset is None:
            file.write(b"\0" * (-file.tell() % _ALIGN))
            offset = file.tell()
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            if stored is None:  # added arrays live on; a stored one's memory is used again
                placed[memory] = offset
        tensor = TensorProto(name=name, data_type=dtype, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", data_name), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        return tensor
