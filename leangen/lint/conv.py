"""Traps of quantized convolutions."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto

from leangen.graph_edit import Graph
from leangen.lint.rules import (
    Hit,
    Rule,
    Uses,
    changed,
    constant,
    make,
    option,
    optional,
    saturating,
)

_AROUND = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSigmoid")


def _is_int8(graph: Graph, name: str | None) -> bool:
    return bool(name) and graph.dtype(str(name)) == TensorProto.INT8


def _dequantized(graph: Graph, uses: Uses, tensor: str) -> NodeProto | None:
    """The DequantizeLinear that makes an activation of int8 codes."""
    node = uses.made_by(tensor, "DequantizeLinear")
    if node is None or graph.has(node.input[0]) or not _is_int8(graph, constant(graph, node, 2)):
        return None
    return node


# Convolutions of signed activations


def _signed(graph: Graph) -> Iterator[Hit]:
    uses = Uses(graph)
    for node in graph.nodes:
        if node.op_type == "Conv":
            before = _dequantized(graph, uses, node.input[0])
            quantize = before and uses.made_by(before.input[0], "QuantizeLinear")
            if before is None or uses.made_by(node.input[1], "DequantizeLinear") is None:
                continue
            pattern = [node, before, *([quantize] if quantize else [])]
            pattern += [n for x in node.input[1:] if (n := uses.made_by(x, "DequantizeLinear"))]
            after = uses.only_reader(node.output[0], "QuantizeLinear", *_AROUND)
            if after is not None and after.op_type in _AROUND:
                pattern.append(after)
                after = uses.only_reader(after.output[0], "QuantizeLinear")
            if after is not None:
                pattern += [after, *uses.readers[after.output[0]]]
            yield Hit(tuple(pattern), "int8 activations x int8 weights", quantize is not None)
        elif node.op_type == "QLinearConv" and _is_int8(graph, constant(graph, node, 2)):
            yield Hit((node,), "QLinearConv of int8 activations")


def _unsign(graph: Graph, hit: Hit) -> None:
    """Activations become uint8: every code and its zero point 128 higher, so the same values."""
    if hit.nodes[0].op_type == "QLinearConv":
        _unsign_qlinear(graph, hit.nodes[0])
        return
    uses = Uses(graph)
    replaced: dict[str, list[NodeProto]] = {}
    for node in graph.nodes:
        point = constant(graph, node, 2)
        readers = uses.readers[node.output[0]] if node.output else []
        if (
            node.op_type == "QuantizeLinear"
            and _is_int8(graph, point)
            and node.output[0] not in uses.outputs
            and all(
                r.op_type == "DequantizeLinear" and constant(graph, r, 2) is not None
                for r in readers
            )
        ):
            for each in (node, *readers):
                lifted = graph.array(str(constant(graph, each, 2))).astype(np.int16) + 128
                name = graph.add(f"{each.name}/zero", lifted.astype(np.uint8))
                replaced[each.name] = [changed(each, {2: name})]
    graph.replace(replaced)


def _unsign_qlinear(graph: Graph, node: NodeProto) -> None:
    """As QDQ around a Conv, with uint8 codes inside: ORT fuses it to the fast form."""
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero = node.input[:8]
    label = node.name

    def lifted(zero: str) -> str:
        codes = graph.array(zero).astype(np.int16) + 128
        return str(graph.add_shared(codes.astype(np.uint8)))

    nodes = [
        make("DequantizeLinear", [x, x_scale, x_zero], f"{label}/x"),
        make("QuantizeLinear", [f"{label}/x", x_scale, lifted(x_zero)], f"{label}/x_u8"),
        make("DequantizeLinear", [f"{label}/x_u8", x_scale, lifted(x_zero)], f"{label}/x_dq"),
        make("DequantizeLinear", [w, w_scale, w_zero], f"{label}/w", axis=0),
    ]
    inputs = [f"{label}/x_dq", f"{label}/w"]
    if bias := optional(node, 8):
        steps = np.asarray(graph.array(w_scale) * graph.array(x_scale), np.float32).reshape(-1)
        steps = np.broadcast_to(steps, graph.shape(bias)).copy()
        step = graph.add(f"{label}/bias_scale", steps)
        nodes.append(make("DequantizeLinear", [bias, step], f"{label}/b", axis=0))
        inputs.append(f"{label}/b")
    conv = make("Conv", inputs, f"{label}/y")
    conv.attribute.extend(node.attribute)
    nodes += [
        conv,
        make("QuantizeLinear", [f"{label}/y", y_scale, lifted(y_zero)], f"{label}/y_u8"),
        make("DequantizeLinear", [f"{label}/y_u8", y_scale, lifted(y_zero)], f"{label}/y_dq"),
        make("QuantizeLinear", [f"{label}/y_dq", y_scale, y_zero], node.output[0]),
    ]
    graph.replace({label: nodes})


# Dynamic convolutions


def _integer(graph: Graph) -> Iterator[Hit]:
    uses = Uses(graph)
    for node in graph.nodes:
        if node.op_type != "ConvInteger":
            continue
        dynamic = uses.made_by(node.input[0], "DynamicQuantizeLinear")
        cast = uses.only_reader(node.output[0], "Cast")
        scaled = cast and uses.only_reader(cast.output[0], "Mul")
        scales = scaled and cast and uses.made_by(_other(scaled, cast.output[0]), "Mul")
        weights = constant(graph, node, 1) and scales and _constant_of(graph, scales)
        if dynamic and cast and scaled and scales and weights:
            pattern = (node, dynamic, cast, scales, scaled)
            yield Hit(pattern, "ConvInteger of a dynamically quantized input")
        else:
            yield Hit((node,), "ConvInteger in an unknown surrounding", fixable=False)


def _other(node: NodeProto, name: str) -> str:
    return str(node.input[1] if node.input[0] == name else node.input[0])


def _constant_of(graph: Graph, node: NodeProto) -> str | None:
    return next((name for name in node.input if graph.has(name)), None)


def _float_conv(graph: Graph, hit: Hit) -> None:
    """The same codes, dequantized, in an fp32 convolution; the weight is folded while loading."""
    node, dynamic, _, scales, scaled = hit.nodes
    label, weight = node.name, node.input[1]
    codes, scale, zero = dynamic.output
    nodes = [make("DequantizeLinear", [codes, scale, zero], f"{label}/x")]
    step = str(_constant_of(graph, scales))
    last = _folded(graph, nodes, weight, step, optional(node, 3), label, axis=0)
    conv = make("Conv", [f"{label}/x", last], scaled.output[0])
    conv.attribute.extend(node.attribute)
    graph.replace({scaled.name: [*nodes, conv], node.name: [], hit.nodes[2].name: []})


def _folded(
    graph: Graph, nodes: list[NodeProto], weight: str, scale: str, zero: str, label: str, axis: int
) -> str:
    """Append the unpacking of a constant weight by ops that ORT folds; returns its name."""
    rank = len(graph.shape(weight))

    def along(name: str) -> str:
        values = np.asarray(graph.array(name), np.float32)
        shape = [1] * rank
        if values.size > 1:
            shape[axis] = values.size
        return str(graph.add_shared(values.reshape(shape)))

    nodes.append(make("Cast", [weight], f"{label}/w_float", to=TensorProto.FLOAT))
    last = f"{label}/w_float"
    if zero and np.asarray(graph.array(zero)).any():
        nodes.append(make("Sub", [last, along(zero)], f"{label}/w_signed"))
        last = f"{label}/w_signed"
    nodes.append(make("Mul", [last, along(scale)], f"{label}/w_folded"))
    return f"{label}/w_folded"


# Transposed convolutions


def _transposed(graph: Graph) -> Iterator[Hit]:
    uses = Uses(graph)
    for node in graph.nodes:
        unpack = uses.made_by(node.input[1], "DequantizeLinear") if len(node.input) > 1 else None
        if node.op_type == "ConvTranspose" and unpack is not None and graph.has(unpack.input[0]):
            whole = all(constant(graph, unpack, i) for i in range(1, len(unpack.input)))
            plain = not option(unpack, "block_size", 0)
            yield Hit((node, unpack), "quantized weight, fp32 arithmetic", whole and plain)


def _fold_transposed(graph: Graph, hit: Hit) -> None:
    node, unpack = hit.nodes
    nodes: list[NodeProto] = []
    codes, scale, zero = unpack.input[0], unpack.input[1], optional(unpack, 2)
    last = _folded(graph, nodes, codes, scale, zero, node.name, option(unpack, "axis", 1))
    graph.replace({node.name: [*nodes, changed(node, {1: last})]})


# Saturation


def _saturates(graph: Graph) -> Iterator[Hit]:
    if not saturating():
        return
    uses = Uses(graph)
    for node in graph.nodes:
        if node.op_type not in ("Conv", "MatMul", "Gemm"):
            continue
        x = uses.made_by(node.input[0], "DequantizeLinear")
        w = uses.made_by(node.input[1], "DequantizeLinear")
        if x is None or w is None or not graph.has(w.input[0]):
            continue
        unsigned = constant(graph, x, 2) and not _is_int8(graph, constant(graph, x, 2))
        if unsigned and _is_int8(graph, w.input[0]):
            largest = int(np.abs(np.asarray(graph.array(w.input[0]), np.int16)).max(initial=0))
            if largest > 64:
                yield Hit(
                    (node, x, w), f"uint8 activations x int8 weights up to {largest}",
                    constant(graph, w, 2) is not None,
                )  # fmt: skip


def _unsign_weights(graph: Graph, hit: Hit) -> None:
    """Weights become uint8, codes and zero points 128 higher: ORT multiplies u8 x u8 exactly."""
    _, _, unpack = hit.nodes
    inputs = {}
    for index in (0, 2):
        codes = np.asarray(graph.array(unpack.input[index]), np.int16) + 128
        inputs[index] = graph.add(f"{unpack.name}/u8_{index}", codes.astype(np.uint8))
    graph.replace({unpack.name: [changed(unpack, inputs)]})


RULES = (
    Rule(
        "s8s8-convolution",
        "int8 activations take a path 3 to 7 times slower than fp32's; uint8 ones a fast path",
        None,
        _signed,
        _unsign,
    ),
    Rule(
        "conv-integer",
        "ConvInteger is 3 to 5 times slower than the fp32 convolution",
        None,
        _integer,
        _float_conv,
    ),
    Rule(
        "convtranspose-qdq",
        "ONNX Runtime has no int8 ConvTranspose: its weight is unpacked anew for every inference",
        None,
        _transposed,
        _fold_transposed,
    ),
    Rule(
        "u8s8-saturation",
        "without VNNI pairs of u8 x s8 products are added in 16 bits, which large weights saturate",
        "sums no longer saturate: the output is what the codes mean",
        _saturates,
        _unsign_weights,
    ),
)
