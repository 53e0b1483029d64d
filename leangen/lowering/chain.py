"""`Chain` in place of the stretches of a graph that are `Linear` and `Attention` alone.

ORT then wakes its threads once for a whole decoder instead of at each of its operators, and keeps
neither their shapes nor their outputs. What the steps compute does not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any

from onnx import ModelProto, NodeProto, TensorProto, helper

from leangen.graph_edit import attributes, tensor_names
from leangen.lowering.draft import DOMAIN

KINDS = ("Linear", "Attention")
"""What a step may be; `Chain` knows them by number."""
_INPUTS = (6, 8)
_MOST_STEPS = 1024


def fuse(model: ModelProto) -> None:
    """Put a `Chain` in place of every two or more such nodes that stand together, in place."""
    graph = model.graph
    nodes: list[NodeProto] = []
    for fits, group in groupby(graph.node, _fits):
        run = list(group)
        for stretch in _stretches(run) if fits else ():
            nodes += [_chain(model, stretch)] if len(stretch) > 1 else stretch
        nodes += [] if fits else run
    del graph.node[:]
    graph.node.extend(nodes)


def _fits(node: NodeProto) -> bool:
    return node.domain == DOMAIN and node.op_type in KINDS


def _stretches(run: list[NodeProto]) -> Iterator[list[NodeProto]]:
    for start in range(0, len(run), _MOST_STEPS):
        yield run[start : start + _MOST_STEPS]


def _chain(model: ModelProto, steps: list[NodeProto]) -> NodeProto:
    made = {step.output[0]: index for index, step in enumerate(steps)}
    inputs = list(
        dict.fromkeys(name for step in steps for name in step.input if name and name not in made)
    )
    places = {"": -1, **{name: index for index, name in enumerate(inputs)}}
    places |= {name: len(inputs) + index for name, index in made.items()}
    own = {id(step) for step in steps}
    read = {output.name for output in model.graph.output}
    read.update(tensor_names(node for node in model.graph.node if id(node) not in own))
    results = [index for name, index in made.items() if name in read]
    kinds = [KINDS.index(step.op_type) for step in steps]
    options: dict[str, Any] = {"kinds": kinds, "results": results}
    for index, (step, kind) in enumerate(zip(steps, kinds, strict=True)):
        padded = [*step.input, *[""] * _INPUTS[kind]][: _INPUTS[kind]]
        options[f"inputs_{index}"] = [places[name] for name in padded]
        options |= {f"{name}_{index}": value for name, value in attributes(step).items()}
    outputs = [steps[index].output[0] for index in results]
    model.graph.value_info.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs
    )
    outputs += [name for step in steps for name in step.output[1:]]
    return helper.make_node(
        "Chain", inputs, outputs, steps[0].name, domain=DOMAIN, given=len(inputs), **options
    )
