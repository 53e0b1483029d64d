"""Weight codes and their dot products with activations: the one place where variants differ.

What plain LLVM cannot express well, the sum of four byte products per row, is an instruction of
each variant's own; the portable one is made of shifts and 16-bit multiplications.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from leangen_kernels.layout import VECTOR, Pieces
from leangen_kernels.vectors import (
    BYTES,
    FLOATS,
    I16,
    I32,
    I64,
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
)

# Weight codes.


def four_for_all(b: Any, address: Any, offset: Any) -> Any:
    """Four bytes from memory, the same for every row."""
    return b.bitcast(repeated(b, load(b, b.add(address, offset), I32), ROWS), BYTES.llvm)


def signed(b: Any, codes: Any) -> Any:
    """Codes 0 to 255, less 128."""
    return b.xor(codes, filled(BYTES.llvm, -128))


def chunk_loader(pieces: Pieces) -> Any:
    """Loads the codes of a chunk from the vectors at an address."""

    @operation(BYTES, types.int64)
    def load_chunk(b: Any, address: Any) -> Any:
        # A shift of 16 bits brings in bits of the byte beside, which the mask takes away.
        codes = None
        for vector, shift, mask in pieces:
            part = load(b, b.add(address, I64(VECTOR * vector)), BYTES.llvm)
            if shift:
                wide = b.lshr(b.bitcast(part, SHORTS.llvm), filled(SHORTS.llvm, shift))
                part = b.bitcast(wide, BYTES.llvm)
            if mask != 255:
                part = b.and_(part, filled(BYTES.llvm, mask))
            codes = part if codes is None else b.or_(codes, part)
        return codes

    return load_chunk


def _code(shift: int) -> Any:
    @operation(FLOATS, BYTES)
    def code(b: Any, codes: Any) -> Any:
        """One of each row's four unsigned bytes, as floats."""
        ints = b.lshr(b.bitcast(codes, INTS.llvm), filled(INTS.llvm, shift))
        return b.sitofp(b.and_(ints, filled(INTS.llvm, 255)), FLOATS.llvm)

    return code


code_0, code_1, code_2, code_3 = (_code(shift) for shift in (0, 8, 16, 24))


def table_values(table: tuple[float, ...]) -> list[Any]:
    """Like code_0 to code_3 for codes of four bits, each standing for `table[code]`."""

    def value(shift: int) -> Any:
        @operation(FLOATS, BYTES)
        def look_up(b: Any, codes: Any) -> Any:
            ints = b.lshr(b.bitcast(codes, INTS.llvm), filled(INTS.llvm, shift))
            if VARIANT.dot == "vnni512":  # which reads the low four bits of an index
                constants = ir.Constant(FLOATS.llvm, list(table))
                name = "llvm.x86.avx512.permvar.sf.512"
                return call(b, name, FLOATS.llvm, constants, ints)
            found = [filled(FLOATS.llvm, entry) for entry in table]
            for bit in range(4):
                flag = b.and_(ints, filled(INTS.llvm, 1 << bit))
                is_set = b.icmp_unsigned("!=", flag, filled(INTS.llvm, 0))
                found = [
                    b.select(is_set, high, low)
                    for low, high in zip(found[::2], found[1::2], strict=True)
                ]
            return found[0]

        return look_up

    return [value(shift) for shift in (0, 8, 16, 24)]


# Dot products of four bytes, unsigned by signed, per row. A sum of codes below 8 bits is SHORTS
# where that is faster, for as long as it fits 16 bits, see `sums`; else it is INTS.


def _bytes_in_shorts(b: Any, x: Any, extend: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    """Even and odd bytes as 16-bit numbers."""
    shorts, eight = b.bitcast(x, SHORTS.llvm), filled(SHORTS.llvm, 8)
    return extend(b.shl(shorts, eight), eight), extend(shorts, eight)


def _pairs_portable(b: Any, weights: Any, x: Any, *, signed: bool) -> Any:
    """Sums of two byte products as shorts."""
    w_even, w_odd = _bytes_in_shorts(b, weights, b.ashr if signed else b.lshr)
    x_even, x_odd = _bytes_in_shorts(b, x, b.ashr)
    return b.add(b.mul(w_even, x_even), b.mul(w_odd, x_odd))


def _shorts_to_ints_portable(b: Any, x: Any) -> Any:
    ints, sixteen = b.bitcast(x, INTS.llvm), filled(INTS.llvm, 16)
    return b.add(b.ashr(b.shl(ints, sixteen), sixteen), b.ashr(ints, sixteen))


def _pairs_avx2(b: Any, weights: Any, x: Any) -> Any:
    shorts = ir.VectorType(I16, 16)

    def emit(w: Any, x: Any) -> Any:
        return call(b, "llvm.x86.avx2.pmadd.ub.sw", shorts, w, x)

    return piecewise(b, emit, 2, weights, x)


def _shorts_to_ints_avx2(b: Any, x: Any) -> Any:
    ints = ir.VectorType(I32, 8)

    def emit(x: Any) -> Any:
        return call(b, "llvm.x86.avx2.pmadd.wd", ints, x, filled(x.type, 1))

    return piecewise(b, emit, 2, x)


def _dot_avx2(b: Any, total: Any, weights: Any, x: Any) -> Any:
    # pmaddubsw saturates on full bytes, so move the sign of the weight over to the activation:
    # |w| * (sign(w) * x) sums to at most 2 * 128 * 127 < 2**15.
    magnitude = call(b, "llvm.abs.v64i8", BYTES.llvm, weights, ir.IntType(1)(0))

    def emit(x: Any, w: Any) -> Any:
        return call(b, "llvm.x86.avx2.psign.b", x.type, x, w)

    turned = piecewise(b, emit, 2, x, weights)
    return b.add(total, _shorts_to_ints_avx2(b, _pairs_avx2(b, magnitude, turned)))


def _dot_portable(b: Any, total: Any, weights: Any, x: Any) -> Any:
    return b.add(total, _shorts_to_ints_portable(b, _pairs_portable(b, weights, x, signed=True)))


def _dot_vnni(b: Any, total: Any, codes: Any, x: Any) -> Any:
    bits = 512 if VARIANT.dot == "vnni512" else 256

    def emit(total: Any, w: Any, x: Any) -> Any:
        return call(b, f"llvm.x86.avx512.vpdpbusd.{bits}", total.type, total, w, x)

    return piecewise(b, emit, 512 // bits, total, codes, x)


NEON_DOT = "leangen_neon_sdot"
"""Stands for LLVM's intrinsic until `build` retargets the module: Numba compiles for its host."""


def _dot_neon(b: Any, total: Any, weights: Any, x: Any) -> Any:
    def emit(total: Any, w: Any, x: Any) -> Any:
        product = call(b, NEON_DOT, total.type, total, w, x)
        for attribute in ("nounwind", "readnone"):
            product.callee.attributes.add(attribute)
        return product

    return piecewise(b, emit, 4, total, weights, x)


_SHORT_SUMS = VARIANT.dot in ("avx2", "portable")
_TO_INTS = _shorts_to_ints_avx2 if VARIANT.dot == "avx2" else _shorts_to_ints_portable
UNSIGNED = VARIANT.dot.startswith("vnni")
"""Whether DOT takes unsigned bytes on its left, else signed ones; they are signed on its right."""
DOT = {
    "avx2": _dot_avx2,
    "portable": _dot_portable,
    "vnni256": _dot_vnni,
    "vnni512": _dot_vnni,
    "neon": _dot_neon,
}[VARIANT.dot]
"""(builder, total, left, right): adds four byte products per row."""
SUMS = SHORTS if _SHORT_SUMS else INTS


@operation(SUMS, types.int32)
def few_bits_begin(b: Any, start: Any) -> Any:
    """A sum of products that ends up `start` higher."""
    return filled(SHORTS.llvm, 0) if _SHORT_SUMS else repeated(b, start, ROWS)


@operation(SUMS, SUMS, BYTES, types.int64, types.int64)
def few_bits_dot(b: Any, total: Any, codes: Any, address: Any, offset: Any) -> Any:
    """Add four products per row, codes 0 to 63, at most so often per sum as `sums` says.

    The four activations, from memory, are the same for every row.
    """
    x = four_for_all(b, address, offset)
    if VARIANT.dot == "avx2":
        return b.add(total, _pairs_avx2(b, codes, x))
    if VARIANT.dot == "portable":
        return b.add(total, _pairs_portable(b, codes, x, signed=False))
    if VARIANT.dot == "neon":
        return _dot_neon(b, total, codes, x)
    return _dot_vnni(b, total, codes, x)


@operation(INTS, SUMS, types.int32)
def few_bits_end(b: Any, total: Any, start: Any) -> Any:
    return b.add(_TO_INTS(b, total), repeated(b, start, ROWS)) if _SHORT_SUMS else total


@operation(INTS, types.int32)
def byte_begin(b: Any, start: Any) -> Any:
    """A sum of products of (code - 128); `start` is -128 times the sum of the activations."""
    return repeated(b, start, ROWS) if UNSIGNED else filled(INTS.llvm, 0)


@operation(INTS, INTS, BYTES, types.int64, types.int64)
def byte_dot(b: Any, total: Any, codes: Any, address: Any, offset: Any) -> Any:
    """Add four products per row, codes 0 to 255, of activations from memory."""
    weights = codes if UNSIGNED else signed(b, codes)
    return DOT(b, total, weights, four_for_all(b, address, offset))


@operation(INTS, INTS, types.int32)
def byte_end(b: Any, total: Any, start: Any) -> Any:
    return total


def sums(bits: int, dots: int) -> tuple[int, Any, Any, Any]:
    """How `dots` dot products of codes are summed: so many at a time, and begin, dot and end.

    A dot product is two products in each lane of 16 bits.
    """
    if bits == 8:
        return dots, byte_begin, byte_dot, byte_end
    most = (2**15 - 1) // (2 * 127 * ((1 << bits) - 1)) if _SHORT_SUMS else dots
    return min(most, dots), few_bits_begin, few_bits_dot, few_bits_end
