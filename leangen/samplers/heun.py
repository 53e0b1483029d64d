"""Heun's second-order method: Euler's step, then the mean of both slopes (arXiv 2206.00364).

The slopes are those of the straight line between two levels, in the model's own variables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from leangen.samplers import Array, Denoiser, Level


def sample(
    denoise: Denoiser, x: Array, levels: Sequence[Level], rng: np.random.Generator
) -> Iterator[Array]:
    """Yield x after each step; two denoiser calls a step, one in the last; adds no noise."""
    for level, following in pairwise(levels):
        dalpha, dsigma = following.alpha - level.alpha, following.sigma - level.sigma
        clean, noise = _estimates(denoise, x, level)
        ahead = x + (dalpha * clean + dsigma * noise)
        if following.sigma > 0:
            clean_there, noise_there = _estimates(denoise, ahead, following)
            mean, mean_noise = (clean + clean_there) / 2, (noise + noise_there) / 2
            ahead = x + (dalpha * mean + dsigma * mean_noise)
        x = ahead
        yield x


def _estimates(denoise: Denoiser, x: Array, level: Level) -> tuple[Array, Array]:
    """The clean sample and the noise in x."""
    clean = denoise(x, level)
    return clean, (x - level.alpha * clean) / level.sigma
