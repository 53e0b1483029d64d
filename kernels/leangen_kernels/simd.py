"""Typed SIMD vectors for Numba: kernels read like Python and compile to vector instructions.

A vector has 16 lanes, one for each weight row of a group: FLOATS and INTS hold one number per row,
BYTES four bytes per row, SHORTS two 16-bit numbers per row. LLVM splits these to the width of the
machine. What plain LLVM cannot express well, the four-byte dot product, is chosen by variant.

Addresses are plain integers, loads and stores need no alignment, and nothing raises or allocates:
compiled kernels need neither Python nor Numba.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

from leangen_kernels import variants

ROWS = 16
VARIANT = variants.current()

_i8, _i16, _i32, _i64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_f16, _f32 = ir.HalfType(), ir.FloatType()
_pointer = ir.PointerType()


class Vector(types.Type):  # type: ignore[misc]
    """A Numba type held in one LLVM vector."""

    def __init__(self, name: str, element: ir.Type, count: int) -> None:
        self.llvm = ir.VectorType(element, count)
        super().__init__(name=name)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, kind.llvm)


FLOATS = Vector("floats", _f32, ROWS)
INTS = Vector("ints", _i32, ROWS)
SHORTS = Vector("shorts", _i16, 2 * ROWS)
BYTES = Vector("bytes", _i8, 4 * ROWS)
_HALVES = ir.VectorType(_f16, ROWS)

Emit = Callable[..., Any]


def operation(result: Any, *operands: Any) -> Callable[[Emit], Any]:
    """Makes a function for kernels out of one that emits its LLVM instructions."""

    def define(emit: Emit) -> Any:
        def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            value = emit(builder, *args)
            return context.get_dummy_value() if result is types.void else value

        def typed(typing_context: Any, *args: Any) -> Any:
            return signature(result, *operands), lower

        # Numba reads the number of operands off the signature.
        typed.__signature__ = inspect.signature(emit)  # type: ignore[attr-defined]
        typed.__name__ = emit.__name__
        typed.__doc__ = emit.__doc__
        return intrinsic(typed)

    return define


def _splat(kind: Any, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def _repeat(b: Any, value: Any, count: int) -> Any:
    """A vector with `value` in every lane."""
    one = ir.VectorType(value.type, count)
    empty = ir.Constant(one, ir.Undefined)
    first = b.insert_element(empty, value, _i32(0))
    return b.shuffle_vector(first, empty, ir.Constant(ir.VectorType(_i32, count), [0] * count))


def _call(b: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), args)


def _slices(b: Any, vector: Any, count: int) -> list[Any]:
    """The vector cut into pieces of `count` lanes."""
    lanes = ir.VectorType(_i32, count)
    return [
        b.shuffle_vector(vector, vector, ir.Constant(lanes, list(range(start, start + count))))
        for start in range(0, vector.type.count, count)
    ]


def _join(b: Any, pieces: list[Any]) -> Any:
    while len(pieces) > 1:
        count = 2 * pieces[0].type.count
        lanes = ir.Constant(ir.VectorType(_i32, count), list(range(count)))
        pieces = [
            b.shuffle_vector(low, high, lanes)
            for low, high in zip(pieces[::2], pieces[1::2], strict=True)
        ]
    return pieces[0]


def _piecewise(b: Any, emit: Emit, count: int, *vectors: Any) -> Any:
    """`emit` on pieces of the vectors: `count` pieces of each, then joined."""
    pieces = [_slices(b, vector, vector.type.count // count) for vector in vectors]
    return _join(b, [emit(*operands) for operands in zip(*pieces, strict=True)])


def _load(b: Any, address: Any, kind: Any) -> Any:
    value = b.load(b.inttoptr(address, _pointer), typ=kind)
    value.align = 1
    return value


def _store(b: Any, value: Any, address: Any) -> None:
    b.store(value, b.inttoptr(address, _pointer)).align = 1


# Memory.


@operation(types.float32, types.int64, types.int64)
def load_float(b: Any, address: Any, offset: Any) -> Any:
    return _load(b, b.add(address, offset), _f32)


@operation(types.int32, types.int64, types.int64)
def load_int(b: Any, address: Any, offset: Any) -> Any:
    return _load(b, b.add(address, offset), _i32)


@operation(types.void, types.int64, types.float32)
def store_float(b: Any, address: Any, value: Any) -> None:
    _store(b, value, address)


@operation(types.void, types.int64, types.int32)
def store_int(b: Any, address: Any, value: Any) -> None:
    _store(b, value, address)


@operation(types.void, types.int64, types.int8)
def store_byte(b: Any, address: Any, value: Any) -> None:
    _store(b, value, address)


@operation(FLOATS, types.int64, types.int64)
def load_floats(b: Any, address: Any, offset: Any) -> Any:
    return _load(b, b.add(address, offset), FLOATS.llvm)


@operation(BYTES, types.int64, types.int64)
def load_bytes(b: Any, address: Any, offset: Any) -> Any:
    return _load(b, b.add(address, offset), BYTES.llvm)


@operation(types.void, types.int64, FLOATS)
def store_floats(b: Any, address: Any, value: Any) -> None:
    _store(b, value, address)


@operation(types.void, types.int64, INTS)
def store_ints_as_bytes(b: Any, address: Any, value: Any) -> None:
    """The low byte of each lane, 16 bytes."""
    _store(b, b.trunc(value, ir.VectorType(_i8, ROWS)), address)


def _lanes_below(b: Any, count: Any) -> Any:
    lanes = ir.Constant(INTS.llvm, list(range(ROWS)))
    return b.icmp_signed("<", lanes, _repeat(b, b.trunc(count, _i32), ROWS))


@operation(FLOATS, types.int64, types.int64)
def load_first_floats(b: Any, address: Any, count: Any) -> Any:
    """The first `count` lanes from memory, zero in the others."""
    pointer, mask = b.inttoptr(address, _pointer), _lanes_below(b, count)
    name = "llvm.masked.load.v16f32.p0"
    if _masked_takes_alignment():
        return _call(b, name, FLOATS.llvm, pointer, _i32(1), mask, _splat(FLOATS.llvm, 0.0))
    return _call(b, name, FLOATS.llvm, pointer, mask, _splat(FLOATS.llvm, 0.0))


@operation(types.void, types.int64, FLOATS, types.int64)
def store_first_floats(b: Any, address: Any, value: Any, count: Any) -> None:
    """Only the first `count` lanes."""
    pointer, mask = b.inttoptr(address, _pointer), _lanes_below(b, count)
    name = "llvm.masked.store.v16f32.p0"
    if _masked_takes_alignment():
        _call(b, name, ir.VoidType(), value, pointer, _i32(1), mask)
    else:
        _call(b, name, ir.VoidType(), value, pointer, mask)


def _masked_takes_alignment() -> bool:
    # LLVM 22 moved the alignment of masked loads and stores from an argument to an attribute.
    from llvmlite import binding

    return bool(binding.llvm_version_info[0] < 22)


@operation(types.void, types.int64, types.int64)
def prefetch(b: Any, address: Any, offset: Any) -> None:
    """Ask for a cache line, which may lie past the end of the data."""
    pointer = b.inttoptr(b.add(address, offset), _pointer)
    _call(b, "llvm.prefetch.p0", ir.VoidType(), pointer, _i32(0), _i32(3), _i32(1))


# Floats.


@operation(FLOATS, types.float32)
def splat(b: Any, value: Any) -> Any:
    return _repeat(b, value, ROWS)


@operation(INTS, types.int32)
def splat_int(b: Any, value: Any) -> Any:
    return _repeat(b, value, ROWS)


@operation(FLOATS, types.int64, types.int64)
def load_for_all(b: Any, address: Any, offset: Any) -> Any:
    """One float from memory in every lane."""
    return _repeat(b, _load(b, b.add(address, offset), _f32), ROWS)


_MULTIPLY_ADD = "llvm.fmuladd.v16f32"


@operation(FLOATS, FLOATS, FLOATS, FLOATS)
def multiply_add(b: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z, rounded once where the machine can."""
    return _call(b, _MULTIPLY_ADD, FLOATS.llvm, x, y, z)


@operation(FLOATS, INTS)
def to_floats(b: Any, x: Any) -> Any:
    return b.sitofp(x, FLOATS.llvm)


# 1.5 * 2**23: adding it leaves the nearest integer, ties to even, in the low mantissa bits.
_ROUNDER = 12582912.0


@operation(INTS, FLOATS)
def round_to_ints(b: Any, x: Any) -> Any:
    """The nearest integers, ties to even, for |x| up to 2**22; any bits outside that."""
    shifted = b.bitcast(b.fadd(x, _splat(FLOATS.llvm, _ROUNDER)), INTS.llvm)
    return b.sub(shifted, _splat(INTS.llvm, 0x4B400000))


@operation(types.int32, INTS)
def sum_ints(b: Any, x: Any) -> Any:
    return _call(b, "llvm.vector.reduce.add.v16i32", _i32, x)


@operation(types.float32, FLOATS)
def sum_floats(b: Any, x: Any) -> Any:
    """Pairwise, so that every variant rounds alike."""
    while x.type.count > 1:
        x = b.fadd(*_slices(b, x, x.type.count // 2))
    return b.extract_element(x, _i32(0))


def _clear_sign(b: Any, x: Any) -> Any:
    bits = b.and_(b.bitcast(x, INTS.llvm), _splat(INTS.llvm, 0x7FFFFFFF))
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
    return b.bitcast(_call(b, "llvm.vector.reduce.smax.v16i32", _i32, bits), _f32)


@operation(types.float32, FLOATS)
def largest(b: Any, x: Any) -> Any:
    while x.type.count > 1:
        low, high = _slices(b, x, x.type.count // 2)
        x = b.select(b.fcmp_ordered(">", low, high), low, high)
    return b.extract_element(x, _i32(0))


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
    top, bottom = _splat(x.type, _EXP_LIMIT), _splat(x.type, -_EXP_LIMIT)
    vanishes = b.fcmp_ordered("<", x, bottom)
    x = b.select(b.fcmp_ordered(">", x, top), top, b.select(vanishes, bottom, x))
    shifted = b.fadd(b.fmul(x, _splat(x.type, _LOG2_E)), _splat(x.type, _ROUNDER))
    power = b.sub(b.bitcast(shifted, INTS.llvm), _splat(INTS.llvm, 0x4B400000))
    rest, count = x, b.fsub(shifted, _splat(x.type, _ROUNDER))
    for part in _LN2:
        rest = _call(b, _MULTIPLY_ADD, x.type, count, _splat(x.type, -part), rest)
    value = _splat(x.type, _EXP_TERMS[0])
    for term in _EXP_TERMS[1:]:
        value = _call(b, _MULTIPLY_ADD, x.type, value, rest, _splat(x.type, term))
    scale = b.shl(b.add(power, _splat(INTS.llvm, 127)), _splat(INTS.llvm, 23))
    value = b.fmul(value, b.bitcast(scale, x.type))
    return b.select(vanishes, _splat(x.type, 0.0), value)


@operation(FLOATS, FLOATS, types.int64, types.int64)
def only_between(b: Any, x: Any, low: Any, high: Any) -> Any:
    """Lanes from `low` up to `high`; -1e30 in the others."""
    below, kept = _lanes_below(b, low), _lanes_below(b, high)
    kept = b.and_(kept, b.not_(below))
    return b.select(kept, x, _splat(x.type, -1e30))


@operation(types.float32, types.float32)
def square_root(b: Any, x: Any) -> Any:
    return _call(b, "llvm.sqrt.f32", _f32, x)


@operation(FLOATS, types.int64, types.int64)
def load_halves(b: Any, address: Any, offset: Any) -> Any:
    """16 fp16 numbers as floats."""
    address = b.add(address, offset)
    if VARIANT.dot != "portable":
        return b.fpext(_load(b, address, _HALVES), FLOATS.llvm)
    # Without a conversion instruction: put exponent and mantissa in place, then rescale by 2**112,
    # which also makes subnormals right. Infinities and NaN, which no scale is, are not kept.
    bits = b.zext(_load(b, address, ir.VectorType(_i16, ROWS)), INTS.llvm)
    sign = b.shl(b.and_(bits, _splat(INTS.llvm, 0x8000)), _splat(INTS.llvm, 16))
    rest = b.shl(b.and_(bits, _splat(INTS.llvm, 0x7FFF)), _splat(INTS.llvm, 13))
    number = b.fmul(b.bitcast(rest, FLOATS.llvm), _splat(FLOATS.llvm, 2.0**112))
    return b.bitcast(b.or_(b.bitcast(number, INTS.llvm), sign), FLOATS.llvm)


# Weight codes.


def _four_for_all(b: Any, address: Any, offset: Any) -> Any:
    """Four bytes from memory, the same for every row."""
    return b.bitcast(_repeat(b, _load(b, b.add(address, offset), _i32), ROWS), BYTES.llvm)


@operation(BYTES, BYTES)
def low_nibbles(b: Any, codes: Any) -> Any:
    return b.and_(codes, _splat(BYTES.llvm, 15))


@operation(BYTES, BYTES)
def high_nibbles(b: Any, codes: Any) -> Any:
    wide = b.lshr(b.bitcast(codes, SHORTS.llvm), _splat(SHORTS.llvm, 4))
    return b.and_(b.bitcast(wide, BYTES.llvm), _splat(BYTES.llvm, 15))


def _code(shift: int) -> Any:
    @operation(FLOATS, BYTES)
    def code(b: Any, codes: Any) -> Any:
        """One of each row's four unsigned bytes, as floats."""
        ints = b.lshr(b.bitcast(codes, INTS.llvm), _splat(INTS.llvm, shift))
        return b.sitofp(b.and_(ints, _splat(INTS.llvm, 255)), FLOATS.llvm)

    return code


code_0, code_1, code_2, code_3 = (_code(shift) for shift in (0, 8, 16, 24))


# Dot products of four bytes, unsigned by signed, per row. A sum is SHORTS while it still fits
# 16 bits (eight products of a nibble and a byte do: 8 * 2 * 15 * 127 < 2**15), else INTS.


def _bytes_in_shorts(b: Any, x: Any, extend: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    """Even and odd bytes as 16-bit numbers."""
    shorts, eight = b.bitcast(x, SHORTS.llvm), _splat(SHORTS.llvm, 8)
    return extend(b.shl(shorts, eight), eight), extend(shorts, eight)


def _pairs_portable(b: Any, weights: Any, x: Any, *, signed: bool) -> Any:
    """Sums of two byte products as shorts."""
    w_even, w_odd = _bytes_in_shorts(b, weights, b.ashr if signed else b.lshr)
    x_even, x_odd = _bytes_in_shorts(b, x, b.ashr)
    return b.add(b.mul(w_even, x_even), b.mul(w_odd, x_odd))


def _shorts_to_ints_portable(b: Any, x: Any) -> Any:
    ints, sixteen = b.bitcast(x, INTS.llvm), _splat(INTS.llvm, 16)
    return b.add(b.ashr(b.shl(ints, sixteen), sixteen), b.ashr(ints, sixteen))


def _pairs_avx2(b: Any, weights: Any, x: Any) -> Any:
    shorts = ir.VectorType(_i16, 16)

    def emit(w: Any, x: Any) -> Any:
        return _call(b, "llvm.x86.avx2.pmadd.ub.sw", shorts, w, x)

    return _piecewise(b, emit, 2, weights, x)


def _shorts_to_ints_avx2(b: Any, x: Any) -> Any:
    ints = ir.VectorType(_i32, 8)

    def emit(x: Any) -> Any:
        return _call(b, "llvm.x86.avx2.pmadd.wd", ints, x, _splat(x.type, 1))

    return _piecewise(b, emit, 2, x)


def _byte_dot_avx2(b: Any, total: Any, codes: Any, x: Any) -> Any:
    # pmaddubsw saturates on full bytes, so move the sign of the weight over to the activation:
    # |w| * (sign(w) * x) sums to at most 2 * 128 * 127 < 2**15.
    weights = b.xor(codes, _splat(BYTES.llvm, -128))
    magnitude = _call(b, "llvm.abs.v64i8", BYTES.llvm, weights, ir.IntType(1)(0))

    def emit(x: Any, w: Any) -> Any:
        return _call(b, "llvm.x86.avx2.psign.b", x.type, x, w)

    signed = _piecewise(b, emit, 2, x, weights)
    return b.add(total, _shorts_to_ints_avx2(b, _pairs_avx2(b, magnitude, signed)))


def _byte_dot_portable(b: Any, total: Any, codes: Any, x: Any) -> Any:
    weights = b.xor(codes, _splat(BYTES.llvm, -128))
    return b.add(total, _shorts_to_ints_portable(b, _pairs_portable(b, weights, x, signed=True)))


def _dot_vnni(b: Any, total: Any, codes: Any, x: Any) -> Any:
    bits = 512 if VARIANT.dot == "vnni512" else 256

    def emit(total: Any, w: Any, x: Any) -> Any:
        return _call(b, f"llvm.x86.avx512.vpdpbusd.{bits}", total.type, total, w, x)

    return _piecewise(b, emit, 512 // bits, total, codes, x)


NEON_DOT = "leangen_neon_sdot"
"""Stands for LLVM's intrinsic until `build` retargets the module: Numba compiles for its host."""


def _dot_neon(b: Any, total: Any, weights: Any, x: Any) -> Any:
    def emit(total: Any, w: Any, x: Any) -> Any:
        call = _call(b, NEON_DOT, total.type, total, w, x)
        for attribute in ("nounwind", "readnone"):
            call.callee.attributes.add(attribute)
        return call

    return _piecewise(b, emit, 4, total, weights, x)


def _byte_dot_neon(b: Any, total: Any, codes: Any, x: Any) -> Any:
    return _dot_neon(b, total, b.xor(codes, _splat(BYTES.llvm, -128)), x)


_SHORT_SUMS = VARIANT.dot in ("avx2", "portable")
_TO_INTS = _shorts_to_ints_avx2 if VARIANT.dot == "avx2" else _shorts_to_ints_portable
_BYTE_DOT = {
    "avx2": _byte_dot_avx2,
    "portable": _byte_dot_portable,
    "vnni256": _dot_vnni,
    "vnni512": _dot_vnni,
    "neon": _byte_dot_neon,
}[VARIANT.dot]
SUMS = SHORTS if _SHORT_SUMS else INTS


@operation(SUMS, types.int32)
def nibble_start(b: Any, start: Any) -> Any:
    """A sum of products that ends up `start` higher."""
    return _splat(SHORTS.llvm, 0) if _SHORT_SUMS else _repeat(b, start, ROWS)


@operation(SUMS, SUMS, BYTES, types.int64, types.int64)
def nibble_dot(b: Any, total: Any, codes: Any, address: Any, offset: Any) -> Any:
    """Add four products per row, codes 0 to 15, at most eight times per sum.

    The four activations, from memory, are the same for every row.
    """
    x = _four_for_all(b, address, offset)
    if VARIANT.dot == "avx2":
        return b.add(total, _pairs_avx2(b, codes, x))
    if VARIANT.dot == "portable":
        return b.add(total, _pairs_portable(b, codes, x, signed=False))
    if VARIANT.dot == "neon":
        return _dot_neon(b, total, codes, x)
    return _dot_vnni(b, total, codes, x)


@operation(INTS, SUMS, types.int32)
def nibble_finish(b: Any, total: Any, start: Any) -> Any:
    return b.add(_TO_INTS(b, total), _repeat(b, start, ROWS)) if _SHORT_SUMS else total


@operation(INTS, types.int32)
def byte_start(b: Any, start: Any) -> Any:
    """A sum of products of (code - 128); `start` is -128 times the sum of the activations."""
    unsigned = VARIANT.dot.startswith("vnni")
    return _repeat(b, start, ROWS) if unsigned else _splat(INTS.llvm, 0)


@operation(INTS, INTS, BYTES, types.int64, types.int64)
def byte_dot(b: Any, total: Any, codes: Any, address: Any, offset: Any) -> Any:
    """Add four products per row, codes 0 to 255, of activations from memory."""
    return _BYTE_DOT(b, total, codes, _four_for_all(b, address, offset))


# Operators of FLOATS and INTS.

_OPERATORS = {
    operator.add: ("fadd", "add"),
    operator.sub: ("fsub", "sub"),
    operator.mul: ("fmul", "mul"),
    operator.truediv: ("fdiv", None),
}


def _define_operator(function: Any, names: tuple[str, str | None]) -> None:
    @infer_global(function)
    class Typing(AbstractTemplate):  # type: ignore[misc]
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and args[0] == args[1] and args[0] in (FLOATS, INTS):
                return signature(args[0], *args)
            return None

    for kind, name in zip((FLOATS, INTS), names, strict=True):
        if name is not None:

            @lower_builtin(function, kind, kind)
            def lower(context: Any, builder: Any, sig: Any, args: Any, name: str = name) -> Any:
                return getattr(builder, name)(*args)


for _function, _names in _OPERATORS.items():
    _define_operator(_function, _names)
