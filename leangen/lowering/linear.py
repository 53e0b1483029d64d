"""`Linear` in place of low-bit matrix products of four forms, weights packed for the kernels.

    MatMulNBits                                 4 or 8 bits, with or without zero points
    MatMulBnb4                                  nf4 and fp4
    MatMulNBits + blocksum(x) @ offsets         what `exporters/llm_graph.py` writes for Q4_1, Q4_K
    MatMul of weights that ORT would unpack     what `treatments` calls w8 and w4

Weights stay what they are: only their order changes, scales that fp16 holds exactly are kept as
fp16, those that are whole numbers of an fp16, as in Q4_K, as such, and 8-bit codes that fit 5 or 6
bits as those.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from leangen_kernels import layout
from onnx import NodeProto

from leangen.graph_edit import Array, attributes
from leangen.lowering import unpacked
from leangen.lowering.draft import Draft, options_are
from leangen.lowering.unpacked import Codes

INT8_LEVEL = 4  # MatMulNBits' accuracy_level that rounds activations
JOIN_BYTES = 256 << 10
"""What memory gives in less time than waking threads once more takes."""


def rewrite(graph: Draft) -> int:
    """Replace what matches; a matrix that no layout holds stays with ORT."""
    replaced = [_from_nbits(graph, node) for node in graph.all("MatMulNBits")]
    replaced += [_from_bnb(graph, node) for node in graph.all("MatMulBnb4")]
    replaced += [_from_unpacked(graph, node) for node in graph.all("MatMul")]
    for node in graph.all("Concat"):
        _join(graph, node)
    return sum(replaced)


def _from_nbits(graph: Draft, node: NodeProto) -> bool:
    options = attributes(node)
    n, k, size = options["N"], options["K"], options["block_size"]
    bits, groups = options.get("bits", 4), -(-k // size)
    x, codes, scales, zeros, order, bias = [*node.input, "", "", ""][:6]
    constants = [name for name in (codes, zeros, bias) if name]
    scale = unpacked.widened(graph, scales)
    if order or bits not in (4, 8) or scale is None or not all(map(graph.has, constants)):
        return False
    q = graph.array(codes).reshape(n, -1)
    if bits == 4:
        q = np.stack([q & 15, q >> 4], axis=-1).reshape(n, -1)
    q = q[:, :k]
    if bits == 8 and not zeros:
        bits, q = _narrowed(q, size)
    scale = scale.reshape(n, groups).astype(np.float32)
    minima = _minima(graph, zeros, scale, bits) if zeros else None
    weights = Codes(bits, q, _per_block(scale, k, size), _per_block(minima, k, size))
    level = options.get("accuracy_level", 0)
    activations = "int8" if level == INT8_LEVEL else "fp32"
    offset = None if zeros else _offset(graph, node, k, size)
    if offset is not None:
        gemm, offsets = offset
        minima = offsets if bits == 8 else _without_center(offsets, scale, 1 << (bits - 1))
        whole = replace(weights, minima=_per_block(minima, k, size))
        if put(graph, [node, gemm], x, bias, gemm.output[0], whole, activations):
            return True
    return put(graph, [node], x, bias, node.output[0], weights, activations)


def _narrowed(q: Array, size: int) -> tuple[int, Array]:
    """8-bit codes around 128 as 5 bits, for groups of 16 as 6 bits, where all of them fit.

    That is what `exporters/gguf_blocks.py` makes of Q5_0, Q5_1, Q5_K and Q6_K.
    """
    bits = 5 if size % layout.BLOCK == 0 else 6
    low = np.uint8(128 - (1 << (bits - 1)))
    narrow = q - low  # wraps around below
    return (bits, narrow) if narrow.max() < 1 << bits else (8, q)


def _per_block(values: Array | None, k: int, size: int) -> Any:
    """Values of groups of `size` columns, for each of the layout's blocks where they cover it."""
    if values is None or size % layout.BLOCK:
        return values
    return np.repeat(values, size // layout.BLOCK, axis=1)[:, : -(-k // layout.BLOCK)]


def _minima(graph: Draft, zeros: str, scale: Array, bits: int) -> Array:
    """What the layout's center stands for, by packed or float zero points: 0, at 8 bits 128."""
    zero = graph.array(zeros)
    if zero.dtype == np.uint8 and bits == 4:
        zero = np.stack([zero & 15, zero >> 4], axis=-1)
    points: Array = zero.reshape(scale.shape[0], -1)[:, : scale.shape[1]]
    return (np.float32(128 if bits == 8 else 0) - points.astype(np.float32)) * scale


_TABLES = {0: "fp4_wide", 1: "nf4_wide"}  # by MatMulBnb4's quant_type


def _from_bnb(graph: Draft, node: NodeProto) -> bool:
    options = attributes(node)
    n, k, size = options["N"], options["K"], options["block_size"]
    x, codes, scales = node.input
    if not (graph.has(codes) and graph.has(scales)) or k % size or options.get("transB", 1) != 1:
        return False
    pairs = graph.array(codes)  # of the whole matrix, the first of two in the high bits
    q = np.stack([pairs >> 4, pairs & 15], axis=-1).reshape(n, k)
    scale = graph.array(scales).reshape(n, -1).astype(np.float32)
    try:
        packed = layout.pack(layout.FORMS[form := _TABLES[options["quant_type"]]], q, scale)
    except ValueError:
        return False
    _put(graph, [node], x, "", node.output[0], packed, form=form, n=n, k=k, activations="fp32")
    return True


def _offset(graph: Draft, node: NodeProto, k: int, size: int) -> tuple[NodeProto, Array] | None:
    """The Gemm that adds the sums of x over blocks times offsets, and the offsets [n, groups]."""
    gemm = graph.only_reader(node.output[0], "Gemm")
    if gemm is None or len(gemm.input) != 3 or gemm.input[2] != node.output[0]:
        return None
    sums = graph.producer(gemm.input[0], "ReduceSum")
    blocks = None if sums is None else graph.producer(sums.input[0], "Reshape")
    if (
        sums is None
        or blocks is None
        or not options_are(gemm, transB=1, alpha=1.0, beta=1.0, transA=0)
        or not options_are(sums, keepdims=0, noop_with_empty_axes=0)
        or graph.values(sums.input[1]) not in ([-1], [2])
        or blocks.input[0] != node.input[0]
        or graph.values(blocks.input[1]) != [-1, k // size, size]
        or not graph.has(gemm.input[1])
    ):
        return None
    return gemm, graph.array(gemm.input[1])


def _without_center(offsets: Array, scale: Array, center: int) -> Array:
    """Minima m with m + center * scale = offset.

    An exporter made the offset of an fp16 minimum by this very sum, rounded once: that minimum is
    what is wanted, where there is one.
    """
    minima = (offsets.astype(np.float64) - center * scale.astype(np.float64)).astype(np.float32)
    with np.errstate(over="ignore"):
        half = minima.astype(np.float16).astype(np.float32)
    return half if np.array_equal(half + center * scale, offsets) else minima


def _from_unpacked(graph: Draft, node: NodeProto) -> bool:
    weights = unpacked.matrix(graph, node.input[1])
    if weights is None:
        return False
    return put(graph, [node], node.input[0], "", node.output[0], weights, "fp32")


def _join(graph: Draft, concat: NodeProto) -> None:
    """One `Linear` in place of several side by side whose weights differ in bits alone.

    A Q4_K_M file has values at more bits than queries and keys: those of few bits get more, if that
    is not too much to read.
    """
    parts = [graph.producer(name, "Linear") for name in concat.input]
    nodes = [node for node in parts if node is not None]
    options = [attributes(node) for node in nodes]
    forms = [layout.FORMS[each["form"].decode()] for each in options]
    biases = [node.input[3] for node in nodes]
    if (
        len({id(node) for node in nodes}) < len(parts)
        or attributes(concat)["axis"] != -1
        or any(graph.only_reader(name, "Concat") is None for name in concat.input)
        or len({(node.input[0], bool(node.input[3])) for node in nodes}) > 1
        or len({each["activations"] for each in options}) > 1
        or len({form.block for form in forms}) > 1
        or any(form.minimum or form.table for form in forms)
    ):
        return
    n, k, bits = sum(each["n"] for each in options), options[0]["k"], max(f.bits for f in forms)
    codes, scales = [], []
    for node, each, form in zip(nodes, options, forms, strict=True):
        q, scale, _ = layout.unpack(form, graph.array(node.input[1]), each["n"], k)
        codes.append(q + np.uint8((1 << (bits - 1)) - form.center))
        scales.append(scale)
    weights = Codes(bits, np.concatenate(codes), np.concatenate(scales))
    joined = layout.form_for(bits, weights.scales, block=forms[0].block).packed_bytes(n, k)
    if joined - sum(graph.array(node.input[1]).nbytes for node in nodes) > JOIN_BYTES:
        return
    bias = ""
    if all(biases):
        bias = graph.add(f"{concat.name}/bias", np.concatenate([graph.array(b) for b in biases]))
    activations = options[0]["activations"].decode()
    put(graph, [*nodes, concat], nodes[0].input[0], bias, concat.output[0], weights, activations)


def put(
    graph: Draft,
    replaced: list[NodeProto],
    x: str,
    bias: str,
    output: str,
    weights: Codes,
    activations: str,
) -> bool:
    """Put a `Linear` in place of nodes; False, with nothing changed, when no layout fits."""
    for block in (layout.BLOCK, 16):
        try:
            form, packed = layout.pack_smallest(
                weights.bits, weights.codes, weights.scales, weights.minima, block
            )
        except ValueError:
            continue
        n, k = weights.codes.shape
        _put(
            graph, replaced, x, bias, output, packed,
            form=form.name, n=n, k=k, activations=activations,
        )  # fmt: skip
        return True
    return False


def _put(
    graph: Draft,
    replaced: list[NodeProto],
    x: str,
    bias: str,
    output: str,
    packed: Array,
    **options: Any,
) -> None:
    name = replaced[0].name
    inputs = [x, graph.add(f"{name}/packed", packed), "", bias, "", ""]
    graph.remove(*replaced)
    graph.put("Linear", name, inputs, [output], **options, gated=0)
