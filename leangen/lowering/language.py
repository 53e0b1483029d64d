"""What stands around `Linear` in a decoder, drawn into it; and `Attention`.

norm -> Linear                      Linear with a gain
Linear + residual                   Linear with a residual
Linear -> split -> silu(gate) * up  Linear, gated
GroupQueryAttention                 Attention, whose key cache has an order of its own
"""

from __future__ import annotations

import numpy as np
from leangen_kernels import layout
from onnx import NodeProto

from leangen.graph_edit import attributes
from leangen.lowering.draft import Draft, options_are, set_option
from leangen.lowering.rows import keep_batched

X, WEIGHTS, GAIN, BIAS, RESIDUAL = range(5)  # inputs of Linear


def rewrite(graph: Draft) -> int:
    """Fuse around each `Linear`, and replace attention, in graphs that have a `Linear`."""
    if not graph.all("Linear"):  # attention alone is not worth a second copy of the weights
        return 0
    graph.prune()
    for node in graph.all("Linear"):
        _gate(graph, node)
    for node in graph.all("SkipSimplifiedLayerNormalization"):
        _split_skip(graph, node)
    for node in graph.all("SimplifiedLayerNormalization", "RMSNormalization"):
        _norm(graph, node)
    replaced = [_attention(graph, node) for node in graph.all("GroupQueryAttention")]
    keep_batched(graph)
    return sum(replaced)


def _split_skip(graph: Draft, node: NodeProto) -> None:
    """Norm of a sum as a sum, drawn into the `Linear` before it, and a norm.

    An Add on its own stays: it may broadcast, which a residual does not.
    """
    x, residual, gain, *bias = node.input
    y, mean, variance, total = [*node.output, "", "", ""][:4]
    if any(bias) or mean or variance:
        return
    total, epsilon = total or f"{node.name}/sum", attributes(node).get("epsilon", 1e-5)
    graph.remove(node)
    if not any(_residual(graph, *pair, total) for pair in ((x, residual), (residual, x))):
        graph.put("Add", f"{node.name}/add", [x, residual], [total], domain="")
    graph.put(
        "SimplifiedLayerNormalization", node.name, [total, gain], [y],
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


def _gate(graph: Draft, linear: NodeProto) -> None:
    """Draw silu(first half) * second half into the `Linear` that makes both halves."""
    n = attributes(linear)["n"]
    split = graph.only_reader(linear.output[0], "Split")
    if split is None or linear.input[BIAS] or n % (2 * layout.ROWS) or len(split.output) != 2:
        return
    sizes = graph.values(split.input[1]) if len(split.input) > 1 else [n // 2, n // 2]
    gate, up = split.output
    silu, product = graph.only_reader(gate, "QuickGelu"), graph.only_reader(up, "Mul")
    if (
        attributes(split).get("axis", 0) != -1
        or sizes != [n // 2, n // 2]
        or silu is None
        or not options_are(silu, alpha=1.0)
        or product is None
        or graph.only_reader(silu.output[0]) is not product
        or set(product.input) != {silu.output[0], up}
    ):
        return
    graph.remove(linear, split, silu, product)
    # Rows stand in groups of 16, each one stretch of bytes: taking turns is moving groups.
    packed = graph.array(linear.input[WEIGHTS])
    groups = packed.reshape(2, n // 2 // layout.ROWS, -1).swapaxes(0, 1)
    linear.input[WEIGHTS] = graph.add(f"{linear.name}/gated", np.ascontiguousarray(groups).ravel())
    set_option(linear, "gated", 1)
    linear.output[0] = product.output[0]
    graph.add_node(linear)


def _norm(graph: Draft, norm: NodeProto) -> None:
    """Draw an RMS norm into the `Linear`s that read it, if nothing else does."""
    y, options = norm.output[0], attributes(norm)
    readers = graph.consumers(y)
    if (
        graph.is_output(y)
        or not graph.has(norm.input[1])
        or options.get("axis", -1) != -1
        or any(norm.output[1:])
        or any(
            node.op_type != "Linear" or node.input[GAIN] or y in list(node.input)[GAIN:]
            for node in readers
        )
    ):
        return
    graph.remove(norm, *readers)
    for linear in readers:
        linear.input[X], linear.input[GAIN] = norm.input[:2]
        set_option(linear, "epsilon", options.get("epsilon", 1e-5))
        graph.add_node(linear)


def _attention(graph: Draft, node: NodeProto) -> bool:
    inputs: list[str] = [*node.input, *[""] * 9]
    qkv, key, value, past_key, past_value, lengths, _, cosines, sines = inputs[:9]
    options = attributes(node)
    heads, kv_heads = options["num_heads"], options["kv_num_heads"]
    window = options.get("local_window_size", -1)
    known = options_are(
        node, num_heads=heads, kv_num_heads=kv_heads, local_window_size=window, do_rotary=1,
        rotary_interleaved=0, scale=options.get("scale", 0.0), softcap=0.0, smooth_softmax=(0, -1),
        qk_output=0, k_quant_type=b"NONE", v_quant_type=b"NONE", kv_cache_bit_width=0,
    )  # fmt: skip
    if not known or options.get("do_rotary", 0) != 1 or key or value or any(inputs[9:]):
        return False
    if not (graph.has(cosines) and graph.has(sines)):
        return False
    caches = [(past_key, node.output[1]), (past_value, node.output[2])]
    if (
        not all(
            graph.is_input(past)
            and graph.is_output(present)
            and len(graph.consumers(past)) == 1
            # a cache that is stated to grow is not appended to in place
            and graph.stated_shape(present) in ([], graph.stated_shape(past))
            for past, present in caches
        )
        or any(node.output[3:])
    ):
        return False
    width = 2 * graph.shape(cosines)[1]
    if width % layout.ROWS or graph.stated_shape(past_key)[-1] != width:
        return False
    graph.remove(node)
    graph.put(
        "Attention", node.name, [qkv, past_key, past_value, lengths, cosines, sines],
        list(node.output[:3]), heads=heads, kv_heads=kv_heads,
        window=max(window, 0), scale=options.get("scale", 0.0),
    )  # fmt: skip
    return True
