"""int8: 8-bit codes, symmetric around 128 or with zero points, one scale per row or block."""

from __future__ import annotations

from typing import Any

import numpy as np

from leangen.schemes import Array, Packed, uniform

BITS = 8
BLOCK = None
_NARROWER = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7)
_WIDER = tuple(127 / largest for largest in (127, 126, 125, 124, 122, 120, 118, 116))


def quantize(
    w: Array,
    *,
    block_size: int | None = BLOCK,
    q_max: int = 127,
    asymmetric: bool = False,
    importance: Array | None = None,
    scale_dtype: type[np.floating[Any]] = np.float32,
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
        # At 8 bits clipping pays in long rows only; in a block, some scale a little above the span
        # happens to fit its few dozen weights better.
        ratios=_WIDER if block_size is not None and block_size <= 64 else _NARROWER,
        asymmetric=asymmetric,
        importance=importance,
        scale_dtype=scale_dtype,
        threads=threads,
    )


dequantize = uniform.dequantize
