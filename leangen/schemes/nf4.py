"""nf4: 4-bit NormalFloat, 16 quantiles of a normal distribution, one scale per 64 weights.

Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv 2305.14314).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from leangen.schemes import Array, Packed, table

BITS = table.BITS
BLOCK = table.BLOCK
TABLE = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def quantize(w: Array, *, block_size: int | None = BLOCK, **unused: Any) -> Packed:
    """Quantize `w` [n, k]; BundleError for an empty matrix and for NaN or infinite weights."""
    return table.quantize(w, scheme="nf4", table=TABLE, block_size=block_size)


def dequantize(packed: Packed) -> table.Floats:
    """The float32 [n, k] that the packed form stands for."""
    return table.dequantize(packed, TABLE)
