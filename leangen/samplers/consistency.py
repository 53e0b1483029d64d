"""Consistency sampling: denoise, add less noise, denoise again (arXiv 2303.01469, alg. 1).

Latent consistency models (arXiv 2310.04378) sample so too, in variance-preserving variables. Their
boundary scaling is left out: at the timesteps they visit it changes x by less than 1e-6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from leangen.samplers import Array, Denoiser, Level


def sample(
    denoise: Denoiser, x: Array, levels: Sequence[Level], rng: np.random.Generator
) -> Iterator[Array]:
    """Yield x after each step; with one step it is the denoiser's answer to pure noise."""
    for level, following in pairwise(levels):
        x = denoise(x, level)
        if following.sigma > 0:
            noise = rng.standard_normal(x.shape, np.float32)
            x = following.alpha * x + following.sigma * noise
        yield x
