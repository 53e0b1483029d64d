"""Typed SIMD for Numba: kernels read like Python and compile to vector instructions.

Here are memory and floats; `dots` has the dot products of weight codes and activations. Addresses
are plain integers, loads and stores need no alignment, and nothing raises or allocates: compiled
kernels need neither Python nor Numba.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from leangen_kernels.vectors import (
    BYTES,
    F32,
    FLOATS,
    HALVES,
    I8,
    I16,
    I32,
    INTS,
    POINTER,
    ROWS,
    VARIANT,
    call,
    filled,
    load,
    operation,
    repeated,
    slices,
    store,
)

# Memory.


@operation(types.float32, types.int64, types.int64)
def load_float(b: Any, address: Any, offset: Any) -> Any:
    return load(b, b.add(address, offset), F32)


@operation(types.int32, types.int64, types.int64)
def load_int(b: Any, address: Any, offset: Any) -> Any:
    return load(b, b.add(address, offset), I32)


@operation(types.void, types.int64, types.float32)
def store_float(b: Any, address: Any, value: Any) -> None:
    store(b, value, address)


@operation(types.void, types.int64, types.int32)
def store_int(b: Any, address: Any, value: Any) -> None:
    store(b, value, address)


@operation(FLOATS, types.int64, types.int64)
def load_floats(b: Any, address: Any, offset: Any) -> Any:
    return load(b, b.add(address, offset), FLOATS.llvm)


@operation(BYTES, types.int64, types.int64)
def load_bytes(b: Any, address: Any, offset: Any) -> Any:
    return load(b, b.add(address, offset), BYTES.llvm)


@operation(types.void, types.int64, FLOATS)
def store_floats(b: Any, address: Any, value: Any) -> None:
    store(b, value, address)


@operation(types.void, types.int64, INTS)
def store_ints_as_bytes(b: Any, address: Any, value: Any) -> None:
    """The low byte of each lane, 16 bytes."""
    store(b, b.trunc(value, ir.VectorType(I8, ROWS)), address)


def _lanes_below(b: Any, count: Any) -> Any:
    lanes = ir.Constant(INTS.llvm, list(range(ROWS)))
    return b.icmp_signed("<", lanes, repeated(b, b.trunc(count, I32), ROWS))


@operation(FLOATS, types.int64, types.int64)
def load_first_floats(b: Any, address: Any, count: Any) -> Any:
    """The first `count` lanes from memory, zero in the others."""
    pointer, mask = b.inttoptr(address, POINTER), _lanes_below(b, count)
    name = "llvm.masked.load.v16f32.p0"
    if _masked_takes_alignment():
        return call(b, name, FLOATS.llvm, pointer, I32(1), mask, filled(FLOATS.llvm, 0.0))
    return call(b, name, FLOATS.llvm, pointer, mask, filled(FLOATS.llvm, 0.0))


@operation(types.void, types.int64, FLOATS, types.int64)
def store_first_floats(b: Any, address: Any, value: Any, count: Any) -> None:
    """Only the first `count` lanes."""
    pointer, mask = b.inttoptr(address, POINTER), _lanes_below(b, count)
    name = "llvm.masked.store.v16f32.p0"
    if _masked_takes_alignment():
        call(b, name, ir.VoidType(), value, pointer, I32(1), mask)
    else:
        call(b, name, ir.VoidType(), value, pointer, mask)


def _masked_takes_alignment() -> bool:
    # LLVM 22 moved the alignment of masked loads and stores from an argument to an attribute.
    from llvmlite import binding

    return bool(binding.llvm_version_info[0] < 22)


def _prefetch(level: int) -> Any:
    @operation(types.void, types.int64, types.int64)
    def prefetch(b: Any, address: Any, offset: Any) -> None:
        """Ask for a cache line, which may lie past the end of the data."""
        pointer = b.inttoptr(b.add(address, offset), POINTER)
        call(b, "llvm.prefetch.p0", ir.VoidType(), pointer, I32(0), I32(level), I32(1))

    return prefetch


prefetch, prefetch_soon = _prefetch(3), _prefetch(2)  # to the first cache, to the second


# Floats.


@operation(FLOATS, types.float32)
def splat(b: Any, value: Any) -> Any:
    return repeated(b, value, ROWS)


@operation(INTS, types.int32)
def splat_int(b: Any, value: Any) -> Any:
    return repeated(b, value, ROWS)


@operation(FLOATS, types.int64, types.int64)
def load_for_all(b: Any, address: Any, offset: Any) -> Any:
    """One float from memory in every lane."""
    return repeated(b, load(b, b.add(address, offset), F32), ROWS)


_MULTIPLY_ADD = "llvm.fmuladd.v16f32"


@operation(FLOATS, FLOATS, FLOATS, FLOATS)
def multiply_add(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once where the machine can."""
    return call(b, _MULTIPLY_ADD, FLOATS.llvm, x, y, z)


@operation(FLOATS, INTS)
def to_floats(b: Any, x: Any) -> Any:
    return b.sitofp(x, FLOATS.llvm)


# 1.5 * 2**23: adding it leaves the nearest integer, ties to even, in the low mantissa bits.
ROUNDER = 12582912.0


@operation(INTS, FLOATS)
def round_to_ints(b: Any, x: Any) -> Any:
    """The nearest integers, ties to even, for |x| up to 2**22; any bits outside that."""
    shifted = b.bitcast(b.fadd(x, filled(FLOATS.llvm, ROUNDER)), INTS.llvm)
    return b.sub(shifted, filled(INTS.llvm, 0x4B400000))


@operation(types.int32, INTS)
def sum_ints(b: Any, x: Any) -> Any:
    return call(b, "llvm.vector.reduce.add.v16i32", I32, x)


@operation(types.float32, FLOATS)
def sum_floats(b: Any, x: Any) -> Any:
    """Pairwise, so that every variant rounds alike."""
    while x.type.count > 1:
        x = b.fadd(*slices(b, x, x.type.count // 2))
    return b.extract_element(x, I32(0))


def _clear_sign(b: Any, x: Any) -> Any:
    bits = b.and_(b.bitcast(x, INTS.llvm), filled(INTS.llvm, 0x7FFFFFFF))
    return b.bitcast(bits, FLOATS.llvm)


@operation(FLOATS, FLOATS, FLOATS)
def larger_magnitude(b: Any, x: Any, y: Any) -> Any:
    """max(|x|, |y|) lane by lane; a NaN wins, as its bits are above infinity's."""
    x, y = (b.bitcast(_clear_sign(b, value), INTS.llvm) for value in (x, y))
    return b.bitcast(b.select(b.icmp_signed(">", x, y), x, y), FLOATS.llvm)


@operation(types.float32, FLOATS)
def largest_magnitude(b: Any, x: Any) -> Any:
    """max |x| over the lanes; NaN if there is one."""
    bits = b.bitcast(_clear_sign(b, x), INTS.llvm)
    return b.bitcast(call(b, "llvm.vector.reduce.smax.v16i32", I32, bits), F32)


@operation(types.float32, FLOATS)
def largest(b: Any, x: Any) -> Any:
    while x.type.count > 1:
        low, high = slices(b, x, x.type.count // 2)
        x = b.select(b.fcmp_ordered(">", low, high), low, high)
    return b.extract_element(x, I32(0))


@operation(FLOATS, FLOATS, FLOATS)
def larger(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


# exp(r) for |r| <= ln(2) / 2 by Taylor's terms up to r**7 / 7!: below 2**-24 relative.
_EXP_TERMS = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
_LOG2_E = 1.4426950408889634
_LN2 = (0.693359375, -2.12194440e-4)  # exact product with small integers, and the rest
_EXP_LIMIT = 87.0


@operation(FLOATS, FLOATS)
def exponential(b: Any, x: Any) -> Any:
    """exp(x) to 2 ulp; exp(87) = 6e37 above 87, and 0 below -87."""
    top, bottom = filled(x.type, _EXP_LIMIT), filled(x.type, -_EXP_LIMIT)
    vanishes = b.fcmp_ordered("<", x, bottom)
    x = b.select(b.fcmp_ordered(">", x, top), top, b.select(vanishes, bottom, x))
    shifted = b.fadd(b.fmul(x, filled(x.type, _LOG2_E)), filled(x.type, ROUNDER))
    power = b.sub(b.bitcast(shifted, INTS.llvm), filled(INTS.llvm, 0x4B400000))
    rest, count = x, b.fsub(shifted, filled(x.type, ROUNDER))
    for part in _LN2:
        rest = call(b, _MULTIPLY_ADD, x.type, count, filled(x.type, -part), rest)
    value = filled(x.type, _EXP_TERMS[0])
    for term in _EXP_TERMS[1:]:
        value = call(b, _MULTIPLY_ADD, x.type, value, rest, filled(x.type, term))
    scale = b.shl(b.add(power, filled(INTS.llvm, 127)), filled(INTS.llvm, 23))
    value = b.fmul(value, b.bitcast(scale, x.type))
    return b.select(vanishes, filled(x.type, 0.0), value)


@operation(FLOATS, FLOATS, types.int64, types.int64)
def only_between(b: Any, x: Any, low: Any, high: Any) -> Any:
    """Lanes from `low` up to `high`; -1e30 in the others."""
    below, kept = _lanes_below(b, low), _lanes_below(b, high)
    kept = b.and_(kept, b.not_(below))
    return b.select(kept, x, filled(x.type, -1e30))


@operation(FLOATS, FLOATS, types.int64)
def only_first(b: Any, x: Any, count: Any) -> Any:
    """The first `count` lanes; zero in the others."""
    return b.select(_lanes_below(b, count), x, filled(x.type, 0.0))


@operation(FLOATS, FLOATS)
def magnitude(b: Any, x: Any) -> Any:
    return _clear_sign(b, x)


@operation(FLOATS, FLOATS, FLOATS, FLOATS)
def where_negative(b: Any, x: Any, y: Any, z: Any) -> Any:
    """y in lanes where x < 0, else z."""
    return b.select(b.fcmp_ordered("<", x, filled(x.type, 0.0)), y, z)


@operation(types.float32, types.float32)
def square_root(b: Any, x: Any) -> Any:
    return call(b, "llvm.sqrt.f32", F32, x)


@operation(FLOATS, types.int64, types.int64)
def load_codes(b: Any, address: Any, offset: Any) -> Any:
    """16 signed bytes as floats."""
    codes = load(b, b.add(address, offset), ir.VectorType(I8, ROWS))
    return b.sitofp(b.sext(codes, INTS.llvm), FLOATS.llvm)


@operation(FLOATS, types.int64, types.int64)
def load_halves(b: Any, address: Any, offset: Any) -> Any:
    """16 fp16 numbers as floats."""
    address = b.add(address, offset)
    if VARIANT.dot != "portable":
        return b.fpext(load(b, address, HALVES), FLOATS.llvm)
    # Without a conversion instruction: put exponent and mantissa in place, then rescale by 2**112,
    # which also makes subnormals right. Infinities and NaN, which no scale is, are not kept.
    bits = b.zext(load(b, address, ir.VectorType(I16, ROWS)), INTS.llvm)
    sign = b.shl(b.and_(bits, filled(INTS.llvm, 0x8000)), filled(INTS.llvm, 16))
    rest = b.shl(b.and_(bits, filled(INTS.llvm, 0x7FFF)), filled(INTS.llvm, 13))
    number = b.fmul(b.bitcast(rest, FLOATS.llvm), filled(FLOATS.llvm, 2.0**112))
    return b.bitcast(b.or_(b.bitcast(number, INTS.llvm), sign), FLOATS.llvm)


@operation(types.void, types.int64, FLOATS)
def store_halves(b: Any, address: Any, value: Any) -> None:
    """16 floats as fp16, ties to even."""
    if VARIANT.dot != "portable":
        store(b, b.fptrunc(value, HALVES), address)
        return
    bits = b.bitcast(value, INTS.llvm)
    sign = b.and_(bits, filled(INTS.llvm, -(2**31)))
    bits = b.xor(bits, sign)
    # Subnormal: adding 1/2 leaves the multiple of 2**-24 in the low bits.
    small = b.fadd(b.bitcast(bits, FLOATS.llvm), filled(FLOATS.llvm, 0.5))
    small = b.sub(b.bitcast(small, INTS.llvm), filled(INTS.llvm, 0x3F000000))
    odd = b.and_(b.lshr(bits, filled(INTS.llvm, 13)), filled(INTS.llvm, 1))
    normal = b.add(bits, filled(INTS.llvm, (15 - 127) * 2**23 + 0xFFF))
    normal = b.lshr(b.add(normal, odd), filled(INTS.llvm, 13))
    half = b.select(b.icmp_signed("<", bits, filled(INTS.llvm, 113 * 2**23)), small, normal)
    above = b.icmp_signed(">=", bits, filled(INTS.llvm, 0x477FF000))  # 65520, halfway to 2**16
    unbounded = b.icmp_signed(">", bits, filled(INTS.llvm, 0x7F800000))
    most = b.select(unbounded, filled(INTS.llvm, 0x7E00), filled(INTS.llvm, 0x7C00))
    half = b.or_(b.select(above, most, half), b.lshr(sign, filled(INTS.llvm, 16)))
    store(b, b.trunc(half, ir.VectorType(I16, ROWS)), address)
