"""Cuts an ONNX graph into smaller ones at named tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Shape = list[str | int]


def producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """The node that makes each tensor."""
    return {name: node for node in graph.node for name in node.output if name}


def consumers(graph: onnx.GraphProto) -> dict[str, list[onnx.NodeProto]]:
    """The nodes that use each tensor."""
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    return users


def cut(
    model: onnx.ModelProto,
    *,
    inputs: Mapping[str, tuple[str, Shape]],
    outputs: Mapping[str, tuple[str, Shape]],
    constants: Mapping[str, np.ndarray[Any, Any]],
) -> onnx.ModelProto:
    """The part of `model` that makes `outputs` from `inputs`.

    Each maps a tensor's name to the (name, shape) that it gets; inputs of `model` itself keep their
    type, tensors inside are float32. `constants` replaces tensors by values. Node names stay. The
    part's inputs are those that it uses; ValueError names a model input that is missing.
    """
    made_by = producers(model.graph)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    types = {info.name: info.type.tensor_type.elem_type for info in model.graph.input}

    needed: set[str] = set()
    nodes: set[str] = set()
    stack = list(outputs)
    while stack:
        name = stack.pop()
        if name in needed or not name:
            continue
        needed.add(name)
        if name in inputs or name in constants or name in weights:
            continue
        if name not in made_by:
            raise ValueError(f"the graph also depends on its input {name!r}")
        node = made_by[name]
        nodes.add(node.output[0])
        stack += node.input

    names = {old: new for old, (new, _) in [*inputs.items(), *outputs.items()]}
    kept = [_renamed(n, names) for n in model.graph.node if n.output and n.output[0] in nodes]
    graph = helper.make_graph(
        kept,
        model.graph.name,
        [
            helper.make_tensor_value_info(new, types.get(old, TensorProto.FLOAT), shape)
            for old, (new, shape) in inputs.items()
            if old in needed
        ],
        [
            helper.make_tensor_value_info(new, TensorProto.FLOAT, shape)
            for new, shape in outputs.values()
        ],
        _initializers(needed, weights, constants),
    )
    part = helper.make_model(
        graph, opset_imports=list(model.opset_import), ir_version=model.ir_version
    )
    onnx.checker.check_model(part)
    return part


def _renamed(node: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.input[:] = [names.get(name, name) for name in node.input]
    copy.output[:] = [names.get(name, name) for name in node.output]
    return copy


def _initializers(
    needed: Iterable[str],
    weights: Mapping[str, onnx.TensorProto],
    constants: Mapping[str, np.ndarray[Any, Any]],
) -> list[onnx.TensorProto]:
    return [
        numpy_helper.from_array(constants[name], name) if name in constants else weights[name]
        for name in sorted(needed)
        if name in constants or name in weights
    ]
