"""Uniform quantization: what the integer schemes share.

A block of weights w becomes integers q = round(w / s) + z, clipped, with one scale s and, where
asymmetric, one integer zero point z. The scale that spans the largest weight is rarely the one of
least error at 4 bits: a smaller one clips a few weights and rounds all others finer. So scales are
searched: a short grid of spans (and, asymmetric, of neighbouring zero points), then the
least-squares scale of the codes found, s = <w, q> / <q, q>. Errors may be weighted by column.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from leangen.schemes import Array, Packed, check, spread

Floats = np.ndarray[Any, np.dtype[np.float32]]

# Rows are searched in pieces of this many weights, so that temporaries stay in the L2 cache.
_PIECE_WEIGHTS = 1 << 16


def quantize(
    w: Array,
    *,
    scheme: str,
    bits: int,
    block_size: int | None,
    ratios: Sequence[float],
    q_max: int | None = None,
    asymmetric: bool = False,
    importance: Array | None = None,
    scale_dtype: type[np.floating[Any]] = np.float32,
    threads: int | None = None,
) -> Packed:
    """Quantize `w` [n, k] to codes of `bits` bits with one scale per `block_size` weights.

    Symmetric codes lie in [-q_max - 1, q_max] (-q_max when the type has a wider range) and are
    stored with 2**(bits - 1) added; asymmetric ones take all of [0, 2**bits - 1]. `ratios` are the
    spans to try, as shares of the largest weight. `importance` [k] weighs squared errors.
    Raises BundleError for an empty matrix and for NaN or infinite weights.
    """
    check(w)
    n, k = w.shape
    size = k if block_size is None else block_size
    blocks = -(-k // size)
    middle = 1 << (bits - 1)
    codes = np.empty((n, k), np.uint8)
    scales = np.empty((n, blocks), scale_dtype)
    zeros = np.empty((n, blocks), np.uint8) if asymmetric else None
    step = max(1, _PIECE_WEIGHTS // (blocks * size))
    weighing = _weighing(importance, k, blocks, size)
    top = middle - 1 if q_max is None else q_max
    # The extra negative code is worth using only where there are few codes.
    bottom = -middle if top == middle - 1 and bits <= 4 else -top

    def piece(start: int) -> None:
        rows = np.zeros((min(step, n - start), blocks * size), np.float32)
        rows[:, :k] = w[start : start + step]
        folded = rows.reshape(-1, blocks, size)
        if zeros is None:
            q, s = _symmetric(folded, bottom, top, ratios, weighing, scale_dtype)
            q += middle
        else:
            q, s, z = _asymmetric(folded, 2 * middle - 1, ratios, weighing, scale_dtype)
            zeros[start : start + step] = z
        codes[start : start + step] = q.reshape(len(rows), -1)[:, :k].astype(np.uint8)
        scales[start : start + step] = s

    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        for _ in pool.map(piece, range(0, n, step)):
            pass
    return Packed(scheme, (n, k), bits, size, codes, scales, zeros)


def dequantize(packed: Packed) -> Floats:
    """The float32 [n, k] that the packed form stands for."""
    zero: Any = np.float32(1 << (packed.bits - 1))
    if packed.zero_points is not None:
        zero = spread(packed.zero_points.astype(np.float32), packed)
    scales = spread(packed.scales.astype(np.float32), packed)
    w: Floats = (packed.q.astype(np.float32) - zero) * scales
    return w


def _weighing(importance: Array | None, k: int, blocks: int, size: int) -> Floats | None:
    """Importance as [blocks, size] of mean 1; a little is added so that no weight is free."""
    if importance is None:
        return None
    padded = np.zeros(blocks * size, np.float64)
    padded[:k] = importance
    mean = padded[:k].mean()
    if not mean > 0:
        return None
    return np.asarray((padded / mean + 1e-3).reshape(blocks, size), np.float32)


def _symmetric(
    w: Floats,
    q_min: int,
    q_max: int,
    ratios: Sequence[float],
    weighing: Floats | None,
    dtype: type[np.floating[Any]],
) -> tuple[Floats, Floats]:
    """Codes [n, blocks, size] and scales [n, blocks] of least squared error for `w`."""
    low, high = w.min(axis=2), w.max(axis=2)
    span = np.maximum(high, -low)
    spans = [span / np.float32(q_max)]
    if q_min != -q_max:  # let the largest weight, whatever its sign, take the extra code
        spans.append(np.where(high > -low, -span, span) / np.float32(-q_min))
    best = np.full(span.shape, np.inf, np.float32)
    scale = np.zeros_like(span)
    # Errors are taken relative to the span: squares of very small or large weights leave float32.
    unit = np.where(span > 0, span, np.float32(1))
    for base in spans:
        for ratio in ratios:
            trial = _storable(base * np.float32(ratio), dtype)
            error, _ = _error(w, trial, unit, q_min, q_max, weighing)
            better = error < best
            best = np.where(better, error, best)
            scale = np.where(better, trial, scale)
    best, q = _error(w, scale, unit, q_min, q_max, weighing)
    scale = _refit(w, q, scale, best, unit, weighing, dtype)
    return q, np.where(span > 0, scale, np.float32(1))


def _asymmetric(
    w: Floats,
    q_max: int,
    ratios: Sequence[float],
    weighing: Floats | None,
    dtype: type[np.floating[Any]],
) -> tuple[Floats, Floats, Floats]:
    """Codes in [0, q_max], scales and zero points of least squared error for `w`."""
    low, high = np.minimum(w.min(axis=2), 0), np.maximum(w.max(axis=2), 0)
    unit = np.maximum(high, -low)
    unit = np.where(unit > 0, unit, np.float32(1))
    # Halved before the difference, which would overflow at the ends of float32.
    base = (high / np.float32(q_max)) - (low / np.float32(q_max))
    best = np.full(unit.shape, np.inf, np.float32)
    scale, zero = np.ones_like(unit), np.zeros_like(unit)
    # A whole zero point may need a step more than the span has.
    for ratio in (q_max / (q_max - 1), *ratios):
        trial = _storable(base * np.float32(ratio), dtype)
        # The zero point of the span shrunk towards its middle, and the next nearest.
        centre = np.float32(q_max / 2) - (high / 2 + low / 2) / trial
        nearest = np.rint(centre)
        for z in (nearest, nearest + np.sign(centre - nearest)):
            z = np.clip(z, 0, q_max)
            error, _ = _error(w, trial, unit, -z[..., None], q_max - z[..., None], weighing)
            better = error < best
            best = np.where(better, error, best)
            scale = np.where(better, trial, scale)
            zero = np.where(better, z, zero)
    best, q = _error(w, scale, unit, -zero[..., None], q_max - zero[..., None], weighing)
    scale = _refit(w, q, scale, best, unit, weighing, dtype)
    return q + zero[..., None], scale, zero


def _refit(
    w: Floats,
    q: Floats,
    scale: Floats,
    error: Floats,
    unit: Floats,
    weighing: Floats | None,
    dtype: type[np.floating[Any]],
) -> Floats:
    """The least-squares scale of codes `q` (zero point taken off), where better than `scale`."""
    weighted = q if weighing is None else q * weighing
    energy = np.einsum("nbs,nbs->nb", weighted, q)
    fit = np.einsum("nbs,nbs->nb", w / unit[..., None], weighted)
    fit = np.where(energy > 0, fit / np.where(energy > 0, energy, np.float32(1)), 0)
    trial = _storable(fit * unit, dtype)
    rest = (q * trial[..., None] - w) / unit[..., None]
    return np.where(_squares(rest, weighing) < error, trial, scale)


def _storable(scale: Floats, dtype: type[np.floating[Any]]) -> Floats:
    """The scale as its stored type holds it: never zero by underflow, never infinite."""
    limits = np.finfo(dtype)
    size = np.clip(np.abs(scale), float(limits.smallest_subnormal), float(limits.max))
    stored: Floats = np.copysign(size, scale).astype(dtype).astype(np.float32)
    return stored


def _error(
    w: Floats, scale: Floats, unit: Floats, q_min: Any, q_max: Any, weighing: Floats | None
) -> tuple[Floats, Floats]:
    """Squared error per block in units of `unit`, and the codes with the zero point taken off."""
    # w / subnormal may overflow, which the clip handles; so may the error of too large a scale,
    # which then is not the least.
    with np.errstate(over="ignore"):
        q = w / scale[..., None]
        np.rint(q, out=q)
        np.clip(q, q_min, q_max, out=q)
        rest = (q * scale[..., None] - w) / unit[..., None]
        return _squares(rest, weighing), q


def _squares(rest: Floats, weighing: Floats | None) -> Floats:
    weighted = rest if weighing is None else rest * weighing
    total: Floats = np.einsum("nbs,nbs->nb", weighted, rest)
    return total
