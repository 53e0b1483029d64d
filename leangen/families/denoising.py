"""The graph of a diffusion bundle as a denoiser: what it is fed, and what its answer amounts to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from leangen.errors import RequestError
from leangen.families.guidance import Guidance
from leangen.samplers import Array, Denoiser, Level, schedules
from leangen.session import Session


def levels(config: Mapping[str, Any], steps: int, strength: float | None = None) -> list[Level]:
    """The noise levels that `steps` visit, or with a strength the last of them.

    Raises RequestError for more steps than the model was trained with, and for a strength that
    leaves none.
    """
    noise = config["noise_level"]
    if noise["kind"] == "sigma":
        visited = schedules.karras(steps, noise["min"], noise["max"])
    elif noise["kind"] == "flow":
        visited = schedules.flow(steps, noise.get("shift", 1.0))
    else:
        trained, spacing = schedules.trained(noise["schedule"]), noise.get("spacing", "linspace")
        most = noise.get("distilled", len(trained)) if spacing == "distilled" else len(trained)
        if steps > most:
            raise RequestError(
                f"steps is {steps}, expected at most the {most} this model was trained with"
            )
        options = {key: noise[key] for key in ("offset", "distilled") if key in noise}
        visited = schedules.spaced(trained, steps, spacing, **options)
    if strength is None:
        return visited
    kept = int(steps * strength)
    if kept < 1:
        raise RequestError(
            f"strength {strength:g} of {steps} steps is less than one step: "
            f"expected {1 / steps:g} or more"
        )
    return visited[steps - kept :]


def denoiser(
    session: Session, conditions: Mapping[str, Array], guided: Guidance | None
) -> Denoiser:
    """The graph `model` as a denoiser of samples [1, c, h, w] under these conditions."""
    config = session.bundle.config
    sample, noise = config["sample"], config["noise_level"]
    told, clip = _told(noise), config.get("clip")

    def ask(feeds: Mapping[str, Any]) -> Array:
        answer: Array = session.run("model", feeds, [sample["output"]])[0]
        return answer

    def denoise(x: Array, level: Level) -> Array:
        feeds = {
            sample["input"]: x,
            noise["input"]: np.full(noise["shape"], told(level), noise["dtype"]),
            **conditions,
        }
        answer = ask(feeds) if guided is None else guided(ask, feeds)
        clean = schedules.clean(config["prediction"], answer, x, level)
        return clean if clip is None else _clipped(clean, clip)

    return denoise


def inpainting(denoise: Denoiser, image: Array, mask: Array) -> Denoiser:
    """A denoiser that knows the sample where `mask` is 0: every sampler then keeps the image."""
    return lambda x, level: mask * denoise(x, level) + (1 - mask) * image


def _told(noise: Mapping[str, Any]) -> Callable[[Level], float]:
    """What the graph is told of a level; whole where its input takes whole numbers."""
    if noise["kind"] == "sigma":
        return lambda level: level.sigma
    if noise["kind"] == "flow":
        return lambda level: float(noise.get("scale", 1000.0) * level.sigma)
    trained = schedules.trained(noise["schedule"])
    digits = 0 if np.dtype(noise["dtype"]).kind in "iu" else 6
    return lambda level: round(schedules.timestep(trained, level), digits)


def _clipped(clean: Array, clip: Mapping[str, float]) -> Array:
    """An estimate of the clean sample, kept in range.

    Either within ±`limit`, or by dynamic thresholding (arXiv 2205.11487, 2.3): within the
    `quantile` of its own absolute values, of 1 at least and `limit` at most, and divided by that.
    """
    limit = clip["limit"]
    if "quantile" not in clip:
        return np.clip(clean, -limit, limit)
    bound = np.float32(np.clip(np.quantile(np.abs(clean), clip["quantile"]), 1.0, limit))
    return np.clip(clean, -bound, bound) / bound
