"""SIMD vectors as Numba types, and what emits LLVM instructions for them.

A vector has 16 lanes, one for each weight row of a group: FLOATS and INTS hold one number per row,
BYTES four bytes per row, SHORTS two 16-bit numbers per row. LLVM splits these to the width of the
machine.
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

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
POINTER = ir.PointerType()


class Vector(types.Type):  # type: ignore[misc]
    """A Numba type held in one LLVM vector."""

    def __init__(self, name: str, element: ir.Type, count: int) -> None:
        self.llvm = ir.VectorType(element, count)
        super().__init__(name=name)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, kind.llvm)


FLOATS = Vector("floats", F32, ROWS)
INTS = Vector("ints", I32, ROWS)
SHORTS = Vector("shorts", I16, 2 * ROWS)
BYTES = Vector("bytes", I8, 4 * ROWS)
HALVES = ir.VectorType(F16, ROWS)

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


def filled(kind: Any, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def repeated(b: Any, value: Any, count: int) -> Any:
    """A vector with `value` in every lane."""
    one = ir.VectorType(value.type, count)
    empty = ir.Constant(one, ir.Undefined)
    first = b.insert_element(empty, value, I32(0))
    return b.shuffle_vector(first, empty, ir.Constant(ir.VectorType(I32, count), [0] * count))


def call(b: Any, name: str, result: Any, *args: Any) -> Any:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), args)


def slices(b: Any, vector: Any, count: int) -> list[Any]:
    """The vector cut into pieces of `count` lanes."""
    lanes = ir.VectorType(I32, count)
    return [
        b.shuffle_vector(vector, vector, ir.Constant(lanes, list(range(start, start + count))))
        for start in range(0, vector.type.count, count)
    ]


def _join(b: Any, pieces: list[Any]) -> Any:
    while len(pieces) > 1:
        count = 2 * pieces[0].type.count
        lanes = ir.Constant(ir.VectorType(I32, count), list(range(count)))
        pieces = [
            b.shuffle_vector(low, high, lanes)
            for low, high in zip(pieces[::2], pieces[1::2], strict=True)
        ]
    return pieces[0]


def piecewise(b: Any, emit: Emit, count: int, *vectors: Any) -> Any:
    """`emit` on pieces of the vectors: `count` pieces of each, then joined."""
    pieces = [slices(b, vector, vector.type.count // count) for vector in vectors]
    return _join(b, [emit(*operands) for operands in zip(*pieces, strict=True)])


def load(b: Any, address: Any, kind: Any) -> Any:
    value = b.load(b.inttoptr(address, POINTER), typ=kind)
    value.align = 1
    return value


def store(b: Any, value: Any, address: Any) -> None:
    b.store(value, b.inttoptr(address, POINTER)).align = 1


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

            @lower_builtin(function, kind, kind)  # type: ignore[untyped-decorator]
            def lower(context: Any, builder: Any, sig: Any, args: Any, name: str = name) -> Any:
                return getattr(builder, name)(*args)


for _function, _names in _OPERATORS.items():
    _define_operator(_function, _names)
