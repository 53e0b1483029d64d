"""DDPM, ancestral sampling with the smaller variance (arXiv 2006.11239, eq. 7).

Over skipped timesteps it is DDIM with `eta` 1, and in the variables of Karras et al. Euler's method
with as much noise added back: the Euler ancestral sampler is this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from leangen.samplers import Array, Denoiser, Level, ddim


def sample(
    denoise: Denoiser, x: Array, levels: Sequence[Level], rng: np.random.Generator
) -> Iterator[Array]:
    """Yield x after each step; noise is drawn in each but the last."""
    return ddim.sample(denoise, x, levels, rng, eta=1.0)
