"""Typed GPU instructions for Numba: memory by address, halves, shuffles, tensor-core products.

Numba has no 16-byte loads, no packed halves as plain registers and no `mma`, so each function here
is one PTX instruction or a short fixed sequence, in an inline assembly of its own. Addresses are
int64, as on the CPU, registers of packed values uint32. Under NUMBA_ENABLE_CUDASIM=1 the same names
are Python functions on the machine's own memory, from `simulated`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from numba import config

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel to compile."""

    make: partial[Any]
    letters: str
    """Of its arguments: i int64, f float32."""
    threads: int
    """Most in a block."""
    blocks: int = 2
    """On a multiprocessor, at least: bounds the registers of a thread."""

    @property
    def source(self) -> str:
        """The module that it is written in."""
        return str(self.make.args[0].__module__).rpartition(".")[2]


def _make(
    result: str, arguments: str, text: str, *, memory: bool = False, fixed: bool = False
) -> Any:
    """An intrinsic: result and argument letters (r uint32, f float32, l int64, i int32), and PTX.

    `memory`: it writes, or reads what this kernel has written; `fixed`: all lanes of a warp meet in
    it, so that the compiler must leave it where it is.
    """
    from llvmlite import ir
    from numba import types
    from numba.core.extending import intrinsic

    numba_types = {
        "r": types.uint32, "i": types.int32, "f": types.float32, "l": types.int64,
        "v": types.void,
    }  # fmt: skip
    llvm_types = {
        "r": ir.IntType(32), "i": ir.IntType(32), "f": ir.FloatType(), "l": ir.IntType(64),
        "v": ir.VoidType(),
    }  # fmt: skip
    registers = {"r": "r", "i": "r", "f": "f", "l": "l"}
    many = len(result) > 1
    alike = len(set(result)) == 1
    kinds = [numba_types[letter] for letter in result]
    returned = kinds[0]
    raw = llvm_types[result[0]]
    if many:
        returned = types.UniTuple(kinds[0], len(result)) if alike else types.Tuple(kinds)
        raw = ir.LiteralStructType([llvm_types[letter] for letter in result])
    outputs = [] if result == "v" else [f"={registers[letter]}" for letter in result]
    constraints = [*outputs, *(registers[letter] for letter in arguments)]
    if memory:
        constraints.append("~{memory}")
    wanted = [numba_types[letter] for letter in arguments]

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        function = ir.FunctionType(raw, [llvm_types[letter] for letter in arguments])
        made = builder.asm(function, text, ",".join(constraints), values, memory or fixed)
        if result == "v":
            return context.get_dummy_value()
        if not many:
            return made
        whole = ir.ArrayType(raw.elements[0], len(result)) if alike else raw
        value = ir.Constant(whole, ir.Undefined)
        for at in range(len(result)):
            value = builder.insert_value(value, builder.extract_value(made, at), at)
        return value

    names = [f"a{at}" for at in range(len(arguments))]
    scope: dict[str, Any] = {
        "signature": returned(*wanted), "codegen": codegen,
    }  # fmt: skip
    # Numba reads the number of arguments off the function.
    exec(f"def f({', '.join(['context', *names])}): return signature, codegen", scope)
    return intrinsic(scope["f"])


def _sequence(*lines: str, registers: str = "") -> str:
    declared = f".reg .b32 {registers}; " if registers else ""
    return "{ " + declared + " ".join(f"{line};" for line in lines) + " }"


_ZERO = "0f00000000"
_AND_OR = "0xea"  # lop3 table of (a & b) | c


def _halves4(center: int) -> str:
    """Eight nibbles as four pairs of halves, the center taken off, each step exact.

    A nibble in the mantissa of 1024 is 1024 + q, one four bits up is 1024 + 16 q. Pairs are nibbles
    (0, 4), (1, 5), (2, 6), (3, 7): `tiles` packs them so.
    """
    low, high = 0x6400 + center, {8: 0xD480, 0: 0xD400}[center]  # 1024 + center, -64 - center
    return _sequence(
        "mov.b32 m, 0x64006400", f"mov.b32 l, 0x{low:04x}{low:04x}", "mov.b32 s, 0x2c002c00",
        f"mov.b32 h, 0x{high:04x}{high:04x}", "shr.u32 t, $4, 8",
        f"lop3.b32 a, $4, 0x000f000f, m, {_AND_OR}", f"lop3.b32 b, $4, 0x00f000f0, m, {_AND_OR}",
        f"lop3.b32 c, t, 0x000f000f, m, {_AND_OR}", f"lop3.b32 d, t, 0x00f000f0, m, {_AND_OR}",
        "sub.f16x2 $0, a, l", "fma.rn.f16x2 $1, b, s, h",
        "sub.f16x2 $2, c, l", "fma.rn.f16x2 $3, d, s, h",
        registers="m, l, s, h, t, a, b, c, d",
    )  # fmt: skip


# A block of 32 weights of 16 rows times 8 tokens on the tensor core, then its scales.
# a16: $4-$11 weights as halves, $12-$15 activations, $16 $17 scales of rows g and g + 8, the sums.
_ADD_A16 = "".join((
    "{ .reg .f32 a, b, c, d; ",
    f"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {{a, b, c, d}}, {{$4, $5, $6, $7}},"
    f" {{$12, $13}}, {{{', '.join([_ZERO] * 4)}}}; ",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {a, b, c, d}, {$8, $9, $10, $11},"
    " {$14, $15}, {a, b, c, d}; ",
    "fma.rn.f32 $0, a, $16, $18; fma.rn.f32 $1, b, $16, $19; ",
    "fma.rn.f32 $2, c, $17, $20; fma.rn.f32 $3, d, $17, $21; }",
))  # fmt: skip
# a8: $4-$7 weights, $8 $9 activations, $10 $11 what to start from for tokens 2t and 2t + 1, $12 $13
# scales of rows g and g + 8, $14 $15 of the tokens, the sums.
_ADD_A8 = "".join((
    "{ .reg .s32 a, b, c, d; .reg .f32 x, s; ",
    "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {a, b, c, d}, {$4, $5, $6, $7}, {$8, $9},"
    " {$10, $11, $10, $11}; ",
    *(
        f"cvt.rn.f32.s32 x, {letter}; mul.rn.f32 s, {row}, {token}; "
        f"fma.rn.f32 ${at}, x, s, {sum_}; "
        for at, (letter, row, token, sum_) in enumerate((
            ("a", "$12", "$14", "$16"), ("b", "$12", "$15", "$17"),
            ("c", "$13", "$14", "$18"), ("d", "$13", "$15", "$19"),
        ))
    ),
    "}",
))  # fmt: skip


def _float(value: float) -> str:
    return f"0f{struct.unpack('>I', struct.pack('>f', value))[0]:08x}"


_SIGMOID = (  # $0 = $1 / (1 + 2**t)
    "ex2.approx.f32 t, t", f"add.f32 t, t, {_float(1)}", "div.rn.f32 $0, $1, t",
)  # fmt: skip
_SILU = (f"mul.f32 t, $1, {_float(-LOG2_E)}", *_SIGMOID)
_GELU_TANH = (  # x times the sigmoid of 2 sqrt(2 / pi) (x + 0.044715 x**3)
    f"mul.f32 t, $1, {_float(0.044715)}", "mul.f32 t, t, $1", "fma.rn.f32 t, t, $1, $1",
    f"mul.f32 t, t, {_float(-2 * math.sqrt(2 / math.pi) * LOG2_E)}", *_SIGMOID,
)  # fmt: skip


def _define() -> dict[str, Any]:
    read = "ld.global.nc"
    # Weights pass through once: not kept in L1, where they would push out the activations.
    stream = "ld.global.nc.L1::no_allocate"
    return {
        "stream16": _make("rrrr", "l", f"{stream}.v4.u32 {{$0, $1, $2, $3}}, [$4];"),
        "stream8": _make("rr", "l", f"{stream}.v2.u32 {{$0, $1}}, [$2];"),
        "read16": _make("rrrr", "l", f"{read}.v4.u32 {{$0, $1, $2, $3}}, [$4];"),
        "read8": _make("rr", "l", f"{read}.v2.u32 {{$0, $1}}, [$2];"),
        "read4": _make("r", "l", f"{read}.u32 $0, [$1];"),
        "read_scale_sum": _make("fi", "l", f"{read}.v2.b32 {{$0, $1}}, [$2];"),
        "read_scales_sums": _make("fifi", "l", f"{read}.v4.b32 {{$0, $1, $2, $3}}, [$4];"),
        "read16f": _make("ffff", "l", f"{read}.v4.f32 {{$0, $1, $2, $3}}, [$4];"),
        "read4f": _make("f", "l", f"{read}.f32 $0, [$1];"),
        "write16": _make("v", "lrrrr", "st.global.v4.u32 [$0], {$1, $2, $3, $4};", memory=True),
        "write8": _make("v", "lrr", "st.global.v2.u32 [$0], {$1, $2};", memory=True),
        "write4": _make("v", "lr", "st.global.u32 [$0], $1;", memory=True),
        "write1": _make("v", "lr", "st.global.u8 [$0], $1;", memory=True),
        "write4f": _make("v", "lf", "st.global.f32 [$0], $1;", memory=True),
        "write4i": _make("v", "li", "st.global.s32 [$0], $1;", memory=True),
        "write2h": _make(
            "v", "lf", "{ .reg .b16 h; cvt.rn.f16.f32 h, $1; st.global.b16 [$0], h; }", memory=True
        ),
        "halves_of_nibbles": _make("rrrr", "r", _halves4(8)),
        "halves_of_nibbles_0": _make("rrrr", "r", _halves4(0)),
        # Bytes 0 and 2, then 1 and 3, as halves; 1024 + code less 1152.
        "halves_of_bytes": _make("rr", "r", _sequence(
            "mov.b32 m, 0x64646464", "mov.b32 l, 0x64806480",
            "prmt.b32 a, $2, m, 0x4240", "prmt.b32 b, $2, m, 0x4341",
            "sub.f16x2 $0, a, l", "sub.f16x2 $1, b, l", registers="m, l, a, b",
        )),
        "bytes_of_nibbles": _make("rr", "r", _sequence(
            "and.b32 $0, $2, 0x0f0f0f0f", "shr.u32 t, $2, 4", "and.b32 $1, t, 0x0f0f0f0f",
            registers="t")),
        "byte": _make("i", "ri", _sequence(
            "shl.b32 t, $2, 3", "bfe.u32 $0, $1, t, 8", registers="t")),
        "floats_of_halves": _make("ff", "r", "{ .reg .b16 l, h; mov.b32 {l, h}, $2;"
                                  " cvt.f32.f16 $0, l; cvt.f32.f16 $1, h; }"),
        "half_pair": _make("r", "ff", "{ .reg .b16 l, h; cvt.rn.f16.f32 l, $1;"
                           " cvt.rn.f16.f32 h, $2; mov.b32 $0, {l, h}; }"),
        "floats_of_bytes": _make("ffff", "r", "{ .reg .s32 t; .reg .b32 w; mov.b32 w, $4;"
            + "".join(f" bfe.s32 t, w, {8 * i}, 8; cvt.rn.f32.s32 ${i}, t;" for i in range(4))
            + " }"),
        "as_float": _make("f", "r", "mov.b32 $0, $1;"),
        "as_bits": _make("r", "f", "mov.b32 $0, $1;"),
        "to_float": _make("f", "i", "cvt.rn.f32.s32 $0, $1;"),
        "as_word": _make("r", "i", "mov.b32 $0, $1;"),
        "to_int": _make("i", "r", "mov.b32 $0, $1;"),
        "silu": _make("f", "f", _sequence(*_SILU, registers="t")),
        "gelu_tanh": _make("f", "f", _sequence(*_GELU_TANH, registers="t")),
        "nearest": _make("i", "f", "cvt.rni.s32.f32 $0, $1;"),
        "bytes_of": _make("r", "iiii", _sequence(
            "and.b32 a, $1, 255", "shl.b32 b, $2, 8", "and.b32 b, b, 0xff00",
            "shl.b32 c, $3, 16", "and.b32 c, c, 0xff0000", "shl.b32 d, $4, 24",
            "or.b32 a, a, b", "or.b32 c, c, d", "or.b32 $0, a, c", registers="a, b, c, d")),
        "most": _make("f", "ff", "max.f32 $0, $1, $2;"),
        "absolute": _make("f", "f", "abs.f32 $0, $1;"),
        "fused": _make("f", "fff", "fma.rn.f32 $0, $1, $2, $3;"),
        "power2": _make("f", "f", "ex2.approx.f32 $0, $1;"),
        "inverse_root": _make("f", "f", "{ .reg .f32 t; sqrt.rn.f32 t, $1; rcp.rn.f32 $0, t; }"),
        "quotient": _make("f", "ff", "div.rn.f32 $0, $1, $2;"),
        # The power of two at or below |x|, by its exponent bits.
        "exponent": _make("f", "f", "{ .reg .b32 t; mov.b32 t, $1; and.b32 t, t, 0x7f800000;"
                          " mov.b32 $0, t; }"),
        "across": _make(
            "f", "fi", "shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", fixed=True),
        "dot8": _make("f", "f" * 16, _sequence(
            "mul.rn.f32 $0, $1, $9", *(f"fma.rn.f32 $0, ${i}, ${i + 8}, $0" for i in range(2, 9)),
        )),
        "add8": _make("f" * 8, "f" * 17, _sequence(
            *(f"fma.rn.f32 ${i}, ${i + 8}, $16, ${i + 17}" for i in range(8)))),
        "add_block_a16": _make("ffff", "r" * 12 + "ff" + "ffff", _ADD_A16, fixed=True),
        "add_block_a8": _make("ffff", "r" * 6 + "ii" + "ff" + "ff" + "ffff", _ADD_A8, fixed=True),
    }  # fmt: skip


def _chosen() -> dict[str, Callable[..., Any]]:
    if config.ENABLE_CUDASIM:
        from leangen_kernels.cuda import simulated

        return simulated.INSTRUCTIONS
    return _define()


_CHOSEN = _chosen()
stream16: Any = _CHOSEN["stream16"]
stream8: Any = _CHOSEN["stream8"]
read16: Any = _CHOSEN["read16"]
read8: Any = _CHOSEN["read8"]
read4: Any = _CHOSEN["read4"]
read_scale_sum: Any = _CHOSEN["read_scale_sum"]
read_scales_sums: Any = _CHOSEN["read_scales_sums"]
read16f: Any = _CHOSEN["read16f"]
read4f: Any = _CHOSEN["read4f"]
write16: Any = _CHOSEN["write16"]
write8: Any = _CHOSEN["write8"]
write4: Any = _CHOSEN["write4"]
write1: Any = _CHOSEN["write1"]
write4f: Any = _CHOSEN["write4f"]
write4i: Any = _CHOSEN["write4i"]
write2h: Any = _CHOSEN["write2h"]
halves_of_nibbles: Any = _CHOSEN["halves_of_nibbles"]
halves_of_nibbles_0: Any = _CHOSEN["halves_of_nibbles_0"]
halves_of_bytes: Any = _CHOSEN["halves_of_bytes"]
bytes_of_nibbles: Any = _CHOSEN["bytes_of_nibbles"]
byte: Any = _CHOSEN["byte"]
floats_of_halves: Any = _CHOSEN["floats_of_halves"]
half_pair: Any = _CHOSEN["half_pair"]
floats_of_bytes: Any = _CHOSEN["floats_of_bytes"]
as_float: Any = _CHOSEN["as_float"]
as_bits: Any = _CHOSEN["as_bits"]
to_float: Any = _CHOSEN["to_float"]
as_word: Any = _CHOSEN["as_word"]
to_int: Any = _CHOSEN["to_int"]
silu: Any = _CHOSEN["silu"]
gelu_tanh: Any = _CHOSEN["gelu_tanh"]
nearest: Any = _CHOSEN["nearest"]
bytes_of: Any = _CHOSEN["bytes_of"]
most: Any = _CHOSEN["most"]
absolute: Any = _CHOSEN["absolute"]
fused: Any = _CHOSEN["fused"]
power2: Any = _CHOSEN["power2"]
inverse_root: Any = _CHOSEN["inverse_root"]
quotient: Any = _CHOSEN["quotient"]
exponent: Any = _CHOSEN["exponent"]
across: Any = _CHOSEN["across"]
dot8: Any = _CHOSEN["dot8"]
add8: Any = _CHOSEN["add8"]
add_block_a16: Any = _CHOSEN["add_block_a16"]
add_block_a8: Any = _CHOSEN["add_block_a8"]
