"""What attention between pixels needs besides convolution's kernels: softmax down columns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from leangen_kernels.layout import ROWS
from leangen_kernels.simd import exponential, larger, load_floats, splat, store_floats
from leangen_kernels.unroll import registers, static, unrolled

VECTORS = 2
"""Vectors of 16 pixels side by side."""


def exponentials(scores: int, keys: int, sums: int) -> None:
    """exp(s - the column's largest) in place of scores [keys, VECTORS * 16], and columns' sums."""
    peak, total = registers(), registers()
    for v in static(VECTORS):
        peak[v] = splat(-1e30)
        total[v] = splat(0.0)
    at = scores
    for _ in range(keys):
        for v in static(VECTORS):
            peak[v] = larger(peak[v], load_floats(at, 4 * ROWS * v))
        at += 4 * ROWS * VECTORS
    at = scores
    for _ in range(keys):
        for v in static(VECTORS):
            value = exponential(load_floats(at, 4 * ROWS * v) - peak[v])
            total[v] = total[v] + value
            store_floats(at + 4 * ROWS * v, value)
        at += 4 * ROWS * VECTORS
    for v in static(VECTORS):
        store_floats(sums + 4 * ROWS * v, total[v])


def kernels() -> dict[str, tuple[Callable[..., Any], str]]:
    """Name of each kernel -> what makes its function, and the C types of its arguments."""
    return {"exponentials": (partial(unrolled, exponentials, ROWS=ROWS, VECTORS=VECTORS), "iii")}
