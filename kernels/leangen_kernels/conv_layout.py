"""The one owner of the layout of convolutions' weights.

Weights [n, k], k running over channels, then the kernel's rows and columns, stand in groups of 4
outputs as signed bytes, four consecutive weights of each output (16 bytes), then the next four.
After the codes of all groups come each group's numbers, fp32: the scales of its 4 outputs for the
first block of k, for the next, ..., at last what the weights of each output sum to. At 4 bits codes
are nibbles 8 above the weight's: of each 128 bytes the first 64 in the low halves, the last 64 in
the high ones. Outputs, k and codes are padded with weights that are 0.
"""

from __future__ import annotations

import numpy as np

from leangen_kernels.layout import Array

OUTPUTS = 4
_UNIT = 128
"""Codes are padded to a multiple of this, in bytes at 8 bits."""


def packed_bytes(bits: int, n: int, k: int, block: int) -> tuple[int, int]:
    """Bytes of the codes and of the numbers of packed convolution weights."""
    fours, groups = -(-k // 4), -(-n // OUTPUTS)
    codes = -(-groups * fours * 4 * OUTPUTS // _UNIT) * _UNIT
    return codes * bits // 8, groups * (-(-4 * fours // block) + 1) * 4 * OUTPUTS


def pack(bits: int, codes: Array, scales: Array, block: int) -> Array:
    """Codes int8 [n, k] and scales [n, ceil(k / block)] as packed bytes, uint8 1-D.

    The weight is `scale * code`; `block` is a multiple of 4. Raises ValueError on shapes that do
    not fit together and on codes beyond -127..127, at 4 bits -8..7.
    """
    n, k = codes.shape
    fours, groups = -(-k // 4), -(-n // OUTPUTS)
    blocks = -(-4 * fours // block)
    if block < 4 or block % 4 or scales.shape != (n, blocks):
        raise ValueError(
            f"scales {scales.shape} with blocks of {block} do not fit codes {codes.shape}:"
            f" expected blocks of a multiple of 4 and scales [{n}, {blocks}]"
        )
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    if codes.size and not low <= int(codes.min()) <= int(codes.max()) <= high:
        raise ValueError(f"codes from {codes.min()} to {codes.max()}: expected {low} to {high}")
    padded = np.zeros((groups * OUTPUTS, fours * 4), np.int8)
    padded[:n, :k] = codes
    in_order = padded.reshape(groups, OUTPUTS, fours, 4).transpose(0, 2, 1, 3).reshape(-1)
    stream = np.zeros(-(-in_order.size // _UNIT) * _UNIT, np.int8)
    stream[: in_order.size] = in_order
    if bits == 4:
        nibbles = (stream + 8).astype(np.uint8).reshape(-1, 2, _UNIT // 2)
        packed = (nibbles[:, 0] | nibbles[:, 1] << 4).reshape(-1)
    else:
        packed = stream.view(np.uint8)
    numbers = np.zeros((groups * OUTPUTS, blocks + 1), np.float32)
    numbers[:n, :-1] = scales
    spread = np.repeat(scales.astype(np.float64), block, 1)[:, :k]
    numbers[:n, -1] = (codes * spread).sum(1)
    by_group = numbers.reshape(groups, OUTPUTS, blocks + 1).transpose(0, 2, 1)
    return np.concatenate([packed, np.ascontiguousarray(by_group).view(np.uint8).reshape(-1)])


def unpack(bits: int, packed: Array, n: int, k: int, block: int) -> tuple[Array, Array]:
    """What `pack` was given: codes int8 [n, k] and scales fp32 [n, ceil(k / block)]."""
    fours, groups = -(-k // 4), -(-n // OUTPUTS)
    size, _ = packed_bytes(bits, n, k, block)
    stream = packed[:size].view(np.int8)
    if bits == 4:
        pairs = packed[:size].reshape(-1, _UNIT // 2)
        stream = np.stack([pairs & 15, pairs >> 4], 1).reshape(-1).view(np.int8) - np.int8(8)
    in_order = stream[: groups * fours * 4 * OUTPUTS].reshape(groups, fours, OUTPUTS, 4)
    codes = in_order.transpose(0, 2, 1, 3).reshape(groups * OUTPUTS, fours * 4)[:n, :k]
    numbers = packed[size:].view(np.float32).reshape(groups, -1, OUTPUTS)
    return codes, numbers[:, :-1].transpose(0, 2, 1).reshape(groups * OUTPUTS, -1)[:n]


def scale_blocks(scales: Array) -> tuple[int, Array]:
    """The largest block within which no row's scales [n, k] differ, and the scales per block.

    At least a row's whole length, or 32, 16, 8 or 4; raises ValueError if scales differ in fours.
    """
    k = -(-scales.shape[1] // 4) * 4
    padded = np.pad(scales, [(0, 0), (0, k - scales.shape[1])], "edge")
    for block in (k, 32, 16, 8, 4):
        whole = -(-k // block) * block
        blocks = np.pad(padded, [(0, 0), (0, whole - k)], "edge").reshape(len(scales), -1, block)
        if (blocks == blocks[..., :1]).all():
            return block, np.ascontiguousarray(blocks[..., 0], np.float32)
    raise ValueError("the scales of four weights side by side differ")


def transposed(values: Array, stride: int, *, edge: bool = False) -> Array:
    """Weights [n, channels, kernel] of a transposed convolution as those of a plain one.

    Output `q * stride + r` of the former is output q of row `n * stride + r` of the latter, which
    are [n * stride, channels, ceil(kernel / stride)]; its taps read x[q - taps + 1] to x[q]. A last
    tap that is not whole is filled with 0, or with what is at its `edge`.
    """
    n, channels, kernel = values.shape
    taps = -(-kernel // stride)
    width = [(0, 0), (0, 0), (0, taps * stride - kernel)]
    padded = np.pad(values, width, "edge") if edge else np.pad(values, width)
    phases = padded.reshape(n, channels, taps, stride)[:, :, ::-1].transpose(0, 3, 1, 2)
    return np.ascontiguousarray(phases).reshape(n * stride, channels, taps)
