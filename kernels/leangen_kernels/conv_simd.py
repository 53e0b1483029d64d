"""SIMD operations that only convolutions use: activation codes made four at a time, and their dots.

Here the lanes of a vector are pixels: BYTES hold four activations of each of 16 pixels, and the
four weights that meet them are the same for every pixel.
"""

from __future__ import annotations

from typing import Any

from numba import types

from leangen_kernels.dots import DOT, UNSIGNED, four_for_all, signed
from leangen_kernels.simd import ROUNDER
from leangen_kernels.vectors import (
    BYTES,
    FLOATS,
    INTS,
    call,
    filled,
    operation,
    store,
)

CENTER = 0 if UNSIGNED else 128
"""What is subtracted from activation codes before they are multiplied."""


@operation(FLOATS, FLOATS, FLOATS)
def smaller(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.fcmp_ordered("<", x, y), x, y)


@operation(types.void, types.int64, BYTES)
def store_bytes(b: Any, address: Any, value: Any) -> None:
    store(b, value, address)


def _joined(b: Any, *values: Any) -> Any:
    word = filled(INTS.llvm, 0)
    for place, value in enumerate(values):
        code = b.and_(b.bitcast(value, INTS.llvm), filled(INTS.llvm, 255))
        word = b.or_(word, b.shl(code, filled(INTS.llvm, 8 * place)))
    return b.bitcast(word, BYTES.llvm)


@operation(BYTES, FLOATS, FLOATS, FLOATS, FLOATS)
def join_codes(b: Any, first: Any, second: Any, third: Any, fourth: Any) -> Any:
    """Codes 1 to 254, each with ROUNDER added, as four bytes of each lane less CENTER."""
    codes = _joined(b, first, second, third, fourth)
    return codes if UNSIGNED else signed(b, codes)


@operation(BYTES, FLOATS, FLOATS, FLOATS, FLOATS)
def join_bytes(b: Any, first: Any, second: Any, third: Any, fourth: Any) -> Any:
    """Codes -127 to 127, each with ROUNDER added, as four bytes of each lane."""
    return _joined(b, first, second, third, fourth)


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


# 2**r for |r| <= 1/2 by the polynomial of its degree that is nowhere far off: 7.5e-8, relatively.
_POWER_TERMS = (0.00132764720, 0.00967554138, 0.0555071327, 0.240221197, 0.693146967, 1.00000007)


@operation(FLOATS, FLOATS)
def exponential_of_2(b: Any, x: Any) -> Any:
    """2**x to 3e-7, relatively, for x up to 126; 2**-126 below -126."""
    bottom, rounder = filled(x.type, -126.0), filled(x.type, ROUNDER)
    x = b.select(b.fcmp_ordered("<", x, bottom), bottom, x)
    shifted = b.fadd(x, rounder)
    rest = b.fsub(x, b.fsub(shifted, rounder))
    value = filled(x.type, _POWER_TERMS[0])
    for term in _POWER_TERMS[1:]:
        value = call(b, "llvm.fmuladd.v16f32", x.type, value, rest, filled(x.type, term))
    power = b.shl(b.bitcast(shifted, INTS.llvm), filled(INTS.llvm, 23))
    return b.bitcast(b.add(b.bitcast(value, INTS.llvm), power), x.type)
