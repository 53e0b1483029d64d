"""DDIM, the deterministic sampler (eta 0) of arXiv 2010.02502, eq. 12."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from leangen.samplers import Array, Denoiser


def sample(
    denoise: Denoiser, x: Array, sigmas: Sequence[float], rng: np.random.Generator
) -> Iterator[Array]:
    """Yield x after each step; adds no noise, so `rng` is not drawn from.

    With a_bar = 1 / (1 + sigma^2), eq. 12 keeps the noise estimate's direction and shrinks it.
    """
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        clean = denoise(x, sigma)
        x = clean + np.float32(following / sigma) * (x - clean)
        yield x
