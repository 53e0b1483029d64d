"""Diffusion samplers: from noise to a sample in steps of a denoiser.

A sampler is one module with

    sample(denoise, x, levels, rng) -> Iterator[x]

A level says how much is left of the sample and how much noise is in x: x = alpha * x0 + sigma *
noise. `denoise(x, level)` returns the denoiser's estimate of the clean sample, E[x0 | x]. `levels`
go from noise to the sample and end in Level(1, 0): n + 1 of them for n steps. `x` starts at the
first level; every yield is x after one more step. `rng` draws whatever noise a sampler adds.

With alpha = 1 these are the variables of Karras et al. 2022 (arXiv 2206.00364), with alpha^2 +
sigma^2 = 1 those of variance-preserving models, with alpha + sigma = 1 those of flow matching; each
model is sampled in its own. `schedules` makes the levels, and denoisers of what models predict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from leangen.errors import RequestError

Array = np.ndarray[Any, np.dtype[np.floating[Any]]]


class Level(NamedTuple):
    """One noise level: x = alpha * x0 + sigma * noise."""

    alpha: float
    sigma: float

    @property
    def log_snr(self) -> float:
        """Half the logarithm of the signal-to-noise ratio, log(alpha / sigma); +-inf at the ends.

        >>> Level(0.0, 1.0).log_snr, Level(1.0, 1.0).log_snr, Level(1.0, 0.0).log_snr
        (-inf, 0.0, inf)
        """
        if self.alpha == 0:
            return -math.inf
        return math.inf if self.sigma == 0 else math.log(self.alpha / self.sigma)


Denoiser = Callable[[Array, Level], Array]
CLEAN = Level(1.0, 0.0)
"""Where every trajectory ends."""


class Sampler(Protocol):
    """The attributes of a sampler's module."""

    def sample(
        self, denoise: Denoiser, x: Array, levels: Sequence[Level], rng: np.random.Generator
    ) -> Iterator[Array]:
        """Yield x after each step."""
        ...


SAMPLERS = {
    "consistency": "leangen.samplers.consistency",
    "ddim": "leangen.samplers.ddim",
    "ddpm": "leangen.samplers.ddpm",
    "ddpm_large": "leangen.samplers.ddpm_large",
    "dpmpp_2m": "leangen.samplers.dpmpp_2m",
    "dpmpp_2m_sde": "leangen.samplers.dpmpp_2m_sde",
    "euler": "leangen.samplers.ddim",
    "euler_ancestral": "leangen.samplers.ddpm",
    "heun": "leangen.samplers.heun",
    "lcm": "leangen.samplers.consistency",
    "unipc": "leangen.samplers.unipc",
}
"""Names of one module are one method: written in alpha and sigma, their steps are the same."""


def get(name: str) -> Sampler:
    """The sampler's module; RequestError lists what there is."""
    if name not in SAMPLERS:
        raise RequestError(f"sampler {name!r} is unknown: expected one of {', '.join(SAMPLERS)}")
    return cast(Sampler, import_module(SAMPLERS[name]))
