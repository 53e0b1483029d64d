"""int8: 8-bit codes, symmetric around 128, one float32 scale per row or block."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from leangen.schemes import Packed, uniform

BITS = 8


def quantize(
    w: np.ndarray[Any, Any],
    *,
    block_size: int | None = None,
    q_max: int = 127,
    threads: int | None = None,
) -> Packed:
    """Quantize `w` [n, k]; scales are per row unless `block_size` is given.

    `q_max=63` leaves the top bit free: on x86 without VNNI, ORT adds pairs of u8 x s8 products in
    16 bits, which 8-bit weights can saturate and 7-bit weights cannot.
    Raises BundleError for an empty matrix and for NaN or infinite weights.
    """
    return uniform.quantize(
        w,
        scheme="int8",
        bits=BITS,
        block_size=block_size,
        q_max=q_max,
        # Blocks of a few dozen weights gain nothing from clipping at 8 bits; long rows do.
        ratios=(1.0,) if block_size is not None else (1.0, 0.95, 0.9, 0.85, 0.8, 0.7),
        scale_dtype=np.float32,
        threads=threads or os.cpu_count() or 1,
    )


dequantize = uniform.dequantize
