"""bf16: the upper half of a float32's bits, computed as fp32.

As with fp16, ORT's CPU provider widens the weights while it loads: half the disk, and no more. It
keeps float32's range, and 8 bits of precision against fp16's 11.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from leangen.schemes import Array, Packed, check

BITS = 16
BLOCK = None
_LARGEST = 0x7F7F


def quantize(w: Array, **unused: Any) -> Packed:
    """Round `w` [n, k] to the nearest bfloat16 numbers, ties to even; none becomes infinite.

    Raises BundleError for an empty matrix and for NaN or infinite weights.
    """
    check(w)
    bits = np.ascontiguousarray(w, np.float32).view(np.uint32)
    codes = ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)
    sign = codes & 0x8000
    codes = sign | np.minimum(codes ^ sign, _LARGEST).astype(np.uint16)
    return Packed("bf16", w.shape, BITS, w.shape[1], codes, np.empty((len(w), 0), np.float32), None)


def dequantize(packed: Packed) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The float32 [n, k] that the packed form stands for."""
    return (packed.q.astype(np.uint32) << 16).view(np.float32)
