"""A torch module as an ONNX graph whose weights are written straight from where they are stored.

The module is built without its weights and traced by torch's TorchScript exporter, which names
nodes after the modules that they stand for and writes group norm, SiLU and linear layers as the
nodes that ONNX Runtime and the lowering fuse. Attention becomes one `MultiHeadAttention`: it never
holds the whole matrix of scores. Weights are taken one at a time, so that no more than the largest
of them is ever in memory.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import nn

from leangen.exporters.onnx_writer import Array, GraphWriter

OPSET = 20
"""The newest that torch's TorchScript exporter writes."""
Weights = Callable[[str], Array]


def weightless(build: Callable[[], nn.Module]) -> nn.Module:
    """The module that `build` makes, in inference mode, each parameter one number of no memory.

    Its buffers are as they were built, and all of them part of its state.
    """
    with _on_meta():
        module = build().eval()
    stand_ins: dict[int, nn.Parameter] = {}
    for part in module.modules():
        part._non_persistent_buffers_set.clear()
        for name, parameter in part._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in stand_ins:
                # each of another value: the exporter takes equal ones for one and the same
                value = torch.tensor(1e-6 * (1 + len(stand_ins)))
                stand_ins[id(parameter)] = nn.Parameter(value.expand(parameter.shape), False)
            part._parameters[name] = stand_ins[id(parameter)]
    return module


@contextmanager
def _on_meta() -> Iterator[None]:
    """Parameters that are registered meanwhile have shapes and no values."""
    register = nn.Module.register_parameter

    def without_values(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        register(self, name, parameter)

    nn.Module.register_parameter = without_values
    try:
        yield
    finally:
        nn.Module.register_parameter = register


def write(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    weights: Weights,
    folder: Path,
    role: str,
    *,
    open_axes: Mapping[str, Mapping[int, str]],
) -> Path:
    """Write `module`, called with the values of `inputs`, as `<role>.onnx` in `folder`.

    `inputs` are examples; `open_axes` names the axes whose size they do not fix, by input or
    output. `weights` gives a tensor of the module's state by name.
    """
    model = trace(module, inputs, outputs, open_axes)
    with GraphWriter(folder, role) as writer:
        graph = model.graph
        for node in graph.node:
            if node.op_type == "Constant":
                writer.constant(node.output[0], numpy_helper.to_array(node.attribute[0].t))
        nodes, stored = _folded(
            [node for node in graph.node if node.op_type != "Constant"],
            {value.name for value in graph.input} - set(inputs),
            {value.name for value in graph.output},
        )
        for initializer in graph.initializer:
            writer.constant(initializer.name, numpy_helper.to_array(initializer))
        for tensor, name in stored.items():
            array = weights(name)
            writer.constant(tensor, array if tensor == name else np.ascontiguousarray(array.T))
        writer.append(nodes)
        wanted = [value for value in graph.input if value.name in inputs]
        return writer.save(wanted, graph.output, opset=OPSET)


def trace(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    open_axes: Mapping[str, Mapping[int, str]],
) -> onnx.ModelProto:
    """The module's graph; parameters and buffers are inputs, by their names in its state."""
    state = module.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    names = [name for name, tensor in state.items() if first[id(tensor)] == name]
    with tempfile.TemporaryDirectory(prefix="leangen-") as folder, _for_onnx():
        path = Path(folder) / "traced.onnx"
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sizes that become constants: `inputs` fix them
            torch.onnx.export(
                module,
                tuple(inputs.values()),
                path,
                dynamo=False,
                export_params=False,
                do_constant_folding=False,
                opset_version=OPSET,
                input_names=[*inputs, *names],
                output_names=list(outputs),
                dynamic_axes={name: dict(axes) for name, axes in open_axes.items()},
                custom_opsets={"com.microsoft": 1},
            )
        return onnx.load(path)


def _folded(
    nodes: Sequence[onnx.NodeProto], state: set[str], outputs: set[str]
) -> tuple[list[onnx.NodeProto], dict[str, str]]:
    """Nodes without those that only pass on or transpose a weight; the name of each stored tensor.

    `stored` maps the tensors that nodes read to names in the module's state; one of another name
    is the transposed.
    """
    names: dict[str, str] = {name: name for name in state}
    passed: dict[str, str] = {}
    kept = []
    for node in nodes:
        first = passed.get(node.input[0], node.input[0]) if node.input else ""
        if node.op_type == "Identity" and node.output[0] not in outputs:
            passed[node.output[0]] = first
        elif node.op_type == "Transpose" and first in state and len(node.attribute[0].ints) == 2:
            names[f"{first}.T"] = first
            passed[node.output[0]] = f"{first}.T"
        else:
            kept.append(node)
    for node in kept:
        node.input[:] = [passed.get(name, name) for name in node.input]
    used = {name for node in kept for name in node.input}
    return kept, {tensor: name for tensor, name in names.items() if tensor in used}


class _Attention(torch.autograd.Function):  # type: ignore[misc]
    """Scaled dot-product attention, traced as one node of ORT's."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bias: torch.Tensor | None,
        heads: int,
        causal: bool,
        scale: float | None,
    ) -> torch.Tensor:
        return _attend(q, k, v, bias, is_causal=causal, scale=scale)

    @staticmethod
    def symbolic(
        g: Any, q: Any, k: Any, v: Any, bias: Any, heads: int, causal: bool, scale: float | None
    ) -> Any:
        def shape(*sizes: int) -> Any:
            return g.op("Constant", value_t=torch.tensor(sizes))

        def rows(x: Any) -> Any:  # [b, heads, n, d] -> [b, n, heads * d]
            return g.op("Reshape", g.op("Transpose", x, perm_i=[0, 2, 1, 3]), shape(0, 0, -1))

        operands = [rows(q), rows(k), rows(v)]
        if bias is not None:
            nothing = g.op("prim::Constant")
            nothing.setType(torch._C.OptionalType.ofTensor())
            operands += [nothing, nothing, bias]
        options: dict[str, Any] = {"num_heads_i": heads, "unidirectional_i": int(causal)}
        if scale is not None:
            options["scale_f"] = scale
        y = g.op("com.microsoft::MultiHeadAttention", *operands, **options)
        return g.op("Transpose", g.op("Reshape", y, shape(0, 0, heads, -1)), perm_i=[0, 2, 1, 3])


_attend = F.scaled_dot_product_attention


_squeeze = torch.Tensor.squeeze


@contextmanager
def _for_onnx() -> Iterator[None]:
    """What the exporter writes badly is traced otherwise meanwhile.

    Torch's attention as `_Attention`; `squeeze` of one axis, for which it writes an `If`, by the
    size that the axis has.
    """

    def squeeze(self: torch.Tensor, *axes: Any) -> torch.Tensor:
        if len(axes) == 1 and isinstance(axes[0], int) and int(self.shape[axes[0]]) != 1:
            return self
        return _squeeze(self, *axes)

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                lowest = torch.finfo(query.dtype).min
                attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(
                    ~attn_mask, lowest
                )
            # ORT repeats a bias over batch and heads, but not over queries
            attn_mask = attn_mask.expand(-1, -1, query.shape[2], -1)
        heads = int(query.shape[1])
        attended: torch.Tensor = _Attention.apply(
            query, key, value, attn_mask, heads, is_causal, scale
        )
        return attended

    F.scaled_dot_product_attention, torch.Tensor.squeeze = attend, squeeze
    try:
        yield
    finally:
        F.scaled_dot_product_attention, torch.Tensor.squeeze = _attend, _squeeze
