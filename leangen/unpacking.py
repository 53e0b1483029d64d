"""Nodes that unpack low-bit constants with standard operators, all folded when ORT loads them.

Mod, BitShift, Cast and the like on constants cost load time and nothing afterwards. A
DequantizeLinear on a convolution's weight would run anew for every inference (ORT folds it only
with a session option), and these need no newer opset than the graph has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

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
    planes: Sequence[str], bits: int, label: str, size: int, offset: int, shared: Shared
) -> tuple[list[NodeProto], str]:
    """Nodes that turn planes of codes set pairs apart into `MatMulNBits`' bytes of 4-bit codes.

    `size` is a block's; `offset` is added to each code, to move its middle to 8.
    """
    nodes, wide = codes(planes, bits, label, TensorProto.INT32, shared)
    first, second, high, both = (f"{label}/{x}" for x in ("first", "second", "high", "both"))
    moved, packed = f"{label}/moved", f"{label}/nibbles"
    halves = shared(np.array([size // 2, size // 2], np.int64))
    nodes += [
        helper.make_node("Split", [wide, halves], [first, second], f"{label}/Split", axis=-1),
        node("Mul", [second, shared(np.int32(16))], high),
        node("Add", [first, high], both),
        node("Add", [both, shared(np.int32(offset * 17))], moved),
        node("Cast", [moved], packed, to=TensorProto.UINT8),
    ]
    return nodes, packed
