"""fp16: half-precision weights, computed as fp32.

ORT's CPU provider has no half-precision kernels worth using: the Cast that widens the weights is
folded while ORT loads. So fp16 halves the disk and the download, not memory, time or energy.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from leangen.errors import BundleError
from leangen.schemes import Array, Packed, check

BITS = 16
BLOCK = None


def quantize(w: Array, **unused: Any) -> Packed:
    """Round `w` [n, k] to the nearest half-precision numbers.

    Raises BundleError for an empty matrix, for NaN or infinite weights, and for weights beyond
    half precision's 65504.
    """
    check(w)
    largest = float(np.abs(w).max())
    if largest >= 65520:  # what rounds to infinity
        raise BundleError(
            f"a weight of {largest:g} is beyond half precision's 65504: use bf16 or another scheme"
        )
    codes = w.astype(np.float16).view(np.uint16)
    return Packed("fp16", w.shape, BITS, w.shape[1], codes, np.empty((len(w), 0), np.float32), None)


def dequantize(packed: Packed) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The float32 [n, k] that the packed form stands for."""
    return packed.q.view(np.float16).astype(np.float32)
