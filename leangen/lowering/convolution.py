"""`Conv` and `ConvTranspose` in place of convolutions with low-bit weights, and what stands around.

    Conv of weights that ORT would unpack       what `treatments` calls w8 and w4
    QDQ around a Conv                           w8a8, but for its output, which is not rounded
    group norm -> FiLM -> activation -> Conv    one Conv
    Conv + residual                             one Conv

Weights stay what they are, bit for bit: only their order changes. Activations are rounded to 8 bits
on a scale for each output pixel's patch, finer than the one scale of a tensor that QDQ has.
"""

from __future__ import annotations

import numpy as np
from leangen_kernels import conv_layout
from onnx import NodeProto

from leangen.graph_edit import Array, attributes
from leangen.lowering import unpacked
from leangen.lowering.draft import DOMAIN, Draft, either_way, options_are, set_option
from leangen.lowering.shapes import Shapes

X, WEIGHTS, BIAS, RESIDUAL, GAIN, SHIFT, FILM = range(7)  # inputs of Conv

_MIN_OUTPUTS, _MIN_WEIGHTS = 8, 16
"""Below these rounding the patches costs more than integer products save."""


def rewrite(graph: Draft) -> int:
    """Replace what matches, then draw norms, activations and residuals into it."""
    convolutions = graph.all("Conv", "ConvTranspose")
    shapes = Shapes(graph) if convolutions else None
    replaced = sum(_replace(graph, node) for node in convolutions)
    if not replaced or shapes is None:
        return 0
    graph.prune()
    for node in graph.all("Add"):
        _residual(graph, node, shapes)
    for node in _own(graph):
        _activation(graph, node)
    graph.prune()
    for node in _own(graph):
        _film(graph, node, shapes)
    graph.prune()
    for node in _own(graph):
        _norm(graph, node)
    return replaced


def _own(graph: Draft) -> list[NodeProto]:
    return [node for node in graph.all("Conv", "ConvTranspose") if node.domain == DOMAIN]


def _replace(graph: Draft, node: NodeProto) -> bool:
    options = attributes(node)
    found = _weights(graph, node)
    if found is None or options.get("group", 1) != 1:
        return False
    bits, codes, scales = found  # each [n, channels, ...]
    kernel = codes.shape[2:]
    unit = (1,) * len(kernel)
    pads = tuple(options.get("pads", 2 * (0,) * len(kernel)))
    strides, dilations = (tuple(options.get(x, unit)) for x in ("strides", "dilations"))
    given = {"n": codes.shape[0], "bits": bits, "kernel_shape": kernel, "pads": pads}
    if options.get("auto_pad", b"NOTSET") != b"NOTSET" or min(pads) < 0 or len(kernel) > 2:
        return False
    if node.op_type == "ConvTranspose":
        if len(kernel) != 1 or dilations != unit or any(options.get("output_padding", ())):
            return False
        given["strides"] = strides
        codes = conv_layout.transposed(codes, strides[0])
        scales = conv_layout.transposed(scales, strides[0], edge=True)
    elif strides != unit:
        return False
    else:
        given["dilations"] = dilations
    codes, scales = (values.reshape(len(values), -1) for values in (codes, scales))
    if len(codes) < _MIN_OUTPUTS or codes.shape[1] < _MIN_WEIGHTS:
        return False
    bias = _bias(graph, node)
    if bias is None:
        return False
    try:
        block, scales = conv_layout.scale_blocks(scales)
        packed = conv_layout.pack(bits, codes, scales, block)
    except ValueError:
        return False
    x, output = _before(graph, node.input[0]), _after(graph, node.output[0])
    graph.remove(node)
    if output != node.output[0]:
        graph.remove(*_rounding_after(graph, node.output[0]))
    inputs = [x, graph.add(f"{node.name}/packed", packed), bias, "", "", "", ""]
    graph.put(node.op_type, node.name, inputs, [output], block=block, **given)
    return True


def _weights(graph: Draft, node: NodeProto) -> tuple[int, Array, Array] | None:
    """Bits, signed codes and their scales, both [n, channels, ...], or None."""
    turned = (1, 0, 2) if node.op_type == "ConvTranspose" else None
    if (found := unpacked.weight(graph, node.input[1])) is not None:
        rows = found.rows
        if found.order != turned or rows.minima is not None:
            return None
        n, k = rows.codes.shape
        each = -(-k // rows.scales.shape[1])
        codes = (rows.codes.astype(np.int16) - (1 << (rows.bits - 1))).astype(np.int8)
        scales = np.repeat(rows.scales, each, axis=1)[:, :k]
        return rows.bits, codes.reshape(found.shape), scales.reshape(found.shape)
    dequantized = graph.producer(node.input[1], "DequantizeLinear")
    if dequantized is None or turned or not options_are(dequantized, axis=0, block_size=0):
        return None
    if not all(graph.has(name) for name in dequantized.input):
        return None
    codes, scale, *zeros = (graph.array(name) for name in dequantized.input)
    if codes.dtype != np.int8 or scale.shape != codes.shape[:1] or any(map(np.any, zeros)):
        return None
    by_row = scale.reshape(-1, *(1,) * (codes.ndim - 1))
    return 8, codes, np.broadcast_to(by_row, codes.shape)


def _bias(graph: Draft, node: NodeProto) -> str | None:
    """The name of a constant bias, empty if there is none; None if it is not constant."""
    name = node.input[2] if len(node.input) > 2 else ""
    if not name or graph.has(name):
        return name
    dequantized = graph.producer(name, "DequantizeLinear")
    if dequantized is None or not all(graph.has(given) for given in dequantized.input):
        return None
    codes, scale, *zeros = (graph.array(given) for given in dequantized.input)
    if scale.shape not in ((), codes.shape) or any(map(np.any, zeros)):
        return None
    return graph.add(f"{name}/float", (codes * scale.astype(np.float64)).astype(np.float32))


def _before(graph: Draft, x: str) -> str:
    """What is rounded before a convolution, or `x` itself."""
    back = graph.producer(x, "DequantizeLinear")
    there = None if back is None else graph.producer(back.input[0], "QuantizeLinear")
    if back is None or there is None or list(back.input[1:]) != list(there.input[1:]):
        return x
    return str(there.input[0])


def _rounding_after(graph: Draft, y: str) -> list[NodeProto]:
    """QuantizeLinear and DequantizeLinear that alone read a convolution's output, else nothing."""
    there = graph.only_reader(y, "QuantizeLinear")
    back = None if there is None else graph.only_reader(there.output[0], "DequantizeLinear")
    if there is None or back is None or list(back.input[1:]) != list(there.input[1:]):
        return []
    return [there, back] if back.input[0] == there.output[0] else []


def _after(graph: Draft, y: str) -> str:
    rounding = _rounding_after(graph, y)
    return str(rounding[-1].output[0]) if rounding else y


def _change(graph: Draft, node: NodeProto, inputs: dict[int, str], **options: object) -> None:
    graph.remove(node)
    for index, name in inputs.items():
        node.input[index] = name
    for name, value in options.items():
        set_option(node, name, value)
    graph.add_node(node)


def _residual(graph: Draft, node: NodeProto, shapes: Shapes) -> None:
    for name, other in either_way(node):
        conv = graph.producer(name, "Conv", "ConvTranspose")
        if (
            conv is not None
            and conv.domain == DOMAIN
            and not conv.input[RESIDUAL]
            and graph.only_reader(name) is node
            and shapes.same(name, other)
        ):
            graph.remove(node, conv)
            conv.input[RESIDUAL], conv.output[0] = other, node.output[0]
            graph.add_node(conv)
            return


def _only_convolved(graph: Draft, tensor: str) -> bool:
    """Whether none but own convolutions read a tensor, as what they round."""
    return not graph.is_output(tensor) and all(
        reader.domain == DOMAIN
        and reader.op_type in ("Conv", "ConvTranspose")
        and tensor not in list(reader.input)[1:]
        for reader in graph.consumers(tensor)
    )


def _activation(graph: Draft, conv: NodeProto) -> None:
    x = conv.input[X]
    if not _only_convolved(graph, x):
        return
    made = graph.producer(x, "Mul", "LeakyRelu", "Relu")
    if made is None:
        return
    source = made.input[0]
    if made.op_type == "Mul":
        gates = [graph.producer(name, "Sigmoid") for name in made.input]
        gate = next((gate for gate in gates if gate is not None), None)
        if gate is None or sorted(made.input) != sorted([gate.input[0], gate.output[0]]):
            return
        _change(graph, conv, {X: gate.input[0]}, activation="silu")
    elif made.op_type == "Relu":
        _change(graph, conv, {X: source}, activation="leaky_relu", alpha=0.0)
    elif 0 <= (alpha := attributes(made).get("alpha", 0.01)) <= 1:
        _change(graph, conv, {X: source}, activation="leaky_relu", alpha=alpha)


def _film(graph: Draft, conv: NodeProto, shapes: Shapes) -> None:
    """x * (1 + scale) + shift, both halves of one [batch, 2 * channels] (Perez et al. 2018)."""
    total = graph.producer(conv.input[X], "Add")
    if total is None or not _only_convolved(graph, total.output[0]):
        return
    for scaled, shift in either_way(total):
        product, split = graph.producer(scaled, "Mul"), graph.producer(shift, "Split")
        if product is None or split is None or len(split.output) != 2 or shift != split.output[1]:
            continue
        for x, factor in either_way(product):
            plus_one = graph.producer(factor, "Add")
            if plus_one is None or split.output[0] not in plus_one.input:
                continue
            one = next(name for name in plus_one.input if name != split.output[0])
            film = graph.producer(split.input[0], "Unsqueeze")
            if film is None or graph.values(one) != [1.0] or attributes(split).get("axis") != 1:
                continue
            channels, width = shapes.channels(x), shapes.channels(film.input[0])
            rank = len(attributes(conv)["kernel_shape"])
            if graph.values(film.input[1]) != list(range(2, 2 + rank)) or len(split.input) > 1:
                continue
            if channels and width == 2 * channels and shapes.rank(film.input[0]) == 2:
                _change(graph, conv, {X: x, FILM: film.input[0]})
                return


def _norm(graph: Draft, conv: NodeProto) -> None:
    """Group norm as torch exports it: InstanceNormalization of groups, then gain and shift."""
    if not _only_convolved(graph, conv.input[X]):
        return
    if (shifted := _by_channel(graph, conv.input[X], "Add")) is None:
        return
    scaled, shift = shifted
    if (gained := _by_channel(graph, scaled, "Mul")) is None:
        return
    back, gain = graph.producer(gained[0], "Reshape"), gained[1]
    norm = None if back is None else graph.producer(back.input[0], "InstanceNormalization")
    flat = None if norm is None else graph.producer(norm.input[0], "Reshape")
    if back is None or norm is None or flat is None or gain.size != shift.size:
        return
    groups = graph.values(flat.input[1]) or []
    shape = graph.producer(back.input[1], "Shape")
    ones, zeros = (graph.values(name) for name in norm.input[1:3])
    if (
        len(groups) != 3
        or [groups[0], groups[2]] != [0, -1]
        or attributes(flat).get("allowzero", 0)
        or shape is None
        or shape.input[0] != flat.input[0]
        or attributes(shape) not in ({}, {"start": 0})
        or ones != [1.0] * groups[1]
        or zeros != [0.0] * groups[1]
        or gain.size % groups[1]
        or graph.only_reader(scaled) is None
    ):
        return
    name = conv.name
    _change(
        graph,
        conv,
        {
            X: flat.input[0],
            GAIN: graph.add(f"{name}/gain", gain),
            SHIFT: graph.add(f"{name}/shift", shift),
        },
        norm_groups=groups[1],
        epsilon=attributes(norm).get("epsilon", 1e-5),
    )


def _by_channel(graph: Draft, tensor: str, op_type: str) -> tuple[str, Array] | None:
    """The tensor that a constant [channels, 1, ...] is added to or multiplied with, and that."""
    node = graph.producer(tensor, op_type)
    if node is None:
        return None
    for x, name in either_way(node):
        if graph.has(name) and not graph.has(x):
            shape = graph.shape(name)
            if len(shape) >= 2 and max(shape[1:]) == 1 and graph.is_float(name):
                return x, np.ascontiguousarray(graph.array(name), np.float32).reshape(-1)
    return None
