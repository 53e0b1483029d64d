"""The one owner of the layouts of linear layers: packed weights, and activation rows made for them.

**Weights** [n, k] stand in groups of 16 rows, each group in blocks of 32 (or 16) weights along k,
one block after the other, so that a group is one sequential stream. A block holds

- the codes, in vectors of 64 bytes. A chunk, four consecutive weights of each of the 16 rows,
  fills one at 8 bits. Of fewer bits, some chunks are the low bits of a vector, and the bits above
  make up the others: `_CHUNKS` says which. At 4 bits, low nibbles are weights 8j..8j+3 and high
  nibbles 8j+4..8j+7; at 5 bits, eight chunks fill five vectors, at 6 bits four fill three;
- the scales of the 16 rows, fp16 or fp32, or signed bytes;
- with a minimum, the minima of the 16 rows in the same type.

Bytes are times a unit, as in Q4_K: before the first block and each 256 weights further there are
the units of the 16 rows, fp16, of scales and then of minima.

A weight is `scale * (code - center)` with center 2**(bits - 1), or that plus a minimum with center
0, at 8 bits 128, or `scale * table[code]` with the 16 values of nf4 or fp4. Rows and columns are
padded to whole groups and blocks with weights that are zero.

**Activation rows** are padded to whole blocks with zeros. With int8 activations a block is 32 (or
16) signed bytes, their scale (fp32) and what their sum amounts to: without a center the sum times
the scale (fp32), else `-center` times the integer sum (int32). With fp32 activations it is as many
floats and their sum times 1 or `-center`. Rows stand in tiles of as many tokens as the kernel takes
at once: the first block of each row of the tile, then the second of each, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from leangen_kernels.units import SUPER, Split, split

ROWS = 16
BLOCK = 32
BLOCKS = (16, BLOCK)
VECTOR = 4 * ROWS
"""Bytes of a vector of codes: four of each row."""
Array = np.ndarray[Any, Any]

Pieces = tuple[tuple[int, int, int], ...]
"""Where the codes of a chunk stand: the union of (vector >> shift) & mask, by vector's number."""

_CHUNKS: dict[int, tuple[Pieces, ...]] = {
    4: (((0, 0, 15),), ((0, 4, 15),)),
    5: (
        ((0, 0, 31),), ((1, 0, 31),), ((0, 5, 7), (1, 3, 24)),
        ((2, 0, 31),), ((3, 0, 31),), ((2, 5, 7), (3, 3, 24)),
        ((4, 0, 31),), ((4, 5, 7), (1, 2, 8), (3, 1, 16)),
    ),
    6: (((0, 0, 63),), ((1, 0, 63),), ((2, 0, 63),), ((0, 6, 3), (1, 4, 12), (2, 2, 48))),
    8: (((0, 0, 255),),),
}  # fmt: skip
"""By bits: the fewest chunks that fill whole vectors."""


@dataclass(frozen=True, slots=True)
class Form:
    """How one weight matrix is packed."""

    name: str
    bits: int
    minimum: bool
    wide: bool
    """Scales and minima in fp32, else fp16."""
    block: int = BLOCK
    """Weights along k that share a scale: the smallest group that the form can hold."""
    table: tuple[float, ...] = ()
    """What each code stands for, where that is not a line. Only for fp32 activations."""
    split: bool = False
    """Scales and minima as bytes times a unit."""

    @property
    def kernel(self) -> str:
        """What the kernels for it are called, which are told as they run how scales are held."""
        return self.name.removesuffix("_wide").removesuffix("_split")

    @property
    def held(self) -> int:
        """How scales and minima are held, for the kernels: 0 fp16, 1 fp32, 2 split."""
        return 2 if self.split else int(self.wide)

    @property
    def center(self) -> int:
        """The code that stands for zero or the minimum; 0 with a table, or minima below 8 bits."""
        return 0 if self.table or (self.minimum and self.bits < 8) else 1 << (self.bits - 1)

    @property
    def chunks(self) -> tuple[Pieces, ...]:
        """Where each chunk of a block stands in its vectors."""
        chunks = _CHUNKS[self.bits]
        vectors = len(chunks) * self.bits // 8
        return tuple(
            tuple((vectors * i + vector, shift, mask) for vector, shift, mask in pieces)
            for i in range(self.block // 4 // len(chunks))
            for pieces in chunks
        )

    @property
    def int8_block_bytes(self) -> int:
        """Bytes of a block of int8 activations."""
        return self.block + 8

    @property
    def fp32_block_bytes(self) -> int:
        """Bytes of a block of fp32 activations."""
        return 4 * self.block + 4

    @property
    def code_bytes(self) -> int:
        """Bytes of codes in a block of 16 rows."""
        return ROWS * self.block * self.bits // 8

    @property
    def numbers(self) -> np.dtype[Any]:
        """Of scales and minima in a block."""
        return np.dtype((np.float16, np.float32, np.int8)[self.held])

    @property
    def block_bytes(self) -> int:
        """Bytes of a block of 16 rows."""
        return self.code_bytes + ROWS * self.numbers.itemsize * (1 + self.minimum)

    @property
    def unit_bytes(self) -> int:
        """Bytes of the units of 16 rows."""
        return ROWS * 2 * (1 + self.minimum) if self.split else 0

    def packed_bytes(self, n: int, k: int) -> int:
        """Bytes of a packed matrix [n, k]."""
        blocks, units = -(-k // self.block), -(-k // SUPER)
        return -(-n // ROWS) * (blocks * self.block_bytes + units * self.unit_bytes)


# Quantiles of a normal distribution (Dettmers et al. 2023), and a 4-bit float with two bits of
# exponent and one of mantissa, as bitsandbytes and ONNX Runtime's MatMulBnb4 write them.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
_FP4 = (0.0, 5.208333333e-03, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
FP4 = (*_FP4, *(-value for value in _FP4))

FORMS = {
    form.name: form
    for form in (
        Form("q4", 4, False, False),
        Form("q4_wide", 4, False, True),
        Form("q4_min", 4, True, False),
        Form("q4_min_wide", 4, True, True),
        Form("q4_min_split", 4, True, False, split=True),
        Form("q5", 5, False, False),
        Form("q5_wide", 5, False, True),
        Form("q5_min", 5, True, False),
        Form("q5_min_wide", 5, True, True),
        Form("q5_min_split", 5, True, False, split=True),
        Form("q8", 8, False, False),
        Form("q8_wide", 8, False, True),
        Form("q8_min", 8, True, False),
        Form("q8_min_wide", 8, True, True),
        Form("q4_g16", 4, False, False, 16),
        Form("q4_g16_wide", 4, False, True, 16),
        Form("q4_min_g16", 4, True, False, 16),
        Form("q4_min_g16_wide", 4, True, True, 16),
        Form("q6_g16", 6, False, False, 16),
        Form("q6_g16_wide", 6, False, True, 16),
        Form("q6_g16_split", 6, False, False, 16, split=True),
        Form("q8_g16", 8, False, False, 16),
        Form("q8_g16_wide", 8, False, True, 16),
        Form("nf4_wide", 4, False, True, table=NF4),
        Form("fp4_wide", 4, False, True, table=FP4),
    )
}


def form_for(bits: int, scales: Array, minima: Array | None = None, block: int = BLOCK) -> Form:
    """The smallest form that holds these scales and minima, one for `block` weights.

    Without loss; but of minima in split forms the last bits of fp32 may be others, see `units`.
    Raises ValueError when there is none: 5 bits for 16, 6 bits for 32, minima for 16 above 4 bits.
    """
    return _smallest(bits, scales, minima, block)[0]


def _smallest(
    bits: int, scales: Array, minima: Array | None, block: int
) -> tuple[Form, Split | None]:
    """What `form_for` says, and of a split form what the scales and minima are split into."""
    wanted = (bits, minima is not None, block, ())
    forms = {
        form.held: form
        for form in FORMS.values()
        if (form.bits, form.minimum, form.block, form.table) == wanted
    }
    held, found = 0, None
    if not all(_fits_half(values) for values in (scales, minima) if values is not None):
        found = split(scales, minima, block) if 2 in forms else None
        held = 1 if found is None else 2
    if held in forms:
        return forms[held], found
    given = f"{bits} bits {'with' if minima is not None else 'without'} minima for {block} weights"
    expected = "4, 5 or 8 bits for 32, or 4, 6 or 8 without minima for 16"
    raise ValueError(f"no layout holds {given}: expected {expected}")


def _fits_half(values: Array) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.array_equal(values.astype(np.float16).astype(np.float32), values))


def pack(form: Form, codes: Array, scales: Array, minima: Array | None = None) -> Array:
    """Codes uint8 [n, k], scales (and minima) fp32 [n, groups] as packed bytes, uint8 1-D.

    A group of columns is any number of the form's blocks; its scale is repeated in each of them.
    Raises ValueError on shapes that do not fit together.
    """
    return _pack(form, codes, scales, minima, None)


def pack_smallest(
    bits: int, codes: Array, scales: Array, minima: Array | None = None, block: int = BLOCK
) -> tuple[Form, Array]:
    """`pack` into what `form_for` says: the form, and the bytes. Raises ValueError as they do.

    Both look for what split scales are multiples of, which takes as long as the rest: this once.
    """
    form, found = _smallest(bits, scales, minima, block)
    return form, _pack(form, codes, scales, minima, found)


def _pack(
    form: Form, codes: Array, scales: Array, minima: Array | None, found: Split | None
) -> Array:
    n, k = codes.shape
    if (minima is not None) != form.minimum:
        raise ValueError(f"form {form.name} {'needs' if form.minimum else 'takes no'} minima")
    blocks = -(-k // form.block)
    padded = np.full((-(-n // ROWS) * ROWS, blocks * form.block), _zero_code(form), np.uint8)
    padded[:n, :k] = codes
    given = [_repeated(form, each, n, k) for each in (scales, minima) if each is not None]
    units: list[Array] = []
    if form.split:
        if found is None or found[0][0].shape != given[0].shape:
            found = split(given[0], given[1] if form.minimum else None, form.block)
        if found is None:
            raise ValueError(f"form {form.name} needs bytes times an fp16 of {SUPER} weights")
        given, units = [each for each, _ in found], [unit for _, unit in found]
    parts = [_interleave(form, padded), *(_by_group(each, form.numbers) for each in given)]
    body = np.concatenate(parts, axis=-1)
    if not form.split:
        return np.ascontiguousarray(body).reshape(-1)
    heads = np.concatenate([_by_group(unit, np.dtype(np.float16)) for unit in units], axis=-1)
    per, groups = SUPER // form.block, len(body)
    pieces = []
    for i in range(heads.shape[1]):
        pieces += [heads[:, i], body[:, per * i : per * (i + 1)].reshape(groups, -1)]
    return np.concatenate(pieces, axis=1).reshape(-1)


def _zero_code(form: Form) -> int:
    return form.table.index(0.0) if form.table else form.center


def _interleave(form: Form, codes: Array) -> Array:
    """[groups, blocks, code_bytes]"""
    groups, blocks = codes.shape[0] // ROWS, codes.shape[1] // form.block
    rows = codes.view(np.uint32).reshape(groups, ROWS, blocks, form.block // 4)
    chunks = np.ascontiguousarray(rows.transpose(0, 2, 3, 1))
    vectors = np.zeros((groups, blocks, form.code_bytes // VECTOR, ROWS), np.uint32)
    for at, pieces in enumerate(form.chunks):
        for vector, shift, mask in pieces:
            vectors[:, :, vector] |= (chunks[:, :, at] & _in_four(mask)) << np.uint32(shift)
    return vectors.view(np.uint8).reshape(groups, blocks, form.code_bytes)


def _in_four(mask: int) -> np.uint32:
    """A mask of a byte for four side by side: codes are moved as words."""
    return np.uint32(0x01010101 * mask)


def _repeated(form: Form, values: Array, n: int, k: int) -> Array:
    """Values of groups of columns for each block, [n, blocks]."""
    blocks, given = -(-k // form.block), values.shape[1]
    repeat = -(-blocks // given)
    if values.shape[0] != n or -(-blocks // repeat) != given:
        raise ValueError(
            f"scales of shape {values.shape} do not fit {n} rows of {k} weights in blocks of"
            f" {form.block}: expected [{n}, groups of a multiple of {form.block} columns]"
        )
    return np.repeat(values, repeat, axis=1)[:, :blocks]


def _by_group(values: Array, kind: np.dtype[Any]) -> Array:
    """Numbers [n, count] as bytes [groups, count, those of 16 rows]."""
    n, count = values.shape
    padded = np.zeros((-(-n // ROWS) * ROWS, count), kind)
    padded[:n] = values
    by_group = padded.reshape(-1, ROWS, count).transpose(0, 2, 1)
    return np.ascontiguousarray(by_group).view(np.uint8).reshape(-1, count, ROWS * kind.itemsize)


def unpack(form: Form, packed: Array, n: int, k: int) -> tuple[Array, Array, Array | None]:
    """What `pack` was given: codes uint8 [n, k], scales and minima fp32 [n, ceil(k / block)]."""
    blocks, units = -(-k // form.block), -(-k // SUPER)
    groups = packed.reshape(-(-n // ROWS), -1)
    starts = np.arange(units) * (SUPER // form.block * form.block_bytes + form.unit_bytes)
    head = (starts[:, None] + np.arange(form.unit_bytes)).reshape(-1)
    body = np.delete(groups, head, axis=1).reshape(-1, blocks, form.block_bytes)
    vectors = np.ascontiguousarray(body[:, :, : form.code_bytes]).view(np.uint32)
    vectors = vectors.reshape(len(body), blocks, -1, ROWS)
    chunks = np.zeros((len(body), blocks, form.block // 4, ROWS), np.uint32)
    for at, pieces in enumerate(form.chunks):
        for vector, shift, mask in pieces:
            chunks[:, :, at] |= (vectors[:, :, vector] >> np.uint32(shift)) & _in_four(mask)
    rows = np.ascontiguousarray(chunks.transpose(0, 3, 1, 2)).view(np.uint8)
    codes = rows.reshape(-1, blocks * form.block)[:n, :k]
    found = _by_row(body[:, :, form.code_bytes :], form.numbers, form.minimum)[:, :n]
    if form.split:
        heads = groups[:, head].reshape(-1, units, form.unit_bytes)
        unit = _by_row(heads, np.float16, form.minimum)
        found = found * np.repeat(unit, SUPER // form.block, axis=2)[:, :n, :blocks]
    return codes, found[0], found[1] if form.minimum else None


def _by_row(held: Array, kind: Any, minimum: bool) -> Array:
    """fp32 [1 or 2, rows, count] of bytes [groups, count, those of 16 scales and minima]."""
    numbers = np.ascontiguousarray(held).view(kind)
    numbers = numbers.reshape(*held.shape[:2], 1 + minimum, ROWS).transpose(2, 0, 3, 1)
    rows: Array = numbers.reshape(1 + minimum, -1, held.shape[1]).astype(np.float32)
    return rows


def interleave_gate_up(gate: Array, up: Array) -> Array:
    """Rows of two matrices [n, ...] by turns of 16, as the gated form of `Linear` expects them.

    Both are padded to whole groups by the caller: n must be a multiple of 16.
    """
    if gate.shape != up.shape or gate.shape[0] % ROWS:
        raise ValueError(
            f"gate {gate.shape} and up {up.shape} must have one shape with rows a multiple of 16"
        )
    both = np.stack([gate.reshape(-1, ROWS, *gate.shape[1:]), up.reshape(-1, ROWS, *up.shape[1:])])
    return np.ascontiguousarray(both.swapaxes(0, 1)).reshape(-1, *gate.shape[1:])
