"""The one owner of the layouts on a GPU: weights as the tensor core takes them, activation rows.

**Weights** [n, k] stand in tiles of 16 rows, each tile in units of 128 weights along k, one unit
after the other: what a warp reads in one go, with 16 bytes to a lane, is one stretch of memory. A
lane of `mma` holds rows g = lane / 4 and g + 8, and of each block of 32 weights the eight from
8 (lane % 4) on. A unit holds

- the codes of rows g of all 32 lanes, then of rows g + 8: at 4 bits a word for each of the four
  blocks (512 bytes), at 8 bits two words (two stretches of 512 bytes, of blocks 0, 1 and 2, 3);
- the scales, 4 for each of the 16 rows, fp16 or fp32; with a minimum, the minima likewise.

In a word of eight nibbles, from the lowest, stand weights 0 2 4 6 1 3 5 7, so that one AND makes
two halves side by side of neighbours; with a table they stand in order. Of bytes, the first word
holds weights 0 4 1 5, the second 2 6 3 7: `Form.center` is what stands for zero.

**Activation rows** are padded to whole units with zeros. As halves they are in order, divided by a
power of two for each row, and the sums of their blocks of 32 (fp32) stand beside them; as bytes,
eights are permuted as above, with a scale (fp32) and a sum (int32) for each block.

**Caches** of keys and values [batch, heads, capacity, columns] stand in order with fp16; with int8
in blocks of 16 positions, codes [16, width], then 16 scales (fp32): `cache_layout.read` with
keys=False reads both.
"""

from __future__ import annotations

import numpy as np

from leangen_kernels.layout import BLOCK, ROWS, Array, Form

UNIT = 128
BLOCKS = UNIT // BLOCK
NIBBLES = (0, 2, 4, 6, 1, 3, 5, 7)
BYTES = (0, 4, 1, 5, 2, 6, 3, 7)


def holds(form: Form) -> bool:
    """Whether weights of a form can be packed: a scale for 32, 4 or 8 bits, minima at 4 only."""
    return form.block == BLOCK and form.bits in (4, 8) and not (form.minimum and form.bits == 8)


def units(k: int) -> int:
    """Units along k."""
    return -(-k // UNIT)


def unit_bytes(form: Form) -> int:
    """Bytes of 16 rows of 128 weights."""
    scales = ROWS * BLOCKS * (4 if form.wide else 2)
    return ROWS * UNIT * form.bits // 8 + scales * (2 if form.minimum else 1)


def packed_bytes(form: Form, n: int, k: int) -> int:
    """Bytes of a packed matrix [n, k]."""
    return -(-n // ROWS) * units(k) * unit_bytes(form)


def pack(form: Form, codes: Array, scales: Array, minima: Array | None = None) -> Array:
    """Codes uint8 [n, k], scales (and minima) fp32 [n, ceil(k / 32)] as bytes, uint8 1-D.

    That is what `layout.unpack` gives. Raises ValueError on a form that has no place here.
    """
    if not holds(form):
        raise ValueError(
            f"form {form.name} has no layout on a GPU: scales for 32, 4 or 8 bits, minima at 4"
        )
    n, k = codes.shape
    tiles, along = -(-n // ROWS), units(k)
    zero = form.table.index(0.0) if form.table else form.center
    padded = np.full((tiles * ROWS, along * UNIT), zero, np.uint8)
    padded[:n, :k] = codes
    # [tile, row half, g, unit, block, t, eight] -> [tile, unit, row half, g, t, block, eight]
    eights = padded.reshape(tiles, 2, 8, along, BLOCKS, 4, 8).transpose(0, 3, 1, 2, 5, 4, 6)
    if form.bits == 4:
        order = range(8) if form.table else NIBBLES
        nibbles = eights[..., list(order)]
        words = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
    else:
        bytes_ = eights[..., list(BYTES)].reshape(*eights.shape[:5], 2, 2, 8)
        words = bytes_.transpose(0, 1, 2, 5, 3, 4, 6, 7)
    parts = [np.ascontiguousarray(words).reshape(tiles, along, -1)]
    for values in [scales] if minima is None else [scales, minima]:
        numbers = np.zeros((tiles * ROWS, along * BLOCKS), np.float32 if form.wide else np.float16)
        numbers[:n, : values.shape[1]] = values
        by_unit = numbers.reshape(tiles, ROWS, along, BLOCKS).transpose(0, 2, 1, 3)
        parts.append(np.ascontiguousarray(by_unit).view(np.uint8).reshape(tiles, along, -1))
    return np.ascontiguousarray(np.concatenate(parts, axis=-1)).reshape(-1)


def unpack(form: Form, packed: Array, n: int, k: int) -> tuple[Array, Array, Array | None]:
    """What `pack` was given."""
    tiles, along = -(-n // ROWS), units(k)
    body = packed.reshape(tiles, along, unit_bytes(form))
    size = ROWS * UNIT * form.bits // 8
    words = body[..., :size]
    if form.bits == 4:
        pairs = words.reshape(tiles, along, 2, 8, 4, BLOCKS, 4)
        nibbles = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*pairs.shape[:6], 8)
        order = list(range(8) if form.table else NIBBLES)
        eights = np.empty_like(nibbles)
        eights[..., order] = nibbles
    else:
        bytes_ = words.reshape(tiles, along, 2, 2, 8, 4, 2, 8).transpose(0, 1, 2, 4, 5, 3, 6, 7)
        eights = np.empty((tiles, along, 2, 8, 4, BLOCKS, 8), np.uint8)
        eights[..., list(BYTES)] = bytes_.reshape(eights.shape)
    codes = eights.transpose(0, 2, 3, 1, 5, 4, 6).reshape(tiles * ROWS, along * UNIT)[:n, :k]
    kind = np.float32 if form.wide else np.float16
    numbers = np.ascontiguousarray(body[..., size:]).view(kind)
    numbers = numbers.reshape(tiles, along, -1, ROWS, BLOCKS).transpose(2, 0, 3, 1, 4)
    rows = numbers.reshape(numbers.shape[0], tiles * ROWS, -1)[:, :n, : -(-k // BLOCK)]
    held = rows.astype(np.float32)
    return codes, held[0], held[1] if form.minimum else None
