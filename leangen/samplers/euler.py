"""Euler's method on the probability-flow ODE dx/dsigma = (x - D(x)) / sigma (arXiv 2206.00364)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from leangen.samplers import Array, Denoiser


def sample(
    denoise: Denoiser, x: Array, sigmas: Sequence[float], rng: np.random.Generator
) -> Iterator[Array]:
    """Yield x after each step; adds no noise, so `rng` is not drawn from."""
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        slope = (x - denoise(x, sigma)) / np.float32(sigma)
        x = x + np.float32(following - sigma) * slope
        yield x
