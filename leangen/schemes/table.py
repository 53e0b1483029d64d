"""4-bit codes that index a table of 16 values in [-1, 1]: what nf4 and fp4 share.

A block is divided by its largest magnitude (its scale, exact in float32) and each weight takes the
nearest value of the table. The arithmetic is bitsandbytes' own, operation by operation, so that
codes and decoded weights equal `bitsandbytes.functional.quantize_4bit` and `dequantize_4bit` bit
for bit, without torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from leangen.schemes import Array, Packed, check, spread

Floats = np.ndarray[Any, np.dtype[np.float32]]

BITS = 4
BLOCK = 64

_SMALLEST = np.float32(1e-38)


def quantize(w: Array, *, scheme: str, table: Floats, block_size: int | None = BLOCK) -> Packed:
    """Quantize `w` [n, k] to indices into `table`, one scale per `block_size` weights of a row.

    Raises BundleError for an empty matrix and for NaN or infinite weights.
    """
    check(w)
    n, k = w.shape
    size = k if block_size is None else block_size
    blocks = -(-k // size)
    rows = np.zeros((n, blocks * size), np.float32)
    rows[:, :k] = w
    folded = rows.reshape(n, blocks, size)
    scales = np.abs(folded).max(axis=2)
    folded *= (np.float32(1) / np.maximum(scales, _SMALLEST))[..., None]
    np.clip(folded, -1, 1, out=folded)
    order = np.argsort(table, kind="stable")
    middles = (table[order[:-1]] + table[order[1:]]) / np.float32(2)
    codes = order[np.searchsorted(middles, rows[:, :k])].astype(np.uint8)
    return Packed(scheme, (n, k), BITS, size, codes, scales, None)


def dequantize(packed: Packed, table: Floats) -> Floats:
    """The float32 [n, k] that the packed form stands for."""
    w: Floats = table[packed.q] * spread(packed.scales.astype(np.float32), packed)
    return w
