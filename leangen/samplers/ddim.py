"""DDIM (arXiv 2010.02502, eq. 12 and 16).

Without noise of its own (`eta` 0) it keeps the noise that the denoiser sees in x, and shrinks it.
This is Euler's step along a straight line between the two levels: with alpha = 1 Euler's method on
dx/dsigma = (x - D(x)) / sigma (arXiv 2206.00364, appendix C), with alpha = 1 - sigma flow
matching's on dx/dt = v (arXiv 2210.02747). With `eta` 1 as much of the noise is drawn anew as the
forward process has added between the levels: x is then drawn from q(x_next | x, x0).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from leangen.samplers import Array, Denoiser, Level


def sample(
    denoise: Denoiser,
    x: Array,
    levels: Sequence[Level],
    rng: np.random.Generator,
    *,
    eta: float = 0.0,
) -> Iterator[Array]:
    """Yield x after each step; with `eta` 0 `rng` is not drawn from."""
    for level, following in pairwise(levels):
        clean = denoise(x, level)
        noise = (x - level.alpha * clean) / level.sigma
        fresh = eta * _added(level, following)
        kept = math.sqrt(max(following.sigma**2 - fresh**2, 0.0))
        x = following.alpha * clean + kept * noise
        if fresh > 0:
            x = x + fresh * rng.standard_normal(x.shape, np.float32)
        yield x


def _added(level: Level, following: Level) -> float:
    """Standard deviation of q(x_next | x, x0)."""
    before = level.alpha / following.alpha * following.sigma  # the noise of x_next, as in x
    return following.sigma / level.sigma * math.sqrt(max(level.sigma**2 - before**2, 0.0))
