"""The outer part of a UNet as a graph of its own, fed the deep features of an earlier step.

From one denoising step to the next the features of the inner levels change little (DeepCache, arXiv
2312.00858). The graph `model` gets them as a further output, `deep`: what enters the last block of
the way up. The graph `shallow` takes them as an input and leaves out all that they are made of; its
weights are those of `model`, in the same file.
"""

from __future__ import annotations

import re
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from leangen.errors import UnsupportedError
from leangen.exporters.onnx_cut import producers

DEEP = "deep"
_UP = re.compile(r"/model/up_blocks\.(\d+)/")


def split(folder: Path) -> None:
    """Write `shallow.onnx` beside `model.onnx`, which gets the output `deep`.

    Raises UnsupportedError for a model that is not a UNet of two blocks or more on its way up.
    """
    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = _deep(model)
    for node in model.graph.node:
        node.input[:] = [DEEP if name == tensor else name for name in node.input]
        node.output[:] = [DEEP if name == tensor else name for name in node.output]
    entry = helper.make_tensor_value_info(DEEP, TensorProto.FLOAT, ["batch", None, None, None])
    shallow = _without_deep(model, entry)
    model.graph.output.append(entry)
    path.write_bytes(model.SerializeToString())
    (folder / "shallow.onnx").write_bytes(shallow.SerializeToString())


def _deep(model: onnx.ModelProto) -> str:
    """The tensor that the last block on the way up takes from the one before."""
    matches = {node.name: _UP.match(node.name) for node in model.graph.node}
    blocks = {name: int(match[1]) for name, match in matches.items() if match}
    last = max(blocks.values(), default=0)
    made_by = producers(model.graph)
    found = {
        name
        for node in model.graph.node
        if blocks.get(node.name) == last
        for name in node.input
        if name in made_by and blocks.get(made_by[name].name) == last - 1
    }
    if last < 1 or len(found) != 1:
        raise UnsupportedError(
            "reuse needs a UNet of two blocks or more on its way up, which this model is not: "
            "leave it out"
        )
    deep: str = found.pop()
    return deep


def _without_deep(model: onnx.ModelProto, entry: onnx.ValueInfoProto) -> onnx.ModelProto:
    """The part of the graph that makes the outputs from the inputs and `deep`."""
    made_by = producers(model.graph)
    needed: set[str] = set()
    stack = [output.name for output in model.graph.output]
    while stack:
        name = stack.pop()
        if name in needed or name == DEEP:
            continue
        needed.add(name)
        if name in made_by:
            stack += made_by[name].input
    part = onnx.ModelProto()
    part.CopyFrom(model)
    for field in (part.graph.node, part.graph.initializer, part.graph.input):
        del field[:]
    part.graph.node.extend(
        node for node in model.graph.node if any(name in needed for name in node.output)
    )
    part.graph.initializer.extend(each for each in model.graph.initializer if each.name in needed)
    part.graph.input.extend(each for each in model.graph.input if each.name in needed)
    part.graph.input.append(entry)
    return part
