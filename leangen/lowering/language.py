"""What stands around `Linear` in a decoder, drawn into it; and `Attention`.

norm -> Linear                      Linear with a gain, of a layer norm with a shift
Linear + bias                       Linear with a bias
Linear -> GELU or ReLU              Linear with an activation
Linear + residual                   Linear with a residual
Linear -> split -> silu(gate) * up  Linear, gated, also by gelu_tanh
GroupQueryAttention                 see `attention`
"""

from __future__ import annotations

import numpy as np
from leangen_kernels import layout
from onnx import NodeProto

from leangen.graph_edit import attributes
from leangen.lowering import attention
from leangen.lowering.draft import Draft, options_are, set_option
from leangen.lowering.rows import NORMS, keep_batched

X, WEIGHTS, GAIN, BIAS, RESIDUAL, SHIFT = range(6)  # inputs of Linear


def rewrite(graph: Draft) -> int:
    """Fuse around each `Linear`, and replace attention, in graphs that have a `Linear`."""
    if not graph.all("Linear"):  # attention alone is not worth a second copy of the weights
        return 0
    graph.prune()
    for node in graph.all("Linear"):
        _bias(graph, node)
        _gate(graph, node)
        _activation(graph, node)
    for node in graph.all("SkipSimplifiedLayerNormalization", "SkipLayerNormalization"):
        _split_skip(graph, node)
    for node in graph.all(*NORMS):
        _norm(graph, node)
    replaced = [attention.replace(graph, node) for node in graph.all("GroupQueryAttention")]
    graph.prune()
    keep_batched(graph)
    return sum(replaced)


def _split_skip(graph: Draft, node: NodeProto) -> None:
    """Norm of a sum as a sum, drawn into the `Linear` before it, and a norm.

    An Add on its own stays: it may broadcast, which a residual does not.
    """
    layer = node.op_type == "SkipLayerNormalization"
    x, residual, gain, *more = node.input
    shift, bias = more[:layer], more[layer:]
    y, mean, variance, total = [*node.output, "", "", ""][:4]
    if any(bias) or mean or variance:
        return
    total, epsilon = total or f"{node.name}/sum", attributes(node).get("epsilon", 1e-5)
    graph.remove(node)
    if not any(_residual(graph, *pair, total) for pair in ((x, residual), (residual, x))):
        graph.put("Add", f"{node.name}/add", [x, residual], [total], domain="")
    norm = "LayerNormalization" if layer else "SimplifiedLayerNormalization"
    graph.put(
        norm, node.name, [total, gain, *filter(None, shift)], [y],
        domain="", axis=-1, epsilon=epsilon,
    )  # fmt: skip


def _residual(graph: Draft, product: str, residual: str, total: str) -> bool:
    """Let the `Linear` that makes `product` make product + residual, if nothing reads it alone."""
    linear = graph.producer(product, "Linear")
    if linear is None or linear.input[RESIDUAL] or graph.is_output(product):
        return False
    if graph.consumers(product):  # the sum itself is gone already
        return False
    graph.remove(linear)
    linear.input[RESIDUAL], linear.output[0] = residual, total
    graph.add_node(linear)
    return True


def _bias(graph: Draft, linear: NodeProto) -> None:
    """Draw a constant that is added to every row into the `Linear` that makes the rows."""
    product = linear.output[0]
    add = graph.only_reader(product, "Add")
    if add is None or linear.input[BIAS] or linear.input[RESIDUAL] or add.input[0] == add.input[1]:
        return
    bias = next(name for name in add.input if name != product)
    if not graph.has(bias) or graph.shape(bias) != (attributes(linear)["n"],):
        return
    graph.remove(linear, add)
    linear.input[BIAS], linear.output[0] = bias, add.output[0]
    graph.add_node(linear)


def _activation(graph: Draft, linear: NodeProto) -> None:
    """Draw an activation into the `Linear` before it."""
    node = graph.only_reader(linear.output[0], "Gelu", "Relu")
    if node is None or linear.input[RESIDUAL] or attributes(linear)["gated"]:
        return
    if node.op_type == "Gelu" and not options_are(node, approximate=(b"none", b"tanh")):
        return
    tanh = attributes(node).get("approximate") == b"tanh"
    graph.remove(linear, node)
    set_option(linear, "activation", "gelu_tanh" if tanh else node.op_type.lower())
    linear.output[0] = node.output[0]
    graph.add_node(linear)


def _gate(graph: Draft, linear: NodeProto) -> None:
    """Draw silu(first half) * second half into the `Linear` that makes both halves."""
    n = attributes(linear)["n"]
    split = graph.only_reader(linear.output[0], "Split")
    if split is None or linear.input[BIAS] or n % (2 * layout.ROWS) or len(split.output) != 2:
        return
    sizes = graph.values(split.input[1]) if len(split.input) > 1 else [n // 2, n // 2]
    gate, up = split.output
    curve = graph.only_reader(gate, "QuickGelu", "Gelu")
    product = graph.only_reader(up, "Mul")
    if (
        attributes(split).get("axis", 0) != -1
        or sizes != [n // 2, n // 2]
        or curve is None
        or not (options_are(curve, alpha=1.0) or attributes(curve) == {"approximate": b"tanh"})
        or product is None
        or graph.only_reader(curve.output[0]) is not product
        or set(product.input) != {curve.output[0], up}
    ):
        return
    graph.remove(linear, split, curve, product)
    # Rows stand in groups of 16, each one stretch of bytes: taking turns is moving groups.
    packed = graph.array(linear.input[WEIGHTS])
    groups = packed.reshape(2, n // 2 // layout.ROWS, -1).swapaxes(0, 1)
    linear.input[WEIGHTS] = graph.add(f"{linear.name}/gated", np.ascontiguousarray(groups).ravel())
    set_option(linear, "gated", 1)
    if curve.op_type == "Gelu":
        set_option(linear, "activation", "gelu_tanh")
    linear.output[0] = product.output[0]
    graph.add_node(linear)


def _norm(graph: Draft, norm: NodeProto) -> None:
    """Draw a norm into the `Linear`s that read it, if nothing else does."""
    y, options, layer = norm.output[0], attributes(norm), norm.op_type == "LayerNormalization"
    readers = graph.consumers(y)
    if (
        graph.is_output(y)
        or not all(map(graph.has, norm.input[1:]))
        or options.get("axis", -1) != -1
        or any(norm.output[1:])
        or any(
            node.op_type != "Linear" or node.input[GAIN] or y in list(node.input)[GAIN:]
            for node in readers
        )
    ):
        return
    x, gain, *shift = norm.input
    if layer and not shift:
        shift = [graph.add(f"{norm.name}/shift", np.zeros(graph.shape(gain), np.float32))]
    graph.remove(norm, *readers)
    for linear in readers:
        linear.input[X], linear.input[GAIN] = x, gain
        set_option(linear, "epsilon", options.get("epsilon", 1e-5))
        if layer:
            linear.input[SHIFT] = shift[0]
            set_option(linear, "norm", "layer")
        graph.add_node(linear)
