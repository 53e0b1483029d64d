"""DPM-Solver++(2M) on the reverse SDE: noise is drawn anew in each step (arXiv 2211.01095, 6)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from leangen.samplers import Array, Denoiser, Level, dpmpp_2m


def sample(
    denoise: Denoiser, x: Array, levels: Sequence[Level], rng: np.random.Generator
) -> Iterator[Array]:
    """Yield x after each step; noise is drawn in each but the last."""
    return dpmpp_2m.sample(denoise, x, levels, rng, sde=True)
