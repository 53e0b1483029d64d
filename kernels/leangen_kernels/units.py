"""Scales as bytes times a unit, which Q4_K, Q5_K and Q6_K have: found again from fp32 numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

SUPER = 256
"""Weights along k that share a unit."""
_SAMPLE = 16


Split = list[tuple[Array, Array]]
"""Bytes [n, blocks] and fp16 units of scales, then of minima."""


def split(scales: Array, minima: Array | None, block: int) -> Split | None:
    """What scales (and minima) [n, blocks] are bytes times units of; None where they are not.

    A bundle holds minima as sums with the scales in fp32, from which they come back less what the
    sum was rounded by: a minimum may differ from byte times unit by as much.
    """
    found = [_bytes_and_units(scales, np.zeros_like(scales), block)]
    if minima is not None:
        rounding = np.float32(2.0**-23) * (np.abs(minima) + 16 * np.abs(scales))
        found.append(_bytes_and_units(minima, rounding, block))
    whole = [each for each in found if each is not None]
    return whole if len(whole) == len(found) else None


def _bytes_and_units(values: Array, rounding: Array, block: int) -> tuple[Array, Array] | None:
    n, blocks = values.shape
    sample = slice(_SAMPLE)
    if n > _SAMPLE and _bytes_and_units(values[sample], rounding[sample], block) is None:
        return None  # most weights are not split: a few rows say so at a fraction of the cost
    per = SUPER // block
    units = -(-blocks // per)
    padded = np.zeros((2, n, units * per), np.float32)
    padded[0, :, :blocks], padded[1, :, :blocks] = values, rounding
    given, slack = padded.reshape(2, n * units, per)
    at = np.abs(given).argmax(axis=1)
    most = -given[np.arange(len(given)), at]  # which becomes a negative byte: there is one more
    unit, found = np.zeros(len(given), np.float32), np.zeros(given.shape, np.int8)
    left = np.flatnonzero(most)
    for byte in (63, 128, 127, *range(1, 127)):  # the first three are what llama.cpp makes
        if not len(left):
            break
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            trial = (most[left] / byte).astype(np.float16).astype(np.float32)
            count = np.rint(given[left] / trial[:, None])
            fits = np.abs(count * trial[:, None] - given[left]) <= slack[left]
        done = fits.all(axis=1) & (np.abs(count) <= 128).all(axis=1) & (count.max(axis=1) < 128)
        unit[left[done]], found[left[done]] = trial[done], count[done].astype(np.int8)
        left = left[~done]
    if len(left):
        return None
    return found.reshape(n, -1)[:, :blocks], unit.reshape(n, units).astype(np.float16)
