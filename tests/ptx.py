"""PTX as text becomes instructions, and what each does to the registers of many threads at once.

A register is an array with an element for each thread, of unsigned integers as wide as it is; an
instruction looks at them as its type says. Semantics are those of the PTX ISA manual for what our
kernels are compiled to; anything else raises `Unknown`. `ptx_card` runs them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

WIDTHS = {"pred": np.bool_, "8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
DTYPES = {
    f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}")
    for kind, letter in (("u", "u"), ("b", "u"), ("s", "i"))
    for bits in (8, 16, 32, 64)
}
DTYPES |= {f"f{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)}
DTYPES |= {"pred": np.dtype(bool), "f16x2": np.dtype("u4")}  # fmt: skip


class Unknown(Exception):
    """PTX that this reader knows nothing of."""


@dataclass(frozen=True, slots=True)
class Address:
    """[base + offset]; the base is a register or a name."""

    base: str
    offset: int


@dataclass(frozen=True, slots=True)
class Number:
    """An immediate; of a float the bits, as it is written."""

    value: int
    is_float: bool = False


Operand = str | Number | Address | tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Instruction:
    """One of a kernel's."""

    parts: tuple[str, ...]
    """Its opcode, between the dots."""
    operands: tuple[Operand, ...]
    guard: str = ""
    """The predicate under which it runs."""
    inverted: bool = False
    text: str = ""

    @property
    def kind(self) -> np.dtype[Any]:
        """The type of its operands."""
        return DTYPES[self.parts[-1]]


@dataclass
class Kernel:
    """One entry of a PTX file."""

    name: str
    parameters: dict[str, str]
    """Their types by name, in order."""
    most_threads: int
    shared: dict[str, int] = field(default_factory=dict)
    """Where each of its arrays in shared memory begins."""
    shared_bytes: int = 0
    registers: dict[str, type] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


_ENTRY = re.compile(r"\.visible\s+\.entry\s+(\w+)\s*\(([^)]*)\)([^{]*)\{")
_SHARED = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+(\w+)\[(\d+)\]\s*;")
_REGISTER = re.compile(r"\.reg\s+\.(\w+)\s+([^;]+)")


def read(text: str) -> dict[str, Kernel]:
    """The entries of a PTX file by name. Raises Unknown on a statement that it cannot read."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    shared = {name: (int(align), int(size)) for align, name, size in _SHARED.findall(text)}
    kernels = {}
    for found in _ENTRY.finditer(text):
        body = text[found.end() : _closing(text, found.end())]
        most = re.search(r"\.maxntid\s+(\d+)", found[3])
        parameters = {}
        for line in filter(None, map(str.strip, found[2].split(","))):
            _, kind, name = line.split()
            parameters[name] = kind.removeprefix(".")
        kernel = Kernel(found[1], parameters, int(most[1]) if most else 1024)
        _read_body(kernel, body)
        for name in dict.fromkeys(word for word in re.findall(r"\w+", body) if word in shared):
            align, size = shared[name]
            kernel.shared[name] = -(-kernel.shared_bytes // align) * align
            kernel.shared_bytes = kernel.shared[name] + size
        kernels[kernel.name] = kernel
    return kernels


def _closing(text: str, at: int) -> int:
    depth = 1
    while depth:
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        at += 1
    return at - 1


def _read_body(kernel: Kernel, body: str) -> None:
    scopes: list[dict[str, str]] = [{}]
    for statement in _statements(body):
        if statement == "{":
            scopes.append({})
        elif statement == "}":
            scopes.pop()
        elif statement.endswith(":"):
            kernel.labels[statement[:-1]] = len(kernel.code)
        elif declared := _REGISTER.match(statement):
            for name in _names(declared[2]):
                # Those of an inner scope get names of their own.
                own = name if len(scopes) == 1 else f"{name}@{len(kernel.registers)}"
                scopes[-1][name] = own
                kernel.registers[own] = _width(declared[1])
        elif not statement.startswith((".pragma", ".shared")):
            kernel.code.append(_instruction(statement, scopes))


def _width(kind: str) -> type:
    return WIDTHS[kind if kind == "pred" else kind.lstrip("bsuf")]


def _names(text: str) -> Iterator[str]:
    for name in map(str.strip, text.split(",")):
        if many := re.fullmatch(r"(%\w+?)<(\d+)>", name):
            yield from (f"{many[1]}{at}" for at in range(int(many[2])))
        else:
            yield name


def _statements(body: str) -> Iterator[str]:
    """Labels, scopes' braces and instructions, one at a time."""
    at = 0
    pattern = re.compile(r"\s*(?:([{}])|([\w$]+:)(?!:)|([^;]+);)")
    while found := pattern.match(body, at):
        yield next(part for part in found.groups() if part is not None).strip()
        at = found.end()
    if body[at:].strip():
        raise Unknown(body[at : at + 80])


def _instruction(statement: str, scopes: list[dict[str, str]]) -> Instruction:
    found = re.match(r"(?:@(!?)([%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.DOTALL)
    if found is None:
        raise Unknown(statement)

    def name(text: str) -> str:
        return next((scope[text] for scope in reversed(scopes) if text in scope), text)

    operands = tuple(_operand(part, name) for part in _split(found[4]))
    # L1::no_allocate and its like are hints.
    parts = tuple(part for part in found[3].split(".") if "::" not in part)
    return Instruction(parts, operands, name(found[2] or ""), found[1] == "!", statement)


def _split(text: str) -> list[str]:
    """At the commas that are outside of braces."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|[^,{}])+", text) if part.strip()]


def _operand(text: str, name: Callable[[str], str]) -> Operand:
    if text.startswith("{"):
        return tuple(_operand(part, name) for part in _split(text[1:-1]))
    if text.startswith("["):
        base, _, offset = text[1:-1].partition("+")
        return Address(name(base.strip()), int(offset or 0))
    if text.startswith("0f"):
        return Number(int(text[2:], 16), is_float=True)
    if re.match(r"-?\d", text):
        return Number(int(text, 0))
    return name(text)


def _wide(f: Callable[..., Any]) -> Callable[..., Any]:
    """A product twice as wide as its factors."""

    def run(instruction: Instruction, *values: Array) -> Array:
        wide = np.dtype(f"{instruction.kind.kind}{2 * instruction.kind.itemsize}")
        return f(*(value.astype(wide) for value in values))

    return run


def _shift(f: Callable[[Array, Array], Array]) -> Callable[..., Any]:
    """Shifts by the width or more leave the sign or nothing."""

    def run(instruction: Instruction, value: Array, by: Array) -> Array:
        bits = 8 * instruction.kind.itemsize
        whole = by >= bits
        shifted = f(value, np.where(whole, bits - 1, by).astype(value.dtype))
        if value.dtype.kind == "i":
            return shifted
        return np.where(whole, value.dtype.type(0), shifted)

    return run


def _quotient(instruction: Instruction, a: Array, b: Array) -> Array:
    if instruction.kind.kind == "f":
        return a / b
    signs = np.sign(a) * np.sign(b) if instruction.kind.kind == "i" else 1
    return (np.abs(a) // np.abs(b) * signs).astype(a.dtype)  # towards zero


def _rest(instruction: Instruction, a: Array, b: Array) -> Array:
    return np.fmod(a, b)


def _fma(instruction: Instruction, a: Array, b: Array, c: Array) -> Array:
    if instruction.parts[-1] == "f16x2":
        a, b, c = (_pairs(value) for value in (a, b, c))
        return _unpaired((a.astype(float) * b + c).astype(np.float16))
    # A product of floats is exact in double, its sum with a third rounded twice.
    return (a.astype(float) * b + c).astype(instruction.kind)


def _pairs(value: Array) -> Array:
    return np.ascontiguousarray(value).view(np.float16).reshape(-1, 2)


def _unpaired(value: Array) -> Array:
    return np.ascontiguousarray(value).view(np.uint32)[:, 0]


def _difference(instruction: Instruction, a: Array, b: Array) -> Array:
    if instruction.parts[-1] == "f16x2":
        return _unpaired(_pairs(a) - _pairs(b))
    return a - b


_COMPARED: dict[str, Callable[[Array, Array], Array]] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip


def _compare(instruction: Instruction, a: Array, b: Array) -> Array:
    if len(instruction.parts) != 3:
        raise Unknown(instruction.text)
    how = instruction.parts[1]
    if instruction.kind.kind == "f" and how.endswith("u"):  # true where one is no number
        return _COMPARED[how[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    return _COMPARED[how](a, b)


def _convert(instruction: Instruction, value: Array) -> Array:
    to = DTYPES[next(part for part in instruction.parts[1:] if part in DTYPES)]
    if value.dtype.kind == "f" and to.kind != "f":
        if "rni" not in instruction.parts:
            raise Unknown(instruction.text)
        edges = np.iinfo(to)
        return np.nan_to_num(np.clip(np.rint(value.astype(float)), edges.min, edges.max)).astype(to)
    return value.astype(to)


def _bit_field(instruction: Instruction, value: Array, at: Array, count: Array) -> Array:
    cut = (value.view(np.uint32).astype(np.uint64) >> at.astype(np.uint64)) & (
        (np.uint64(1) << count.astype(np.uint64)) - np.uint64(1)
    )
    if instruction.kind.kind == "i":
        sign = np.uint64(1) << (count.astype(np.uint64) - np.uint64(1))
        cut = (cut ^ sign).astype(np.int64) - sign.astype(np.int64)
    return cut.astype(instruction.kind)


def _insert(instruction: Instruction, field: Array, into: Array, at: Array, count: Array) -> Array:
    mask = (np.uint64(1) << count.astype(np.uint64)) - np.uint64(1)
    mask, placed = mask << at.astype(np.uint64), field.astype(np.uint64) << at.astype(np.uint64)
    return (into & ~mask | placed & mask).astype(into.dtype)


def _permute(instruction: Instruction, a: Array, b: Array, selector: Array) -> Array:
    given = np.stack([a, b], 1).view(np.uint8)  # bytes 0..7
    made = np.empty((len(a), 4), np.uint8)
    for at in range(4):
        choice = (selector >> np.uint32(4 * at)) & np.uint32(15)
        if (choice > 7).any():
            raise Unknown(f"sign bits: {instruction.text}")
        made[:, at] = given[np.arange(len(a)), choice]
    return made.view(np.uint32)[:, 0]


def _logic(instruction: Instruction, a: Array, b: Array, c: Array, table: Array) -> Array:
    made = np.zeros_like(a)
    for row in range(8):
        if int(table[0]) >> row & 1:
            made |= (
                (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
            )  # fmt: skip
    return made


def _plain(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda instruction, *values: f(*values)


COMPUTED: dict[str, Callable[..., Any]] = {
    "mov": _plain(lambda a: a), "not": _plain(np.invert), "neg": _plain(np.negative),
    "abs": _plain(np.abs), "add": _plain(np.add), "sub": _difference, "mul": _plain(np.multiply),
    "mul.wide": _wide(np.multiply), "div": _quotient, "rem": _rest, "fma": _fma,
    "min": _plain(np.fmin), "max": _plain(np.fmax), "and": _plain(np.bitwise_and),
    "or": _plain(np.bitwise_or), "xor": _plain(np.bitwise_xor), "shl": _shift(np.left_shift),
    "shr": _shift(np.right_shift), "setp": _compare, "cvt": _convert, "bfe": _bit_field,
    "bfi": _insert, "prmt": _permute, "lop3": _logic,
    "copysign": _plain(lambda a, b: np.copysign(b, a)),
    "selp": _plain(lambda a, b, chosen: np.where(chosen, a, b)), "ex2": _plain(np.exp2),
    "rcp": _plain(lambda a: np.float32(1) / a), "sqrt": _plain(np.sqrt),
}  # fmt: skip


def operand_kinds(instruction: Instruction) -> list[np.dtype[Any]]:
    """Of what type each operand after the first is read."""
    name, kind = instruction.parts[0], instruction.kind
    count = len(instruction.operands) - 1
    if name == "selp":
        return [kind, kind, DTYPES["pred"]]
    if name in ("shl", "shr"):
        return [kind, DTYPES["u32"]]
    if name == "bfe":
        return [kind, DTYPES["u32"], DTYPES["u32"]]
    if name == "bfi":
        return [kind, kind, DTYPES["u32"], DTYPES["u32"]]
    return [kind] * count


UNREAD = {"hi", "rz", "rm", "rp", "sat", "cc"}
"""What would change a result and nothing here looks at."""

_LANES = np.arange(32)
_GROUP, _THREAD = _LANES >> 2, _LANES & 3


def product(instruction: Instruction, a: Array, b: Array, c: Array) -> Array:
    """`mma.sync` of warps: registers [warps, 32, 4], [warps, 32, 2], [warps, 32, 4].

    Which lane holds what is as the ISA manual's figures of m16n8k16 and m16n8k32 have it.
    """
    shape, kinds = instruction.parts[3], instruction.parts[-4:]
    if (shape, kinds[1:3]) == ("m16n8k16", ("f16", "f16")):
        of_a, of_b, made = np.float16, np.float16, np.float32
    elif (shape, kinds[1:3]) == ("m16n8k32", ("u8", "s8")):
        of_a, of_b, made = np.uint8, np.int8, np.int32
    else:
        raise Unknown(instruction.text)
    each = 4 // np.dtype(of_a).itemsize  # elements of a register
    depth = 8 * each
    element = np.arange(each)
    left = np.zeros((len(a), 16, depth))
    for register in range(4):
        row = _GROUP + 8 * (register & 1)
        column = _THREAD[:, None] * each + element + depth // 2 * (register >> 1)
        left[:, row[:, None], column] = _elements(a[:, :, register], of_a, each)
    right = np.zeros((len(b), depth, 8))
    for register in range(2):
        row = _THREAD[:, None] * each + element + depth // 2 * register
        right[:, row, _GROUP[:, None]] = _elements(b[:, :, register], of_b, each)
    whole = left @ right
    out = np.empty(c.shape, made)
    for register in range(4):
        row, column = _GROUP + 8 * (register >> 1), 2 * _THREAD + (register & 1)
        start = np.ascontiguousarray(c[:, :, register]).view(made)
        out[:, :, register] = whole[:, row, column] + start
    return out.view(np.uint32)


def _elements(words: Array, kind: type, each: int) -> Array:
    return np.ascontiguousarray(words).view(kind).reshape(*words.shape, each)
