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
        visited = schedules.flow(steps, noise.get("shift", 1.0), noise.get("lowest"))
    else:
        trained, spacing = schedules.trained(noise["schedule"]), noise.get("spacing", "linspace")
        most = noise.get("distilled", len(trained)) if spacing == "distilled" else len(trained)
        most -= bool(noise.get("inner"))
        if steps > most:
            raise RequestError(
                f"steps is {steps}, expected at most {most} of the {len(trained)} noise levels "
                "that this model was trained with"
            )
        options = {key: noise[key] for key in ("offset", "distilled", "inner") if key in noise}
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


def pure_noise(config: Mapping[str, Any], first: Level) -> float:
    """The spread of noise that stands for a sample at the first level.

    Of variance-preserving models, whose samples have unit variance at every level, that.
    """
    return 1.0 if config["noise_level"]["kind"] == "timestep" else first.sigma


def denoiser(
    session: Session,
    conditions: Mapping[str, Array],
    guided: Guidance | None,
    *,
    reuse: int = 1,
) -> Denoiser:
    """The graph `model` as a denoiser of samples [1, c, h, w] under these conditions.

    Of `reuse` calls one runs it whole; the others run `shallow` on the deep features of that one.
    """
    config = session.bundle.config
    sample, noise = config["sample"], config["noise_level"]
    told, clip = _told(noise), config.get("clip")
    ask = _Answers(session, sample["output"], reuse)

    def denoise(x: Array, level: Level) -> Array:
        ask.begin()
        feeds = {
            sample["input"]: x,
            noise["input"]: np.full(noise["shape"], told(level), noise["dtype"]),
            **conditions,
        }
        answer = ask(feeds) if guided is None else guided(ask, feeds)
        clean = schedules.clean(config["prediction"], answer, x, level)
        return clean if clip is None else _clipped(clean, clip)

    return denoise


class _Answers:
    """What the graph answers, call by call."""

    def __init__(self, session: Session, output: str, reuse: int) -> None:
        if reuse > 1 and "shallow" not in session.bundle.graphs:
            raise RequestError(
                f"reuse is {reuse}, but {session.bundle.name} was exported without it: export it "
                "with --option reuse=true"
            )
        self._session, self._output, self._reuse = session, output, reuse
        self._calls, self._place = -1, 0
        self._deep: list[Array] = []
        """By the place of a run in its call: guidance may make two."""

    def begin(self) -> None:
        """A new call of the denoiser."""
        self._calls, self._place = self._calls + 1, 0
        if self._calls % self._reuse == 0:
            self._deep = []

    def __call__(self, feeds: Mapping[str, Any]) -> Array:
        """The answer to what the graph is fed."""
        place, self._place = self._place, self._place + 1
        if place < len(self._deep):
            wanted = {each.name for each in self._session.graph("shallow").get_inputs()}
            given = {name: value for name, value in feeds.items() if name in wanted}
            given["deep"] = self._deep[place]
            return self._session.run("shallow", given, [self._output])[0]
        if self._reuse == 1:
            return self._session.run("model", feeds, [self._output])[0]
        answer, deep = self._session.run("model", feeds, [self._output, "deep"])
        self._deep.append(deep)
        return answer


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
