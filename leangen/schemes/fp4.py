"""fp4: 4-bit floats (sign, 2 bits of exponent, 1 of mantissa), one scale per 64 weights.

The values are bitsandbytes' own: a subnormal of 1/192 of the largest, and a zero of either sign.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from leangen.schemes import Array, Packed, table

BITS = table.BITS
BLOCK = table.BLOCK
_MAGNITUDES = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / np.float32(12)
TABLE = np.concatenate([_MAGNITUDES, -_MAGNITUDES])


def quantize(w: Array, *, block_size: int | None = BLOCK, **unused: Any) -> Packed:
    """Quantize `w` [n, k]; BundleError for an empty matrix and for NaN or infinite weights."""
    return table.quantize(w, scheme="fp4", table=TABLE, block_size=block_size)


def dequantize(packed: Packed) -> table.Floats:
    """The float32 [n, k] that the packed form stands for."""
    return table.dequantize(packed, TABLE)
