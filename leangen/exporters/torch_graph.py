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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
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
    graph = trace(module, inputs, outputs, open_axes).graph
    folded = _Folded(graph, {value.name for value in graph.input} - set(inputs))
    with GraphWriter(folder, role) as writer:
        used = {name for node in folded.nodes for name in node.input}
        for name, array in folded.constants.items():
            if name in used:
                writer.constant(name, array)
        for tensor, (name, form) in folded.weights.items():
            if tensor in used:
                writer.constant(tensor, form(weights(name)))
        writer.append(folded.nodes)
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


class _Folded:
    """A graph whose constants are computed, and whose weights have the form in which they are used.

    What the exporter does itself only where it holds the weights.
    """

    def __init__(self, graph: onnx.GraphProto, state: set[str]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
        self.weights: dict[str, tuple[str, Callable[[Array], Array]]] = {
            name: (name, np.asarray) for name in state
        }
        """Tensor to the name of a weight, and what is made of it."""
        self._passed: dict[str, str] = {}
        outputs = {value.name for value in graph.output}
        for node in graph.node:
            node.input[:] = [self._passed.get(name, name) for name in node.input]
            if outputs & set(node.output) or not self._fold(node):
                self.nodes.append(node)

    def _fold(self, node: onnx.NodeProto) -> bool:
        """Whether a node is not needed: a constant, a weight in another form, or nothing at all."""
        output, given = node.output[0], list(node.input)
        if node.op_type == "Constant":
            self.constants[output] = numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type == "Identity" or self._is_neutral(node):
            self._passed[output] = given[0]
        elif given and given[0] in self.weights and (form := self._form(node)) is not None:
            name, former = self.weights[given[0]]
            suffix, change = form
            self.weights[given[0] + suffix] = name, partial(_both, former, change)
            self._passed[output] = given[0] + suffix
        elif node.op_type in _COMPUTED and all(name in self.constants for name in given):
            evaluator = ReferenceEvaluator(node, opsets={"": OPSET})
            values: Any = evaluator.run(None, {name: self.constants[name] for name in given})
            self.constants[output] = np.asarray(values[0])
        else:
            return False
        return True

    def _is_neutral(self, node: onnx.NodeProto) -> bool:
        """Whether it divides or multiplies by one."""
        if node.op_type not in ("Div", "Mul") or node.input[1] not in self.constants:
            return False
        factor = self.constants[node.input[1]]
        return factor.size == 1 and factor.item() == 1 and node.input[0] not in self.constants

    def _form(self, node: onnx.NodeProto) -> tuple[str, Callable[[Array], Array]] | None:
        """A suffix for a weight's name, and what a node makes of it."""
        if node.op_type == "Transpose" and list(node.attribute[0].ints) == [1, 0]:
            return ".T", np.transpose
        if node.op_type == "Unsqueeze" and node.input[1] in self.constants:
            axes = tuple(self.constants[node.input[1]].tolist())
            return f".{'_'.join(map(str, axes))}", partial(np.expand_dims, axis=axes)
        return None


_COMPUTED = (
    *("Add", "Cast", "Concat", "Div", "Gather", "Mul", "Slice", "Squeeze", "Sub", "Unsqueeze"),
)
"""What sizes are computed with."""


def _both(first: Callable[[Array], Array], then: Callable[[Array], Array], array: Array) -> Array:
    return then(first(array))


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
