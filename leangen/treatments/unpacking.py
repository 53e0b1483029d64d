"""Nodes that unpack low-bit constants with standard operators, all folded when ORT loads them.

Mod, BitShift, Cast and the like on constants cost load time and nothing afterwards. A
DequantizeLinear on a convolution's weight would run anew for every inference (ORT folds it only
with a session option), and these need no newer opset than the graph has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from leangen.schemes import Array

Shared = Callable[[Array | np.generic], str]
"""Keeps a small constant once per value and returns its name."""


def node(op: str, inputs: Sequence[str], output: str, **options: Any) -> NodeProto:
    """A node of the standard domain, named after its output."""
    return helper.make_node(op, list(inputs), [output], f"{output}/{op}", **options)


def codes(
    planes: Sequence[str], bits: int, label: str, to: int, shared: Shared
) -> tuple[list[NodeProto], str]:
    """Nodes that turn planes (`leangen.packing.planes`) into codes [..., size] of ONNX type `to`.

    Returns them and the name of the result.
    """
    if bits == 3:
        low, low_name = codes(planes[:1], 2, f"{label}/low", to, shared)
        high, high_name = codes(planes[1:], 1, f"{label}/high", to, shared)
        four = shared(helper.tensor_dtype_to_np_dtype(to).type(4))
        scaled, joined = f"{label}/high4", f"{label}/codes"
        nodes = [
            *(*low, *high),
            node("Mul", [high_name, four], scaled),
            node("Add", [low_name, scaled], joined),
        ]
        return nodes, joined
    nodes, parts = [], []
    for shift in range(0, 8, bits):
        part = planes[0]
        if shift:
            shifted = f"{label}/part{shift}_shifted"
            amount = shared(np.uint8(shift))
            nodes.append(node("BitShift", [part, amount], shifted, direction="RIGHT"))
            part = shifted
        if shift + bits < 8:  # higher bits belong to other parts
            kept = f"{label}/part{shift}"
            nodes.append(node("Mod", [part, shared(np.uint8(1 << bits))], kept))
            part = kept
        parts.append(part)
    joined = parts[0]
    if len(parts) > 1:
        joined = f"{label}/parts"
        nodes.append(node("Concat", parts, joined, axis=-1))
    nodes.append(node("Cast", [joined], f"{label}/codes", to=to))
    return nodes, f"{label}/codes"


def nibbles(
    planes: Sequence[str], label: str, centred: bool, shared: Shared
) -> tuple[list[NodeProto], str]:
    """Nodes that turn 3-bit planes (`leangen.packing.pair_planes`) into 4-bit `MatMulNBits` bytes.

    Bytes all the way, since ORT keeps what it folds until a graph is loaded. `centred` adds 4 to
    each code, to move the middle from 4 to 8. Needs opset 18.
    """
    made: list[NodeProto] = []

    def put(op: str, inputs: Sequence[str], name: str, **options: Any) -> str:
        output = f"{label}/{name}"
        made.append(node(op, inputs, output, **options))
        return output

    def shifted(x: str, by: int, name: str) -> str:
        if by == 0:
            return x
        amount = shared(np.uint8(abs(by)))
        return put("BitShift", [x, amount], name, direction="LEFT" if by > 0 else "RIGHT")

    low, high = shared(np.uint8(0x33)), shared(np.uint8(0x44))
    lows = [
        put("BitwiseAnd", [shifted(planes[0], by, f"low_shift{-by}"), low], f"low{-by}")
        for by in (0, -2)
    ]
    highs = [
        put("BitwiseAnd", [shifted(planes[1], by, f"high_shift{by}"), high], f"high{by}")
        for by in (2, 1, 0, -1)
    ]
    bytes_low = put("Concat", lows, "lows", axis=-1)
    bytes_high = put("Concat", highs, "highs", axis=-1)
    if centred:  # c + 4: bit 2 becomes bit 3, and its opposite bit 2
        up = shifted(bytes_high, 1, "up")
        opposite = put("BitwiseXor", [bytes_high, high], "opposite")
        bytes_high = put("BitwiseOr", [up, opposite], "moved")
    packed = put("BitwiseOr", [bytes_low, bytes_high], "nibbles")
    return made, packed
