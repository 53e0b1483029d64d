"""The one owner of the layout of keys and values that attention keeps.

A cache [batch, heads, capacity, columns] stands in blocks of 16 positions of a head. A block of
keys is [width, 16], so that 16 scores need no horizontal sum; one of values is [16, width]. Their
numbers are fp32, fp16 or int8; columns are the width, with int8 four more: after the codes of a
block come its 16 scales (fp32), one for each position. A number is `scale * code`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from leangen_kernels.layout import ROWS, Array


@dataclass(frozen=True, slots=True)
class Cache:
    """How keys and values are held."""

    name: str
    size: int
    """Bytes of a number."""
    scaled: bool
    """Whether every position of every head has a scale."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """What ONNX Runtime sees."""
        return np.dtype({"fp32": np.float32, "fp16": np.float16, "int8": np.int8}[self.name])

    def columns(self, width: int) -> int:
        """The last dimension of a cache for heads of this width."""
        return width + (4 if self.scaled else 0)


CACHES = {
    cache.name: cache
    for cache in (Cache("fp32", 4, False), Cache("fp16", 2, False), Cache("int8", 1, True))
}


def read(cache: Cache, held: Array, *, keys: bool) -> Array:
    """The float64 keys or values [batch, heads, capacity, width] that a cache stands for."""
    batch, heads, capacity, columns = held.shape
    width = columns - cache.columns(0)
    blocks = held.reshape(batch, heads, capacity // ROWS, ROWS * columns)
    numbers = blocks[..., : ROWS * width].astype(np.float64)
    if keys:
        numbers = numbers.reshape(*blocks.shape[:3], width, ROWS).swapaxes(-1, -2)
    numbers = numbers.reshape(batch, heads, capacity, width)
    if cache.scaled:
        scales = np.ascontiguousarray(blocks[..., ROWS * width :]).view(np.float32)
        numbers = numbers * scales.reshape(batch, heads, capacity, 1)
    return np.ascontiguousarray(numbers)
