"""Heun's second-order method: Euler's step, then the mean of both slopes (arXiv 2206.00364)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from leangen.samplers import Array, Denoiser


def sample(
    denoise: Denoiser, x: Array, sigmas: Sequence[float], rng: np.random.Generator
) -> Iterator[Array]:
    """Yield x after each step; two denoiser calls a step, one in the last; adds no noise."""
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        slope = (x - denoise(x, sigma)) / np.float32(sigma)
        ahead = x + np.float32(following - sigma) * slope
        if following > 0:
            there = (ahead - denoise(ahead, following)) / np.float32(following)
            ahead = x + np.float32(following - sigma) * (slope + there) / 2
        x = ahead
        yield x
