"""Traps of block-quantized matrix multiplications (`MatMulNBits`)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from onnx import NodeProto, TensorProto, helper

from leangen.graph_edit import Array, Graph
from leangen.lint.rules import (
    MICROSOFT,
    Hit,
    Rule,
    Uses,
    changed,
    constant,
    make,
    option,
    optional,
)

_ZERO_POINTS, _GROUPS = 3, 4
_BITS = 4
_INT8 = 4
"""The accuracy_level that computes with int8 activations; all others compute in fp32 on a CPU."""
LEVEL = "accuracy-level"


def _nbits(graph: Graph) -> Iterator[NodeProto]:
    for node in graph.nodes:
        if node.op_type == "MatMulNBits" and node.domain == MICROSOFT:
            yield node


def _blocks(node: NodeProto) -> tuple[int, int, int, int, int]:
    """K, N, bits, block size, blocks of a row."""
    k, n, size = (option(node, name, 0) for name in ("K", "N", "block_size"))
    return k, n, option(node, "bits", 4), size, -(-k // size)


def unpack(packed: Array, bits: int) -> Array:
    """Codes of bytes, lowest bits first, along the last axis."""
    per_byte = 8 // bits
    shifts = np.arange(per_byte, dtype=np.uint8) * bits
    codes = packed[..., None] >> shifts & ((1 << bits) - 1)
    return np.asarray(codes.reshape(*packed.shape[:-1], -1))


def pack(codes: Array, bits: int) -> Array:
    """The inverse of `unpack`; the last axis is padded with zeros to whole bytes."""
    per_byte = 8 // bits
    short = -codes.shape[-1] % per_byte
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, short)])
    codes = codes.astype(np.uint8).reshape(*codes.shape[:-1], -1, per_byte)
    shifts = np.arange(per_byte, dtype=np.uint8) * bits
    return np.asarray(np.bitwise_or.reduce(codes << shifts, axis=-1))


def _pairs(graph: Graph) -> Iterator[Hit]:
    """Weights in blocks along their first axis; those that a MatMulNBits can hold."""
    uses = Uses(graph)
    for node in graph.nodes:
        unpack = (
            uses.made_by(node.input[1], "DequantizeLinear") if node.op_type == "MatMul" else None
        )
        size = option(unpack, "block_size", 0) if unpack is not None else 0
        if unpack is None or size < 16 or size & (size - 1):
            continue
        weight, scale, point = (optional(unpack, index) for index in range(3))
        if all(graph.has(name) for name in (weight, scale, point) if name) and (
            graph.dtype(weight) in (TensorProto.INT4, TensorProto.UINT4)
            and graph.dtype(scale) == TensorProto.FLOAT
            and len(graph.shape(weight)) == 2
            and option(unpack, "axis", 1) in (0, -2)
        ):
            yield Hit((node, unpack), f"4-bit DequantizeLinear in blocks of {size} and a MatMul")


def _merge(graph: Graph, hit: Hit) -> None:
    """The MatMulNBits that ONNX Runtime would make of the pair."""
    node, unpack_node = hit.nodes
    weight, scale, point = (optional(unpack_node, index) for index in range(3))
    (k, n), size = graph.shape(weight), option(unpack_node, "block_size", 0)
    blocks = -(-k // size)
    middle = 8 if graph.dtype(weight) == TensorProto.INT4 else 0

    def rows(name: str, length: int) -> Array:
        codes = np.asarray(graph.array(name), np.int16).T + middle
        return np.pad(codes, [(0, 0), (0, length - codes.shape[1])]).astype(np.uint8)

    label = node.name
    inputs = [
        node.input[0],
        graph.add(
            f"{label}/codes", pack(rows(weight, blocks * size), _BITS).reshape(n, blocks, -1)
        ),
        graph.add(f"{label}/steps", np.ascontiguousarray(graph.array(scale).T).reshape(-1)),
    ]
    if point or not middle:  # without one, a code of 0 is the weight 0
        points = rows(point, blocks) if point else np.zeros((n, blocks), np.uint8)
        inputs.append(graph.add(f"{label}/points", pack(points, _BITS).reshape(-1)))
    merged = helper.make_node(
        "MatMulNBits", inputs, list(node.output), label, domain=MICROSOFT,
        K=k, N=n, bits=_BITS, block_size=size, accuracy_level=_INT8,
    )  # fmt: skip
    graph.require(MICROSOFT)
    graph.replace({node.name: [merged]})


def _other_level(graph: Graph) -> Iterator[Hit]:
    for node in _nbits(graph):
        level, bits = option(node, "accuracy_level", 0), option(node, "bits", 4)
        if level != _INT8:
            told = f"with accuracy_level {level}" if level else "without accuracy_level"
            yield Hit((node,), f"{bits}-bit MatMulNBits {told}")


def _set_level(graph: Graph, hit: Hit) -> None:
    (node,) = hit.nodes
    copy = changed(node, {})
    kept = [a for a in copy.attribute if a.name != "accuracy_level"]
    del copy.attribute[:]
    copy.attribute.extend([*kept, helper.make_attribute("accuracy_level", _INT8)])
    graph.replace({node.name: [copy]})


def _tables(graph: Graph) -> Iterator[Hit]:
    for node in graph.nodes:
        if node.op_type == "MatMulBnb4" and node.domain == MICROSOFT:
            kind = ("fp4", "nf4")[option(node, "quant_type", 1)]
            yield Hit((node,), f"MatMulBnb4 ({kind})", fixable=False)


def _float_zero_points(graph: Graph) -> Iterator[Hit]:
    for node in _nbits(graph):
        name = constant(graph, node, _ZERO_POINTS)
        if name and graph.is_float(name):
            points = np.asarray(graph.array(name), np.float32)
            whole = _whole(points, option(node, "bits", 4))
            kind = "whole numbers stored as floats" if whole else "fractions, as HQQ makes them"
            yield Hit((node,), f"float zero points ({kind})")


def _whole(points: Array, bits: int) -> bool:
    return bool(((points == np.rint(points)) & (points >= 0) & (points < 1 << bits)).all())


def _repack_zero_points(graph: Graph, hit: Hit) -> None:
    """Whole zero points are packed; else y = symmetric(x) + blocksums(x) @ ((8 - z) scale)^T."""
    (node,) = hit.nodes
    k, n, bits, size, blocks = _blocks(node)
    points = np.asarray(graph.array(node.input[_ZERO_POINTS]), np.float32).reshape(n, blocks)
    if _whole(points, bits):
        packed = pack(points.astype(np.uint8), bits).reshape(-1)
        name = graph.add(f"{node.name}/zero_points", packed)
        graph.replace({node.name: [changed(node, {_ZERO_POINTS: name})]})
        return
    scales = np.asarray(graph.array(node.input[2]), np.float32).reshape(n, blocks)
    middle = np.float32(1 << (bits - 1))
    shift = graph.add(f"{node.name}/shift", np.ascontiguousarray(((middle - points) * scales).T))
    label, x, y = node.name, node.input[0], node.output[0]
    plain = changed(node, {_ZERO_POINTS: ""})
    plain.output[0] = f"{label}/symmetric"
    shared = graph.add_shared
    rows = shared(np.array([-1, k], np.int64))
    nodes = [plain, make("Reshape", [x, rows], f"{label}/rows")]
    last = f"{label}/rows"
    if blocks * size != k:
        padding = shared(np.array([0, 0, 0, blocks * size - k], np.int64))
        nodes.append(make("Pad", [last, padding], f"{label}/padded"))
        last = f"{label}/padded"
    nodes += [
        make("Reshape", [last, shared(np.array([-1, blocks, size], np.int64))], f"{label}/blocks"),
        make("ReduceSum", [f"{label}/blocks", shared(np.array([2]))], f"{label}/sums", keepdims=0),
        make("MatMul", [f"{label}/sums", shift], f"{label}/flat"),
        make("Shape", [plain.output[0]], f"{label}/shape"),
        make("Reshape", [f"{label}/flat", f"{label}/shape"], f"{label}/shifted"),
        make("Add", [plain.output[0], f"{label}/shifted"], y),
    ]
    graph.replace({node.name: nodes})


def _groups(graph: Graph) -> Iterator[Hit]:
    for node in _nbits(graph):
        if not optional(node, _GROUPS):
            continue
        name = constant(graph, node, _GROUPS)
        if name is None:
            yield Hit((node,), "g_idx that is computed", fixable=False)
            continue
        k, _, _, size, blocks = _blocks(node)
        groups = np.asarray(graph.array(name))[:k]
        even = np.bincount(groups, minlength=blocks)[:-1] == size
        order = "in order" if (np.diff(groups) >= 0).all() else "out of order (act-order)"
        yield Hit((node,), f"g_idx, groups {order}", fixable=bool(even.all()))


def _sort_groups(graph: Graph, hit: Hit) -> None:
    """Weights are sorted by group, and the inputs gathered in that order; no g_idx is left."""
    (node,) = hit.nodes
    k, n, bits, size, blocks = _blocks(node)
    groups = np.asarray(graph.array(node.input[_GROUPS]))[:k]
    if (groups == np.arange(k) // size).all():
        graph.replace({node.name: [changed(node, {_GROUPS: ""})]})
        return
    order = np.argsort(groups, kind="stable")
    codes = unpack(np.asarray(graph.array(node.input[1])).reshape(n, -1), bits)
    sorted_codes = np.zeros((n, blocks * size), np.uint8)
    sorted_codes[:, :k] = codes[:, order]
    packed = pack(sorted_codes, bits).reshape(n, blocks, -1)
    label = node.name
    weight = graph.add(f"{label}/sorted", packed)
    gather = make(
        "Gather", [node.input[0], graph.add_shared(order.astype(np.int64))], f"{label}/x", axis=-1
    )
    rest = changed(node, {0: f"{label}/x", 1: weight, _GROUPS: ""})
    graph.replace({label: [gather, rest]})


def _coarse(graph: Graph) -> Iterator[Hit]:
    for node in _nbits(graph):
        weight, scale = constant(graph, node, 1), constant(graph, node, 2)
        _, n, bits, _, blocks = _blocks(node)
        if bits not in (2, 4) or not weight or not scale or optional(node, _ZERO_POINTS):
            continue
        if not graph.is_float(scale) or (np.asarray(graph.array(scale)) < 0).any():
            continue
        codes = unpack(np.asarray(graph.array(weight)).reshape(n, blocks, -1), bits)
        top = (1 << bits) - 1
        share = float(((codes.max(axis=2) == top) & (codes.min(axis=2) > 0)).mean())
        if share > 0.25:
            yield Hit(
                (node,),
                f"step {1 / top:.1%} coarser than need be in {share:.0%} of its blocks: their "
                "largest weight is positive, and the extra negative code is unused",
                fixable=False,
            )


RULES = (
    Rule(
        "blockwise-pair",
        "ONNX Runtime makes a MatMulNBits of the pair, anew at every opening: runs are as fast",
        None,
        _pairs,
        _merge,
        at_opening=True,
    ),
    Rule(
        "float-zero-points",
        "MatMulNBits with float zero points skips prepacking: 30 to 100 times slower",
        None,
        _float_zero_points,
        _repack_zero_points,
    ),
    Rule(
        "g-idx",
        "MatMulNBits with g_idx skips prepacking: 30 to 100 times slower",
        None,
        _groups,
        _sort_groups,
    ),
    Rule(
        LEVEL,
        "with no accuracy_level, or another than 4, ONNX Runtime computes in fp32: 3 to 5 times "
        "slower at 4 bits, 50 to 100 times at 2 and 8",
        "activations are rounded to int8 per block of weights",
        _other_level,
        _set_level,
    ),
    Rule(
        "bnb4-on-cpu",
        "MatMulBnb4 unpacks its weights to fp32 for every run: 15 to 20 times slower than int4",
        None,
        _tables,
        remedy="int4 of the same size is as exact; in a bundle leangen's own kernels run it fast",
    ),
    Rule(
        "coarse-step",
        "symmetric round-to-nearest that never mirrors a block wastes a code",
        None,
        _coarse,
        remedy="what was rounded away is lost: quantize the original weights again, "
        "`leangen quantize` mirrors blocks and searches the step",
    ),
)
