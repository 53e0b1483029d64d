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
from leangen.lowering.draft import DOMAIN, Draft, options_are, set_option
from leangen.lowering.rows import keep_batched

X, WEIGHTS, GAIN, BIAS, RESIDUAL = range(5)  # inputs of Linear


def rewrite(graph: Draft) -> int:
    """Fuse around each `Linear`, and replace attention, in graphs that have a `Linear`."""
    if not graph.all("Linear"):  # attention alone is not worth a second copy of the weights
        return 0
    graph.prune()
    for node in graph.all("SkipSimplifiedLayerNormalization"):
        _split_skip(graph, node)
    for node in graph.all("Linear"):
        _gate(graph, node)
    for node in graph.all("Add"):
        _residual(graph, node)
    for node in graph.all("SimplifiedLayerNormalization", "RMSNormalization"):
        _norm(graph, node)
    replaced = [_attention(graph, node) for node in graph.all("GroupQueryAttention")]
    keep_batched(graph)
    return sum(replaced)


def _split_skip(graph: Draft, node: NodeProto) -> None:
    """Norm of a sum as an Add and a norm, each to be drawn into its neighbour."""
    x, residual, gain, *bias = node.input
    mean, variance = [*node.output, "", "", ""][1:3]
    total = [*node.output, "", "", ""][3] or f"{node.name}/total"
    if any(bias) or mean or variance:
        return
    y, epsilon = node.output[0], attributes(node).get("epsilon", 1e-5)
    graph.remove(node)
    graph.put("Add", f"{node.name}/add", [x, residual], [total], domain="")
    graph.put(
        "SimplifiedLayerNormalization", node.name, [total, gain], [y],
        domain="", axis=-1, epsilon=epsilon,
    )  # fmt: skip


def _gate(graph: Draft, linear: NodeProto) -> None:
    n = attributes(linear)["n"]
    split = graph.only_reader(linear.output[0], "Split")
    if split is None or linear.input[BIAS] or n % (2 * layout.ROWS) or len(split.output) != 2:
        return
    halves = graph.values(split.input[1]) == [n // 2, n // 2] if len(split.input) > 1 else True
    gate, up = split.output
    product = graph.only_reader(up, "Mul")
    if not halves or attributes(split).get("axis", 0) not in (-1, 1, 2) or product is None:
        return
    silu = [
        reader
        for reader in graph.consumers(gate)
        if reader.op_type == "QuickGelu" and options_are(reader, alpha=1.0)
    ]
    if len(silu) != 1 or len(graph.consumers(gate)) != 1:
        return
    if set(product.input) != {silu[0].output[0], up}:
        return
    if graph.only_reader(silu[0].output[0]) is None:
        return
    graph.remove(linear, split, silu[0], product)
    # Rows stand in groups of 16, each one stretch of bytes: taking turns is moving groups.
    packed = graph.array(linear.input[WEIGHTS])
    groups = packed.reshape(2, n // 2 // layout.ROWS, -1).swapaxes(0, 1)
    linear.input[WEIGHTS] = graph.add(f"{linear.name}/gated", np.ascontiguousarray(groups).ravel())
    set_option(linear, "gated", 1)
    linear.output[0] = product.output[0]
    graph.add_node(linear)


def _residual(graph: Draft, add: NodeProto) -> None:
    for linear_input, other in ((add.input[0], add.input[1]), (add.input[1], add.input[0])):
        linear = graph.producer(linear_input, "Linear")
        if linear is None or linear.domain != DOMAIN or linear.input[RESIDUAL]:
            continue
        if graph.only_reader(linear_input) is None or graph.has(other):
            continue
        graph.remove(add, linear)
        linear.input[RESIDUAL] = other
        linear.output[0] = add.output[0]
        graph.add_node(linear)
        return


def _norm(graph: Draft, norm: NodeProto) -> None:
    readers = graph.consumers(norm.output[0])
    if graph.is_output(norm.output[0]) or not graph.has(norm.input[1]):
        return
    if attributes(norm).get("axis", -1) != -1 or len([o for o in norm.output if o]) > 1:
        return
    if any(
        node.op_type != "Linear"
        or node.input[GAIN]
        or node.input[X] != norm.output[0]
        or norm.output[0] in list(node.input)[1:]
        for node in readers
    ):
        return
    graph.remove(norm, *readers)
    for linear in readers:
        linear.input[X], linear.input[GAIN] = norm.input[0], norm.input[1]
        set_option(linear, "epsilon", attributes(norm).get("epsilon", 1e-5))
        graph.add_node(linear)


def _attention(graph: Draft, node: NodeProto) -> bool:
    qkv, key, value, past_key, past_value, lengths, _, cosines, sines, *more = [*node.input, "", ""]
    options = attributes(node)
    heads, kv_heads = options["num_heads"], options["kv_num_heads"]
    window = options.get("local_window_size", -1)
    known = options_are(
        node, num_heads=heads, kv_num_heads=kv_heads, local_window_size=window, do_rotary=1,
        rotary_interleaved=0, scale=options.get("scale", 0.0), softcap=0.0, smooth_softmax=(0, -1),
        qk_output=0, k_quant_type=b"NONE", v_quant_type=b"NONE", kv_cache_bit_width=0,
    )  # fmt: skip
    if not known or options.get("do_rotary", 0) != 1 or key or value or any(more):
        return False
    if not (graph.has(cosines) and graph.has(sines)):
        return False
    caches = [(past_key, node.output[1]), (past_value, node.output[2])]
    if not all(
        graph.is_input(past) and graph.is_output(present) and len(graph.consumers(past)) == 1
        for past, present in caches
    ) or any(node.output[3:]):
        return False
    width = 2 * graph.shape(cosines)[1]
    if width % layout.ROWS or graph.input_shape(past_key)[-1] != width:
        return False
    graph.remove(node)
    graph.put(
        "Attention", node.name, [qkv, past_key, past_value, lengths, cosines, sines],
        list(node.output[:3]), heads=heads, kv_heads=kv_heads,
        window=max(window, 0), scale=options.get("scale", 0.0),
    )  # fmt: skip
    return True
