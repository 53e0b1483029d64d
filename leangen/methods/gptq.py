"""GPTQ: rounds column by column, and lets later columns make up for what earlier ones lost.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323). Columns go in the order of falling mean square of their input (its act-order)
while scales are those of the blocks as stored, set beforehand: so no `g_idx` is needed, with which
ORT is 30 to 100 times slower. Then each code is set anew to what is best beside all others, a few
times around (coordinate descent, as in Behdin et al., "QuantEase", arXiv 2309.01885), and so is
each scale, as its type holds it.
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
_SWEEPS = 4
_ROWS = 2048
"""Rows at a time: they do not depend on each other, and memory is bounded so."""


def quantize(w: Array, scheme: ModuleType, moment: Array, **options: Any) -> Packed:
    """Round `w` [n, k] for inputs of second moment `moment` [k, k].

    Each row of the result loses at most what rounding to nearest loses on that data.
    """
    importance = np.diagonal(moment)
    nearest: Packed = scheme.quantize(w, importance=importance, **options)
    order = np.argsort(-importance, kind="stable")
    exact = _damped(moment)
    factor = _factor(exact[np.ix_(order[::-1], order[::-1])].astype(np.float64))
    codes, fitted = np.empty_like(nearest.q), np.empty_like(nearest.scales)
    for start in range(0, len(w), _ROWS):
        rows = slice(start, start + _ROWS)
        columns = np.ascontiguousarray(w[rows].T, np.float32)
        scales, zeros = _grid(nearest, rows)
        rounded = _rounded(columns, scales, zeros, 1 << nearest.bits, factor, order)
        _descend(columns, scales, zeros, nearest, exact, rounded)
        codes[rows] = rounded.T.astype(np.uint8)
        fitted[rows] = scales[:: nearest.block_size].T
    packed = Packed(
        nearest.scheme,
        nearest.shape,
        nearest.bits,
        nearest.block_size,
        codes,
        fitted,
        nearest.zero_points,
    )
    ours, theirs = (output_loss(scheme.dequantize(p) - w, moment) for p in (packed, nearest))
    worse = ours > theirs
    codes[worse], fitted[worse] = nearest.q[worse], nearest.scales[worse]
    return packed


def _grid(packed: Packed, rows: slice) -> tuple[Array, Array]:
    """Scale and zero point of every weight of some rows, float32 [k, rows]."""
    scales = spread(packed.scales[rows].astype(np.float32), packed).T
    if packed.zero_points is None:
        zeros = np.full(scales.shape, 1 << (packed.bits - 1), np.float32)
    else:
        zeros = spread(packed.zero_points[rows].astype(np.float32), packed).T
    return np.ascontiguousarray(scales), np.ascontiguousarray(zeros)


def _rounded(
    w: Array, scales: Array, zeros: Array, levels: int, factor: Array, order: Array
) -> Array:
    """Codes as float32 [k, n], like the columns of the weight `w` [k, n] that they are for."""
    rest = w[order]
    codes = np.empty_like(rest)
    for start in range(0, len(rest), _TOGETHER):
        end = min(start + _TOGETHER, len(rest))
        lost = np.empty((end - start, rest.shape[1]), np.float32)
        for column in range(start, end):
            value, scale, zero = rest[column], scales[order[column]], zeros[order[column]]
            q = np.clip(np.rint(value / scale + zero), 0, levels - 1)
            codes[order[column]] = q
            error = (value - (q - zero) * scale) / factor[column, column]
            lost[column - start] = error
            rest[column + 1 : end] -= factor[column, column + 1 : end, None] * error
        rest[end:] -= factor[start:end, end:].T @ lost
    return codes


def _descend(
    w: Array, scales: Array, zeros: Array, packed: Packed, moment: Array, codes: Array
) -> None:
    """Set each scale and code [k, n] to the best beside all others, in place, a few times around.

    `packed` says how many codes there are, how many share a scale, and how scales are stored.
    """
    levels = 1 << packed.bits
    slope = moment @ (w - (codes - zeros) * scales)
    for _ in range(_SWEEPS):
        _fit(scales, codes - zeros, slope, moment, packed)
        for start in range(0, len(w), _TOGETHER):
            end = min(start + _TOGETHER, len(w))
            near = np.ascontiguousarray(moment[start:end, start:end])
            here, moved = slope[start:end].copy(), np.empty((end - start, w.shape[1]), np.float32)
            for column in range(start, end):
                place = column - start
                wanted = codes[column] + here[place] / (near[place, place] * scales[column])
                q = np.clip(np.rint(wanted), 0, levels - 1)
                moved[place] = (q - codes[column]) * scales[column]
                codes[column] = q
                here -= near[:, place, None] * moved[place]
            slope -= moment[:, start:end] @ moved


def _fit(scales: Array, whole: Array, slope: Array, moment: Array, packed: Packed) -> None:
    """Set each block's scale to the best one, in place; `whole` are codes less zero points."""
    for start in range(0, len(whole), packed.block_size):
        block = slice(start, start + packed.block_size)
        q = whole[block]
        curve = np.einsum("kn,kn->n", q, moment[block, block] @ q)
        step = np.einsum("kn,kn->n", q, slope[block]) / np.where(curve > 0, curve, np.inf)
        old = scales[start].copy()
        new = (old + step).astype(packed.scales.dtype).astype(np.float32)
        new = np.where(np.isfinite(new) & (new * old > 0), new, old)
        scales[block] = new
        slope -= moment[:, block] @ (q * (new - old))


def _damped(moment: Array) -> Array:
    """The moment with a little added to its diagonal, float32 [k, k]."""
    damped = moment.astype(np.float32)
    mean = np.diagonal(damped).mean(dtype=np.float64)
    # An input that is always zero has no say; it must not make the matrix singular either.
    damped[np.diag_indices_from(damped)] += np.float32(_DAMPING * mean) if mean > 0 else 1
    return damped


def _factor(reversed_moment: Array) -> Array:
    """The upper Cholesky factor of the inverse of a moment, float32 [k, k].

    `reversed_moment`: its rows and columns in reverse. With J reversing the order, J H J = L L^T
    gives H^-1 = U^T U for U = J L^-1 J.
    """
    lower = np.linalg.cholesky(reversed_moment)
    _invert(lower)
    return np.ascontiguousarray(lower[::-1, ::-1], np.float32)


def _invert(lower: Array) -> None:
    """Invert a lower triangular matrix in place, by halves."""
    size = len(lower)
    if size <= _TOGETHER:
        lower[:] = np.tril(np.linalg.inv(lower))
        return
    half = size // 2
    first, second, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    _invert(first)
    _invert(second)
    below[:] = -second @ (below @ first)
