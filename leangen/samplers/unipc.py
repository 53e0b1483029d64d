"""UniPC of second order with B(h) = e^h - 1: a predictor, corrected one step later by the denoiser
call that the next step makes anyway (arXiv 2302.04867, alg. 5 to 8, data prediction).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from leangen.samplers import Array, Denoiser, Level


class _Node(NamedTuple):
    """Where a step began, and the denoiser's answer there."""

    level: Level
    x: Array
    clean: Array


def sample(
    denoise: Denoiser, x: Array, levels: Sequence[Level], rng: np.random.Generator
) -> Iterator[Array]:
    """Yield x after each step, as predicted; adds no noise, so `rng` is not drawn from.

    Steps from pure noise and to the clean sample, infinite in log SNR, are of first order.
    """
    older: _Node | None = None
    last: _Node | None = None
    for level, following in pairwise(levels):
        clean = denoise(x, level)
        if last is not None:
            x = _step(last, older, level, clean)
        older, last = last, _Node(level, x, clean)
        x = _step(last, older, following, None)
        yield x


def _step(start: _Node, older: _Node | None, end: Level, there: Array | None) -> Array:
    """x at `end`; `there`, the denoiser's answer at `end`, makes the predictor a corrector."""
    length = end.log_snr - start.level.log_snr
    shift = math.expm1(-length)
    base = end.sigma / start.level.sigma * start.x - end.alpha * shift * start.clean
    ratio = 0.0
    if older is not None:
        ratio = (older.level.log_snr - start.level.log_snr) / length
    slope = (older.clean - start.clean) / ratio if _usable(ratio) and older is not None else None
    if there is None:
        bend = 0.5 * slope if slope is not None else None
    elif slope is None:
        bend = 0.5 * (there - start.clean)
    else:
        # weights r of both differences: r1 + r2 = b1, ratio * r1 + r2 = b2 (eq. 9)
        first = shift / -length - 1
        b1, b2 = first / shift, 2 * (first / -length - 0.5) / shift
        r1 = (b1 - b2) / (1 - ratio)
        bend = r1 * slope + (b1 - r1) * (there - start.clean)
    return base if bend is None else base - end.alpha * shift * bend


def _usable(ratio: float) -> bool:
    """Whether an earlier answer tells of this step: neither lasts infinitely long."""
    return math.isfinite(ratio) and ratio != 0
