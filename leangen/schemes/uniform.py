"""Uniform symmetric quantization: what int8 and int4 share.

A block of weights w becomes integers q = round(w / s), clipped, with one scale s. The scale that
spans the largest weight is rarely the one of least error at 4 bits: a smaller one clips a few
weights and rounds all others finer. So scales are searched: a short grid of spans, then the
least-squares scale of the codes found, s = <w, q> / <q, q>.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from leangen.errors import BundleError
from leangen.schemes import Packed

Floats = np.ndarray[Any, np.dtype[np.float32]]

# Rows are searched in pieces of this many weights, so that temporaries stay in the L2 cache.
_PIECE_WEIGHTS = 1 << 16


def quantize(
    w: np.ndarray[Any, Any],
    *,
    scheme: str,
    bits: int,
    block_size: int | None,
    q_max: int,
    ratios: Sequence[float],
    scale_dtype: type[np.floating[Any]],
    threads: int,
) -> Packed:
    """Quantize `w` [n, k] to codes of `bits` bits with one scale per `block_size` weights.

    Codes lie in [-q_max - 1, q_max] (-q_max when the type has a wider range) and are stored with
    2**(bits - 1) added. `ratios` are the spans to try, as shares of the largest weight.
    Raises BundleError for an empty matrix and for NaN or infinite weights.
    """
    if w.ndim != 2 or w.size == 0:
        raise BundleError(
            f"weights of shape {list(w.shape)} cannot be quantized: expected a non-empty matrix; "
            "export the model again"
        )
    n, k = w.shape
    size = k if block_size is None else block_size
    blocks = -(-k // size)
    middle = 1 << (bits - 1)
    codes = np.empty((n, k), np.uint8)
    scales = np.empty((n, blocks), scale_dtype)
    step = max(1, _PIECE_WEIGHTS // (blocks * size))
    # The extra negative code is worth using only where there are few codes.
    q_min = -middle if q_max == middle - 1 and bits <= 4 else -q_max

    def piece(start: int) -> None:
        rows = np.zeros((min(step, n - start), blocks * size), np.float32)
        rows[:, :k] = w[start : start + step]
        if not np.isfinite(rows).all():
            raise BundleError(
                f"weights of shape [{n}, {k}] hold NaN or infinity and cannot be quantized: "
                "export the model again from an intact source"
            )
        q, s = _search(rows.reshape(-1, blocks, size), q_min, q_max, ratios, scale_dtype)
        codes[start : start + step] = (q.reshape(len(rows), -1)[:, :k] + middle).astype(np.uint8)
        scales[start : start + step] = s

    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(piece, range(0, n, step)):
            pass
    return Packed(scheme, (n, k), bits, size, codes, scales, None)


def dequantize(packed: Packed) -> Floats:
    """The float32 [n, k] that the packed form stands for."""
    n, k = packed.shape
    spread = np.repeat(packed.scales.astype(np.float32), packed.block_size, axis=1)[:, :k]
    if packed.zero_points is None:
        zero: Any = np.float32(1 << (packed.bits - 1))
    else:
        zero = np.repeat(packed.zero_points.astype(np.float32), packed.block_size, axis=1)[:, :k]
    w: Floats = (packed.q.astype(np.float32) - zero) * spread
    return w


def _search(
    w: Floats, q_min: int, q_max: int, ratios: Sequence[float], dtype: type[np.floating[Any]]
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
            error, _ = _error(w, trial, unit, q_min, q_max)
            better = error < best
            best = np.where(better, error, best)
            scale = np.where(better, trial, scale)
    best, q = _error(w, scale, unit, q_min, q_max)
    energy = np.einsum("nbs,nbs->nb", q, q)
    fit = np.einsum("nbs,nbs->nb", w / unit[..., None], q) / np.maximum(energy, np.float32(1))
    trial = _storable(fit * unit, dtype)
    rest = (q * trial[..., None] - w) / unit[..., None]
    better = np.einsum("nbs,nbs->nb", rest, rest) < best
    return q, np.where(span > 0, np.where(better, trial, scale), np.float32(1))


def _storable(scale: Floats, dtype: type[np.floating[Any]]) -> Floats:
    """The scale as its stored type holds it: never zero by underflow, never infinite."""
    limits = np.finfo(dtype)
    size = np.clip(np.abs(scale), float(limits.smallest_subnormal), float(limits.max))
    stored: Floats = np.copysign(size, scale).astype(dtype).astype(np.float32)
    return stored


def _error(w: Floats, scale: Floats, unit: Floats, q_min: int, q_max: int) -> tuple[Floats, Floats]:
    """Squared error per block in units of `unit`, and the codes."""
    with np.errstate(over="ignore"):  # w / subnormal may overflow; the clip below handles it
        q = w / scale[..., None]
    np.rint(q, out=q)
    np.clip(q, q_min, q_max, out=q)
    rest = (q * scale[..., None] - w) / unit[..., None]
    return np.einsum("nbs,nbs->nb", rest, rest), q
