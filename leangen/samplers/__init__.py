"""Diffusion samplers: from noise to a sample in steps of a denoiser.

A sampler is one module with

    sample(denoise, x, sigmas, rng) -> Iterator[x]

`denoise(x, sigma)` returns the denoiser's estimate of the clean sample, E[x0 | x], for x = x0 +
sigma * noise. `sigmas` are the noise levels, falling, ending in 0: n + 1 of them for n steps. `x`
starts at noise of level sigmas[0]; every yield is x after one more step. `rng` draws whatever noise
a sampler adds. These are the variables of Karras et al. 2022 (arXiv 2206.00364), in which models
trained in other ones are wrapped (`schedules`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, Protocol, cast

import numpy as np

from leangen.errors import RequestError

Array = np.ndarray[Any, np.dtype[np.float32]]
Denoiser = Callable[[Array, float], Array]


class Sampler(Protocol):
    """The attributes of a sampler's module."""

    def sample(
        self, denoise: Denoiser, x: Array, sigmas: Sequence[float], rng: np.random.Generator
    ) -> Iterator[Array]:
        """Yield x after each step."""
        ...


SAMPLERS = {
    "consistency": "leangen.samplers.consistency",
    "ddim": "leangen.samplers.ddim",
    "euler": "leangen.samplers.euler",
    "heun": "leangen.samplers.heun",
}


def get(name: str) -> Sampler:
    """The sampler's module; RequestError lists what there is."""
    if name not in SAMPLERS:
        raise RequestError(f"sampler {name!r} is unknown: expected one of {', '.join(SAMPLERS)}")
    return cast(Sampler, import_module(SAMPLERS[name]))
