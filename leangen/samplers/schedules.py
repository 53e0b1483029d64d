"""Noise schedules, and how models trained in other variables become denoisers in sigma."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from leangen.samplers import Array, Denoiser

Prediction = Literal["sample", "epsilon", "v"]
Floats = np.ndarray[Any, np.dtype[np.float64]]


def karras(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> list[float]:
    """`steps` noise levels from sigma_max to sigma_min, then 0 (arXiv 2206.00364, eq. 5).

    >>> karras(1, 0.002, 80.0)
    [80.0, 0.0]
    """
    if steps == 1:
        return [sigma_max, 0.0]
    ramp = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps) ** rho
    return [sigma_max, *ramp[1:].tolist(), 0.0]


def vp_sigmas(schedule: Mapping[str, Any]) -> Floats:
    """sigma of each training timestep of a variance-preserving model, rising.

    `schedule` has `kind` (`linear`, `scaled_linear`: betas, or their roots, on a line; `cosine`:
    arXiv 2102.09672), `timesteps`, and for the first two `beta_start` and `beta_end`.
    """
    count = int(schedule["timesteps"])
    if schedule["kind"] == "cosine":
        t = np.arange(count + 1) / count
        alpha_bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    else:
        power = 2 if schedule["kind"] == "scaled_linear" else 1
        first, last = (float(schedule[end]) ** (1 / power) for end in ("beta_start", "beta_end"))
        betas = np.linspace(first, last, count) ** power
    product = np.cumprod(1 - betas)
    return np.sqrt((1 - product) / product)


def spaced(sigmas: Floats, steps: int) -> list[float]:
    """`steps` of the training levels, evenly spaced from the highest, then 0."""
    places = np.linspace(len(sigmas) - 1, 0, steps) if steps > 1 else np.array([len(sigmas) - 1])
    return [*sigmas[np.rint(places).astype(int)].tolist(), 0.0]


def variance_exploding(model: Callable[[Array, float], Array], prediction: Prediction) -> Denoiser:
    """A model of x = x0 + sigma * noise, conditioned on sigma, as a denoiser."""
    if prediction == "sample":
        return model
    return lambda x, sigma: x - np.float32(sigma) * model(x, sigma)


def variance_preserving(
    model: Callable[[Array, float], Array], prediction: Prediction, sigmas: Floats
) -> Denoiser:
    """A model of sqrt(a) x0 + sqrt(1 - a) noise, conditioned on the timestep, as a denoiser.

    With a = 1 / (1 + sigma^2), its input is x / sqrt(1 + sigma^2).
    """
    logs = np.log(sigmas)

    def denoise(x: Array, sigma: float) -> Array:
        shrink = np.float32(1 / np.sqrt(1 + sigma**2))
        timestep = float(np.interp(np.log(sigma), logs, np.arange(len(logs))))
        answer = model(x * shrink, timestep)
        if prediction == "sample":
            return answer
        if prediction == "epsilon":
            return x - np.float32(sigma) * answer
        # v = sqrt(a) noise - sqrt(1 - a) x0 (arXiv 2202.00512)
        return shrink * (x * shrink - np.float32(sigma) * answer)

    return denoise
