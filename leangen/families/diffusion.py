"""Diffusion and consistency models: from noise to a sample in one or more denoising steps.

The bundle has one graph, `model`, and in its config

    sample       {"input", "output", "shape": [c, h, w]}
    noise_level  {"input", "kind": "sigma" or "timestep", "shape", "dtype"}; for sigma also
                 "min" and "max", for timestep "schedule" (see samplers.schedules.vp_sigmas)
    prediction   `sample`, `epsilon` or `v`: what the graph's output estimates
    sampler, steps            the defaults
    conditions   name -> {"min", "max", "default", "shape", "dtype"}
    range        [low, high] of the values of a sample, or null
    render       `relief` for heightmaps, or null
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from leangen import samplers
from leangen.errors import RequestError
from leangen.families import imaging
from leangen.records import Media, Output, Step
from leangen.samplers import Array, Denoiser, schedules
from leangen.session import Session

UNIT = "sample"
MEDIA: Media = "image"
INPUTS = ()
EXAMPLE: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Samples to draw; None means the model's default."""

    count: int = 1
    """Samples to draw, one after another."""
    seed: int = 0
    """Same seed, same noise, in every scheme."""
    steps: int | None = None
    sampler: str | None = None
    """`consistency`, `ddim`, `euler` or `heun`."""
    conditions: Mapping[str, float] = field(default_factory=dict)
    """For example `{"difficulty": 0.5}`."""

    def __post_init__(self) -> None:
        imaging.check_count(self.count, self.seed)
        if self.steps is not None and self.steps < 1:
            raise RequestError(f"steps is {self.steps}, expected 1 or more")
        if self.sampler is not None:
            samplers.get(self.sampler)

    def describe(self) -> dict[str, Any]:
        """The options as plain JSON types."""
        return {
            "count": self.count,
            "seed": self.seed,
            "steps": self.steps,
            "sampler": self.sampler,
            "conditions": dict(self.conditions),
        }


def prepare(session: Session) -> None:
    """Open the graph."""
    session.graph("model")


def run(session: Session, request: Request) -> Generator[Step, None, Output]:
    """Draw samples; one `denoise` step per sampler step, the last of a sample completing it."""
    steps = _steps(session, request)
    drawn = []
    for index in range(request.count):
        for step, x in enumerate(trajectory(session, request, index), start=1):
            if step == steps:
                drawn.append(x)
            yield Step(kind="denoise", units=float(step == steps))
    return Output(
        array=imaging.images(drawn), media=MEDIA, extra=imaging.rendering(session.bundle.config)
    )


def trajectory(session: Session, request: Request, index: int = 0) -> Iterator[Array]:
    """What each step leaves of sample `index`, [1, c, h, w]; the last is the sample."""
    config = session.bundle.config
    sampler = samplers.get(request.sampler or config["sampler"])
    conditions = imaging.condition_feeds(config, request.conditions)
    denoise, sigmas = _denoiser(session, conditions, _steps(session, request))
    rng = imaging.generator(request.seed, index)
    shape = (1, *config["sample"]["shape"])
    x = rng.standard_normal(shape, np.float32) * np.float32(sigmas[0])
    yield from sampler.sample(denoise, x, sigmas, rng)


def _steps(session: Session, request: Request) -> int:
    return int(session.bundle.config["steps"] if request.steps is None else request.steps)


def calibration_requests(session: Session) -> list[Request]:
    """Three samples across the range of the conditions."""
    return [
        Request(
            seed=imaging.CALIBRATION_SEED + index,
            conditions=imaging.spread_conditions(session.bundle.config, share),
        )
        for index, share in enumerate((0.5, 0.0, 1.0))
    ]


def show(session: Session, images: Array, *, levels: int) -> None:
    """Run the graph on images [n, c, h, w] at the model's noise levels, once per level and image.

    Images take turns over `levels` noise levels, spread from the highest to the lowest.
    """
    config = session.bundle.config
    conditions = imaging.condition_feeds(config, {})
    denoise, sigmas = _denoiser(session, conditions, levels)
    rng = np.random.default_rng(imaging.CALIBRATION_SEED)
    for index in range(max(levels, len(images))):
        sigma = sigmas[index % levels]
        image = images[index % len(images)][None]
        noise = rng.standard_normal(image.shape, np.float32)
        denoise(image + np.float32(sigma) * noise, sigma)


def _denoiser(
    session: Session, conditions: Mapping[str, Any], steps: int
) -> tuple[Denoiser, list[float]]:
    """The graph as a denoiser in sigma, and the noise levels to visit."""
    config = session.bundle.config
    sample, level = config["sample"], config["noise_level"]

    def model(x: Array, noise_level: float) -> Array:
        feeds = {
            sample["input"]: x,
            level["input"]: np.full(level["shape"], noise_level, level["dtype"]),
            **conditions,
        }
        answer: Array = session.run("model", feeds, [sample["output"]])[0]
        return answer

    if level["kind"] == "sigma":
        sigmas = schedules.karras(steps, level["min"], level["max"])
        return schedules.variance_exploding(model, config["prediction"]), sigmas
    trained = schedules.vp_sigmas(level["schedule"])
    if steps > len(trained):
        raise RequestError(
            f"steps is {steps}, expected at most the {len(trained)} this model was trained with"
        )
    denoise = schedules.variance_preserving(model, config["prediction"], trained)
    return denoise, schedules.spaced(trained, steps)
