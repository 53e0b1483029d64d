"""Consistency sampling: denoise, add less noise, denoise again (arXiv 2303.01469, alg. 1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from leangen.samplers import Array, Denoiser


def sample(
    denoise: Denoiser, x: Array, sigmas: Sequence[float], rng: np.random.Generator
) -> Iterator[Array]:
    """Yield x after each step; with one step it is the denoiser's answer to pure noise."""
    for sigma, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = denoise(x, sigma)
        if following > 0:
            x = x + np.float32(following) * rng.standard_normal(x.shape, np.float32)
        yield x
