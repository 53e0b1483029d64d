"""HQQ: zero points and scales that forgive a few outliers, found without data.

Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023): minimize
|W - s (Q - z)|_p^p with p < 1. The error splits into a sparse part, found by shrinkage, and a rest
whose least-squares zero point is a mean; the two alternate. Here zero points end as integers,
packed with the codes: ORT is 30 to 100 times slower with the original's float ones.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from leangen.errors import UnknownSchemeError
from leangen.schemes import Array, Packed, check

NEEDS_DATA = False
_P = 0.7
_BETA, _GROWTH = 10.0, 1.01
_ROUNDS = 20


def quantize(w: Array, scheme: ModuleType, moment: Array | None, **options: Any) -> Packed:
    """Round `w` [n, k]; codes always have zero points. `moment` is not looked at."""
    if scheme.BITS not in (2, 3, 4):
        raise UnknownSchemeError(f"hqq is for 2, 3 and 4 bits, not for {scheme.BITS}")
    check(w)
    n, k = w.shape
    size = options.get("block_size") or scheme.BLOCK
    dtype = options.get("scale_dtype", np.float32)
    blocks, top = -(-k // size), (1 << scheme.BITS) - 1
    padded = np.zeros((n, blocks * size), np.float32)
    padded[:, :k] = w
    folded = padded.reshape(n, blocks, size)
    low = np.minimum(folded.min(axis=2), 0)
    high = np.maximum(folded.max(axis=2), 0)
    limits = np.finfo(dtype)
    scale = np.clip((high - low) / top, float(limits.smallest_subnormal), float(limits.max))
    scale = scale.astype(dtype).astype(np.float32)[..., None]
    zero = np.rint(-low[..., None] / scale)
    best = np.full((n, blocks, 1), np.inf, np.float32)
    kept = zero
    beta = _BETA
    unit = np.abs(folded).max(axis=2, keepdims=True)
    unit[unit == 0] = 1
    for _ in range(_ROUNDS):
        q = np.clip(np.rint(folded / scale + zero), 0, top)
        whole = np.clip(np.rint(zero), 0, top)
        error = _loss(folded, scale, whole, top, unit)
        kept, best = np.where(error < best, whole, kept), np.minimum(error, best)
        rest = (folded - scale * (q - zero)) / unit
        sparse = _shrink(rest, beta) * unit
        zero = np.mean(q - (folded - sparse) / scale, axis=2, keepdims=True)
        beta *= _GROWTH
    q = np.clip(np.rint(folded / scale + kept), 0, top)
    codes = q.reshape(n, -1)[:, :k].astype(np.uint8)
    scales, zeros = scale[..., 0].astype(dtype), kept[..., 0].astype(np.uint8)
    name = scheme.__name__.rpartition(".")[2]
    return Packed(name, (n, k), scheme.BITS, size, codes, scales, zeros)


def _loss(w: Array, scale: Array, zero: Array, top: int, unit: Array) -> Array:
    """|W - s (Q - z)|_p^p per block, in units of the block's largest weight."""
    q = np.clip(np.rint(w / scale + zero), 0, top)
    rest = np.abs(w - scale * (q - zero)) / unit
    loss: Array = (rest**_P).sum(axis=2, keepdims=True)
    return loss


def _shrink(x: Array, beta: float) -> Array:
    """The generalized soft threshold of an Lp norm."""
    size = np.abs(x)
    with np.errstate(divide="ignore"):
        smaller = size - size ** (_P - 1) / beta
    shrunk: Array = np.sign(x) * np.maximum(smaller, 0)
    return shrunk
