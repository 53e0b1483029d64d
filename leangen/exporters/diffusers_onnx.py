"""Graphs of a diffusers pipeline that are ONNX already, as optimum writes them, in a bundle's form.

Inputs and outputs get the names of `diffusers_components`, and what a pipeline computes around a
component goes into the graph: latents are scaled, sizes and images joined, types converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from leangen.errors import BundleError, SourceError, UnsupportedError
from leangen.exporters.diffusers_components import Form, Use, latent_scale
from leangen.graph_edit import Graph, subgraphs

if TYPE_CHECKING:
    import torch

FILE = "model.onnx"
_INPUTS = {
    "attention_mask": "mask",
    "class_labels": "class",
    "encoder_attention_mask": "text_mask",
    "encoder_hidden_states": "text",
    "input_ids": "tokens",
    "latent_sample": "latent",
    "pooled_projections": "pooled",
    "text_embeds": "pooled",
}
"""What optimum calls the inputs that bundles name otherwise."""
_OUTPUTS = {
    "image": ("sample",),
    "latent": ("latent_parameters", "latent_sample"),
    "pooled": ("text_embeds", "pooler_output"),
    "prediction": ("out_sample",),
}
_SIZES = ("original_size", "crop", "target_size")


def write(source: Path, form: Form, use: Use, config: Any, folder: Path, role: str) -> None:
    """Write the graph in file `source` as `<role>.onnx` in `folder`, in the form of the role.

    Raises SourceError for a file that is damaged, UnsupportedError for inputs that the form lacks.
    """
    if not source.is_file():
        raise SourceError(f"there is no {source}: expected a pipeline that optimum exported, whole")
    try:
        graph = Graph(source)
        graph.check_files()
    except BundleError as error:
        raise SourceError(f"{source} is damaged ({error})") from None
    edge = _Edge(source, graph, form)
    scale, shift = latent_scale(config) if role in ("decoder", "encoder") else (1.0, 0.0)
    for given in list(graph.model.graph.input):
        if not graph.has(given.name):
            edge.feed(given, use, config, scale, shift)
    for name in form.outputs:
        edge.take(name, use, config, scale, shift)
    edge.close()
    graph.save(folder / f"{role}.onnx")


class _Edge:
    """The nodes that are put before and after a graph."""

    def __init__(self, source: Path, graph: Graph, form: Form) -> None:
        self._source, self._graph, self._form = source, graph, form
        self._before: list[NodeProto] = []
        self._after: list[NodeProto] = []
        self._names: dict[str, str] = {}
        self._inputs: list[str] = []
        self._outputs = {value.name: value for value in graph.model.graph.output}

    def feed(self, value: Any, use: Use, config: Any, scale: Any, shift: Any) -> None:
        """Make an input of the graph of those of the form."""
        old, nodes = value.name, self._before
        self._names[old] = inside = f"given/{old}"
        match old:
            case "time_ids":
                x = self._op(nodes, "Concat", *map(self._input, _SIZES), axis=1)
            case "timestep_cond":
                x = self._guidance(config.time_cond_proj_dim)
            case "sample" if use.beside:
                planes = map(self._input, ("sample", *use.beside))
                x = self._op(nodes, "Concat", *planes, axis=1)
            case "latent_sample":
                x = self._op(nodes, "Mul", self._input("latent"), self._constant(1 / scale))
                x = self._op(nodes, "Add", x, self._constant(shift))
            case "sample" if "image" in self._form.inputs and not use.beside:
                x = self._input("image")
            case "class_labels" if "noise_level" in self._form.inputs:
                x = self._input("noise_level")
            case _:
                x = self._input(_INPUTS.get(old, old))
        kind = value.type.tensor_type
        if not kind.shape.dim and old == "timestep":
            x = self._op(nodes, "Gather", x, self._graph.add_shared(np.int64(0)))
        nodes.append(helper.make_node("Cast", [x], [inside], f"/{inside}", to=kind.elem_type))

    def take(self, name: str, use: Use, config: Any, scale: Any, shift: Any) -> None:
        """Make an output of the form of those of the graph."""
        known = _OUTPUTS.get(name, ("last_hidden_state",))
        if name == "hidden" and use.layer != -1:
            known = (f"hidden_states.{config.num_hidden_layers + 1 + use.layer}",)
        old = next((each for each in known if each in self._outputs), None)
        if old is None:
            raise UnsupportedError(
                f"{self._source} has outputs {', '.join(self._outputs)}, expected {known[0]}: "
                "export the pipeline again, with its hidden states"
            )
        self._names[old] = x = f"made/{old}"
        nodes = self._after
        if old == "latent_parameters":
            ends = [
                self._graph.add_shared(np.array([each])) for each in (0, config.latent_channels)
            ]
            x = self._op(nodes, "Slice", x, *ends, self._graph.add_shared(np.array([1])))
        x = self._op(nodes, "Cast", x, to=TensorProto.FLOAT)
        if name == "latent":
            x = self._op(nodes, "Sub", x, self._constant(shift))
            x = self._op(nodes, "Mul", x, self._constant(scale))
        elif name == "prediction":
            x = self._first(nodes, x, self._form.inputs["sample"].shape[0])
        nodes.append(helper.make_node("Identity", [x], [name], f"/{name}"))

    def close(self) -> None:
        """Put the nodes in place, and the form's inputs and outputs."""
        model = self._graph.model
        for node in self._graph.nodes:
            _rename(node, self._names)
        self._graph.nodes = [*self._before, *self._graph.nodes, *self._after]
        axes = self._form.open_axes()
        del model.graph.input[:]
        del model.graph.output[:]
        for name in self._inputs:
            each = self._form.inputs[name]
            shape = [axes[name].get(place + 1, size) for place, size in enumerate(each.shape)]
            kind = helper.np_dtype_to_tensor_dtype(_numpy(each.dtype))
            model.graph.input.append(helper.make_tensor_value_info(name, kind, ["batch", *shape]))
        for name in self._form.outputs:
            model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))

    def _input(self, name: str) -> str:
        if name not in self._form.inputs:
            raise UnsupportedError(
                f"{self._source} has an input {name!r}, expected {', '.join(self._form.inputs)}: "
                "export the pipeline from its weights"
            )
        self._inputs.append(name)
        return name

    def _op(self, nodes: list[NodeProto], kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"/edge/{kind}_{len(self._before) + len(self._after)}"
        nodes.append(helper.make_node(kind, inputs, [f"{name}/y"], name, **attributes))
        return f"{name}/y"

    def _first(self, nodes: list[NodeProto], x: str, channels: int) -> str:
        begin, end, axis = (self._graph.add_shared(np.array([each])) for each in (0, channels, 1))
        return self._op(nodes, "Slice", x, begin, end, axis)

    def _constant(self, value: Any) -> str:
        return self._graph.add_shared(np.asarray(value, np.float32))

    def _guidance(self, width: int) -> str:
        """The embedding of a guidance scale (arXiv 2310.04378)."""
        half, nodes = width // 2, self._before
        slow = 1000 * np.exp(-np.arange(half) * np.log(10000.0) / (half - 1))
        x = self._op(nodes, "Sub", self._input("guidance"), self._constant(1.0))
        x = self._op(nodes, "Unsqueeze", x, self._graph.add_shared(np.array([1])))
        x = self._op(nodes, "Mul", x, self._constant(slow))
        waves = [self._op(nodes, wave, x) for wave in ("Sin", "Cos")]
        return self._op(nodes, "Concat", *waves, axis=1)


def _rename(node: NodeProto, names: Mapping[str, str]) -> None:
    node.input[:] = [names.get(name, name) for name in node.input]
    node.output[:] = [names.get(name, name) for name in node.output]
    for graph in subgraphs(node):
        for inner in graph.node:
            _rename(inner, names)
        for output in graph.output:
            output.name = names.get(output.name, output.name)


def _numpy(dtype: torch.dtype) -> Any:
    return np.dtype(str(dtype).removeprefix("torch."))
