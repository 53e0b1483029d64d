"""Codes as ONNX Runtime's operators, or a graph that unpacks them, read them from bytes."""

from __future__ import annotations

import numpy as np

from leangen.schemes import Array, Packed


def padded(packed: Packed) -> Array:
    """Codes [n, blocks, block size], the last block filled up."""
    n, k = packed.shape
    blocks = packed.scales.shape[1]
    codes: Array = packed.q
    if blocks * packed.block_size != k:
        codes = np.full((n, blocks * packed.block_size), 1 << (packed.bits - 1), np.uint8)
        codes[:, :k] = packed.q
    return codes.reshape(n, blocks, packed.block_size)


def nbits_layout(packed: Packed) -> Array:
    """Codes as `MatMulNBits` reads them: [n, blocks, bytes of a block], low bits first."""
    return _low_first(padded(packed), packed.bits)


def nbits_zero_points(packed: Packed, bits: int) -> Array:
    """Zero points as `MatMulNBits` of `bits` bits reads them: [n, bytes of a row]."""
    zeros = packed.zero_points
    assert zeros is not None  # asymmetric codes only
    whole = np.pad(zeros, ((0, 0), (0, -zeros.shape[1] % (8 // bits))))
    return _low_first(whole, bits)


def bnb_layout(packed: Packed) -> Array:
    """Codes as bitsandbytes and `MatMulBnb4` read them: flat, the first of a pair in high bits."""
    flat = packed.q.reshape(-1)
    packed_pairs: Array = flat[0::2] << 4 | flat[1::2]
    return packed_pairs


def planes(codes: Array, bits: int) -> list[Array]:
    """Codes [..., size] as planes of 1, 2, 4 or 8 bits, lowest bits first, to be unpacked by parts.

    A byte of a plane of b bits holds the codes of one place in each of the 8/b parts of the block,
    the first part lowest: unpacked parts are joined, not interleaved. 3 bits are a plane of 2 and
    one of 1.
    """
    if bits == 3:
        return [*planes(codes & 3, 2), *planes(codes >> 2, 1)]
    parts = np.split(codes, 8 // bits, axis=-1)
    plane = parts[0].copy()
    for place, part in enumerate(parts[1:], start=1):
        plane |= part << (place * bits)
    return [plane]


def pair_planes(packed: Packed) -> list[Array]:
    """3-bit codes as a plane of 2 bits and one of 1, made from the bytes of their 4-bit layout.

    In such a byte, two codes fill bits 0-2 and 4-6. The first plane joins bits 0, 1, 4, 5 of a
    block's first and second half, the second bits 2 and 6 of its four quarters.
    """
    pairs = _low_first(padded(packed), 4)
    first, second = np.split(pairs & 0x33, 2, axis=-1)
    quarters = np.split((pairs & 0x44) >> 2, 4, axis=-1)
    high = quarters[0] | quarters[1] << 1 | quarters[2] << 2 | quarters[3] << 3
    return [first | second << 2, high]


def _low_first(codes: Array, bits: int) -> Array:
    """Neighbours along the last axis in one byte, the first in the lowest bits."""
    per_byte = 8 // bits
    packed = codes[..., 0::per_byte].copy()
    for place in range(1, per_byte):
        packed |= codes[..., place::per_byte] << (place * bits)
    return packed
