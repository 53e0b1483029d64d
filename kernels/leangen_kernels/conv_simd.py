"""SIMD operations that only convolutions use: activation codes made four at a time, and their dots.

Here the lanes of a vector are pixels: BYTES hold four activations of each of 16 pixels, and the
four weights that meet them are the same for every pixel.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from leangen_kernels.dots import NEON_DOT
from leangen_kernels.vectors import (
    BYTES,
    FLOATS,
    I16,
    I32,
    INTS,
    ROWS,
    SHORTS,
    VARIANT,
    call,
    filled,
    load,
    operation,
    piecewise,
    repeated,
    store,
)

_UNSIGNED = VARIANT.dot.startswith("vnni")
CENTER = 0 if _UNSIGNED else 128
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
    return codes if _UNSIGNED else b.xor(codes, filled(BYTES.llvm, -128))


@operation(BYTES, BYTES)
def low_signed(b: Any, nibbles: Any) -> Any:
    """Codes 0 to 15 in the low halves of bytes, less 8."""
    return b.sub(b.and_(nibbles, filled(BYTES.llvm, 15)), filled(BYTES.llvm, 8))


@operation(BYTES, BYTES)
def high_signed(b: Any, nibbles: Any) -> Any:
    """Codes 0 to 15 in the high halves of bytes, less 8."""
    wide = b.lshr(b.bitcast(nibbles, SHORTS.llvm), filled(SHORTS.llvm, 4))
    low = b.and_(b.bitcast(wide, BYTES.llvm), filled(BYTES.llvm, 15))
    return b.sub(low, filled(BYTES.llvm, 8))


def _dot_avx2(b: Any, total: Any, codes: Any, weights: Any) -> Any:
    # pmaddubsw takes unsigned by signed: the weight's sign moves over to the activation, and
    # |w| * (sign(w) * x) sums to at most 2 * 127 * 127 < 2**15.
    magnitude = call(b, "llvm.abs.v64i8", BYTES.llvm, weights, ir.IntType(1)(0))

    def emit(total: Any, x: Any, w: Any, magnitude: Any) -> Any:
        signed = call(b, "llvm.x86.avx2.psign.b", x.type, x, w)
        shorts = ir.VectorType(I16, x.type.count // 2)
        pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", shorts, magnitude, signed)
        ones = filled(shorts, 1)
        return b.add(total, call(b, "llvm.x86.avx2.pmadd.wd", total.type, pairs, ones))

    return piecewise(b, emit, 2, total, codes, weights, magnitude)


def _dot_vnni(b: Any, total: Any, codes: Any, weights: Any) -> Any:
    bits = 512 if VARIANT.dot == "vnni512" else 256

    def emit(total: Any, x: Any, w: Any) -> Any:
        return call(b, f"llvm.x86.avx512.vpdpbusd.{bits}", total.type, total, x, w)

    return piecewise(b, emit, 512 // bits, total, codes, weights)


def _dot_neon(b: Any, total: Any, codes: Any, weights: Any) -> Any:
    def emit(total: Any, x: Any, w: Any) -> Any:
        product = call(b, NEON_DOT, total.type, total, x, w)
        for attribute in ("nounwind", "readnone"):
            product.callee.attributes.add(attribute)
        return product

    return piecewise(b, emit, 4, total, codes, weights)


def _dot_portable(b: Any, total: Any, codes: Any, weights: Any) -> Any:
    eight, sixteen = filled(SHORTS.llvm, 8), filled(INTS.llvm, 16)
    x, w = b.bitcast(codes, SHORTS.llvm), b.bitcast(weights, SHORTS.llvm)
    even = b.mul(b.ashr(b.shl(x, eight), eight), b.ashr(b.shl(w, eight), eight))
    pairs = b.bitcast(b.add(even, b.mul(b.ashr(x, eight), b.ashr(w, eight))), INTS.llvm)
    low, high = b.ashr(b.shl(pairs, sixteen), sixteen), b.ashr(pairs, sixteen)
    return b.add(total, b.add(low, high))


_DOT = {
    "avx2": _dot_avx2,
    "vnni256": _dot_vnni,
    "vnni512": _dot_vnni,
    "neon": _dot_neon,
    "portable": _dot_portable,
}[VARIANT.dot]


@operation(INTS, INTS, BYTES, types.int64, types.int64)
def activation_dot(b: Any, total: Any, codes: Any, address: Any, offset: Any) -> Any:
    """Add four products per pixel: its codes less CENTER, and four signed weights from memory."""
    four = repeated(b, load(b, b.add(address, offset), I32), ROWS)
    return _DOT(b, total, codes, b.bitcast(four, BYTES.llvm))
