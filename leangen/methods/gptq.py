"""GPTQ: rounds column by column, and lets later columns make up for what earlier ones lost.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323). Columns go in the order of falling mean square of their input (its act-order)
while scales are those of the blocks as stored, set beforehand: so no `g_idx` is needed, with which
ORT is 30 to 100 times slower.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from leangen.methods import output_loss
from leangen.schemes import Array, Packed, spread

NEEDS_DATA = True
_DAMPING = 0.01
_TOGETHER = 128
"""Columns between updates of all later ones."""


def quantize(w: Array, scheme: ModuleType, moment: Array, **options: Any) -> Packed:
    """Round `w` [n, k] for inputs of second moment `moment` [k, k].

    Each row of the result loses at most what rounding to nearest loses on that data.
    """
    importance = np.diagonal(moment)
    nearest: Packed = scheme.quantize(w, importance=importance, **options)
    order = np.argsort(-importance, kind="stable")
    codes = _rounded(w, nearest, moment, order)
    packed = Packed(
        nearest.scheme,
        nearest.shape,
        nearest.bits,
        nearest.block_size,
        codes,
        nearest.scales,
        nearest.zero_points,
    )
    ours, theirs = (output_loss(scheme.dequantize(p) - w, moment) for p in (packed, nearest))
    codes[ours > theirs] = nearest.q[ours > theirs]
    return packed


def _rounded(w: Array, grid: Packed, moment: Array, order: Array) -> Array:
    """Codes [n, k] on the grid of scales and zero points of `grid`."""
    top = (1 << grid.bits) - 1
    scales = np.ascontiguousarray(spread(grid.scales.astype(np.float32), grid).T[order])
    if grid.zero_points is None:
        zeros = np.full_like(scales, 1 << (grid.bits - 1))
    else:
        zeros = np.ascontiguousarray(spread(grid.zero_points.astype(np.float32), grid).T[order])
    factor = _factor(moment[np.ix_(order, order)])
    rest = np.ascontiguousarray(w.T[order], np.float32)  # [k, n]: a column of w is contiguous
    codes = np.empty(rest.shape, np.uint8)
    for start in range(0, len(rest), _TOGETHER):
        end = min(start + _TOGETHER, len(rest))
        lost = np.empty((end - start, rest.shape[1]), np.float32)
        for column in range(start, end):
            value, scale, zero = rest[column], scales[column], zeros[column]
            q = np.clip(np.rint(value / scale + zero), 0, top)
            codes[column] = q
            error = (value - (q - zero) * scale) / factor[column, column]
            lost[column - start] = error
            rest[column + 1 : end] -= factor[column, column + 1 : end, None] * error
        rest[end:] -= factor[start:end, end:].T @ lost
    back = np.empty((rest.shape[1], rest.shape[0]), np.uint8)
    back[:, order] = codes.T
    return back


def _factor(moment: Array) -> Array:
    """The upper Cholesky factor of the inverse of the damped moment, float32 [k, k]."""
    damped = moment.astype(np.float64)
    mean = np.diagonal(damped).mean()
    # An input that is always zero has no say; it must not make the matrix singular either.
    damped[np.diag_indices_from(damped)] += _DAMPING * mean if mean > 0 else 1.0
    # With J reversing the order, J H J = L L^T gives H^-1 = U^T U for U = J L^-1 J.
    lower = np.linalg.cholesky(damped[::-1, ::-1])
    upper = np.linalg.inv(lower)[::-1, ::-1]
    return np.ascontiguousarray(upper, np.float32)
