"""SIMD operations that only convolutions use: activation codes made four at a time, and their dots.

Here the lanes of a vector are pixels: BYTES hold four activations of each of 16 pixels, and the
four weights that meet them are the same for every pixel.
"""

from __future__ import annotations

from typing import Any

from numba import types

from leangen_kernels.dots import DOT, UNSIGNED, four_for_all, signed
from leangen_kernels.vectors import (
    BYTES,
    FLOATS,
    INTS,
    filled,
    operation,
    store,
)

CENTER = 0 if UNSIGNED else 128
"""What is subtracted from activation codes before they are multiplied."""

# 1.5 * 2**23: adding it leaves the nearest integer, ties to even, in the low mantissa bits.
ROUNDER = 12582912.0


@operation(FLOATS, FLOATS, FLOATS)
def smaller(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.fcmp_ordered("<", x, y), x, y)


@operation(types.void, types.int64, BYTES)
def store_bytes(b: Any, address: Any, value: Any) -> None:
    store(b, value, address)


@operation(BYTES, FLOATS, FLOATS, FLOATS, FLOATS)
def join_codes(b: Any, first: Any, second: Any, third: Any, fourth: Any) -> Any:
    """Codes 1 to 254, each with ROUNDER added, as four bytes of each lane less CENTER."""
    word = filled(INTS.llvm, 0)
    for place, value in enumerate((first, second, third, fourth)):
        code = b.and_(b.bitcast(value, INTS.llvm), filled(INTS.llvm, 255))
        word = b.or_(word, b.shl(code, filled(INTS.llvm, 8 * place)))
    codes = b.bitcast(word, BYTES.llvm)
    return codes if UNSIGNED else signed(b, codes)


@operation(BYTES, BYTES)
def centered(b: Any, nibbles: Any) -> Any:
    """Codes 0 to 15, less 8."""
    return b.sub(nibbles, filled(BYTES.llvm, 8))


@operation(INTS, INTS, BYTES, types.int64, types.int64)
def activation_dot(b: Any, total: Any, codes: Any, address: Any, offset: Any) -> Any:
    """Add four products per pixel: its codes less CENTER, and four signed weights from memory."""
    weights = four_for_all(b, address, offset)
    if UNSIGNED:
        return DOT(b, total, codes, weights)
    return DOT(b, total, weights, codes)  # on AVX2 the left side's magnitude serves two vectors
