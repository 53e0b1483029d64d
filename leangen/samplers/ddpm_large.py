"""DDPM with the larger variance: all that the forward process adds (arXiv 2006.11239, sec. 3.2).

Exact for data of unit variance, where the smaller is exact for a single point.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from leangen.samplers import Array, Denoiser, Level


def sample(
    denoise: Denoiser, x: Array, levels: Sequence[Level], rng: np.random.Generator
) -> Iterator[Array]:
    """Yield x after each step; noise is drawn in each but the last."""
    for level, following in pairwise(levels):
        clean = denoise(x, level)
        ratio = level.alpha / following.alpha
        added = level.sigma**2 - (ratio * following.sigma) ** 2  # variance of q(x | x_next)
        kept = ratio * (following.sigma / level.sigma) ** 2
        x = following.alpha * added / level.sigma**2 * clean + kept * x
        if following.sigma > 0:
            x = x + math.sqrt(added) * rng.standard_normal(x.shape, np.float32)
        yield x
