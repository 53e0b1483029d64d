"""Traps of half precision, and of notes about tensors that are no longer true."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import (
    AttributeProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TypeProto,
    numpy_helper,
    shape_inference,
)

from leangen.graph_edit import Graph, subgraphs, tensor_names
from leangen.lint.rules import Hit, Rule, make

HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT
_COMPUTE = ("MatMul", "Gemm", "Conv", "ConvTranspose", "LSTM", "GRU", "FusedMatMul")


def _half(graph: Graph) -> Iterator[Hit]:
    """The graph as a whole, named by its largest layer: one type runs through it."""
    found = [
        (int(np.prod(graph.shape(name), dtype=np.int64)), index, node)
        for index, node in enumerate(graph.nodes)
        if node.op_type in _COMPUTE
        for name in node.input
        if graph.has(name) and graph.dtype(name) == HALF
    ]
    if found:
        _, _, largest = max(found, key=lambda entry: entry[:2])
        layers = len({index for _, index, _ in found})
        mendable = not any(list(subgraphs(node)) for node in graph.nodes)
        yield Hit((largest,), f"fp16 arithmetic in {layers} layers, on a CPU", mendable)


def _to_float(graph: Graph, hit: Hit) -> None:
    """fp16 weights stay fp16 on disk behind a Cast that ORT folds; everything computes in fp32."""
    casts: dict[str, str] = {}
    front: list[NodeProto] = []
    for name in dict.fromkeys(tensor_names(graph.nodes)):
        if graph.has(name) and graph.dtype(name) == HALF:
            casts[name] = f"{name}/fp32"
            front.append(make("Cast", [name], casts[name], to=FLOAT))
    for entry in graph.model.graph.input:
        if entry.type.tensor_type.elem_type == HALF:
            casts[entry.name] = f"{entry.name}/fp32"
            front.append(make("Cast", [entry.name], casts[entry.name], to=FLOAT))
    back = []
    for entry in graph.model.graph.output:
        if entry.type.tensor_type.elem_type == HALF:
            casts[entry.name] = f"{entry.name}/fp32"
            back.append(make("Cast", [casts[entry.name]], entry.name, to=HALF))
    middle = []
    for node in graph.nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        for field in (copy.input, copy.output):
            for index, name in enumerate(field):
                field[index] = casts.get(name, name)
        for attribute in copy.attribute:
            _float_attribute(copy.op_type, attribute)
        middle.append(copy)
    graph.nodes[:] = [*front, *middle, *back]


def _float_attribute(op: str, attribute: AttributeProto) -> None:
    """Types and constants that an attribute holds."""
    if attribute.name == ("to" if op == "Cast" else "dtype") and attribute.i == HALF:
        attribute.i = FLOAT
    elif attribute.type == AttributeProto.TENSOR and attribute.t.data_type == HALF:
        values = numpy_helper.to_array(attribute.t).astype(np.float32)
        attribute.t.CopyFrom(numpy_helper.from_array(values, attribute.t.name))


def _stale(graph: Graph) -> Iterator[Hit]:
    made = {name for node in graph.nodes for name in node.output}
    made |= {entry.name for entry in graph.model.graph.input}
    entries = graph.model.graph.value_info
    unknown = sum(entry.name not in made and not graph.has(entry.name) for entry in entries)
    if unknown:
        yield Hit((), f"{unknown} of {len(entries)} value_info entries name no tensor of the graph")
    elif untrue := _untrue(graph):
        more = f" and {len(untrue) - 1} more" if len(untrue) > 1 else ""
        yield Hit((), f"value_info says of {untrue[0]!r}{more} what it cannot be")


def _untrue(graph: Graph) -> list[str]:
    """Tensors of which a note tells another type, rank or size than follows from their nodes."""
    noted = {entry.name: entry.type.tensor_type for entry in graph.model.graph.value_info}
    if not noted:
        return []
    model = ModelProto()
    model.CopyFrom(graph.model)
    del model.graph.value_info[:]
    try:
        inferred = shape_inference.infer_shapes(model, data_prop=True).graph.value_info
    except shape_inference.InferenceError:
        return []
    return [
        entry.name
        for entry in inferred
        if entry.name in noted and not _agree(noted[entry.name], entry.type.tensor_type)
    ]


def _agree(one: TypeProto.Tensor, other: TypeProto.Tensor) -> bool:
    if one.elem_type != other.elem_type:
        return False
    if not (one.HasField("shape") and other.HasField("shape")):
        return True
    dims = one.shape.dim, other.shape.dim
    return len(dims[0]) == len(dims[1]) and all(
        a.dim_value == b.dim_value
        for a, b in zip(*dims, strict=True)
        if a.HasField("dim_value") and b.HasField("dim_value")
    )


def _drop_notes(graph: Graph, hit: Hit) -> None:
    del graph.model.graph.value_info[:]


RULES = (
    Rule(
        "fp16-on-cpu",
        "ONNX Runtime has few fp16 kernels for CPUs: it casts to fp32 and back around each layer",
        "results between layers are no longer rounded to fp16",
        _half,
        _to_float,
    ),
    Rule(
        "stale-value-info",
        "notes of shapes and types that are not true stop ONNX Runtime, or tools before it",
        None,
        _stale,
        _drop_notes,
    ),
)
