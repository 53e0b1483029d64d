"""DPM-Solver++(2M), multistep of second order (arXiv 2211.01095, alg. 2), and its SDE form."""

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
    sde: bool = False,
) -> Iterator[Array]:
    """Yield x after each step; without `sde` `rng` is not drawn from.

    Steps from pure noise and to the clean sample, infinite in log SNR, are of first order.
    """
    earlier: Array | None = None
    before = math.inf  # the last step's length in log SNR
    for level, following in pairwise(levels):
        clean = denoise(x, level)
        ahead = following.log_snr - level.log_snr
        target = clean
        if earlier is not None and math.isfinite(ahead) and math.isfinite(before):
            target = clean + ahead / before / 2 * (clean - earlier)
        earlier, before = clean, ahead
        shrink = following.sigma / level.sigma
        left = level.alpha / following.alpha * shrink  # exp(-ahead)
        if sde:
            x = shrink * left * x + following.alpha * (1 - left**2) * target
            fresh = following.sigma * math.sqrt(1 - left**2)
            if fresh > 0:
                x = x + fresh * rng.standard_normal(x.shape, np.float32)
        else:
            x = shrink * x + following.alpha * (1 - left) * target
        yield x
