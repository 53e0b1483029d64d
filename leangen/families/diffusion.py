"""Diffusion, flow-matching and consistency models: from noise to a sample in denoising steps.

The bundle has one graph, `model`, and in its config

    sample       {"input", "output", "shape": [c, h, w]}
    noise_level  {"input", "kind", "shape", "dtype"}, and by kind: `sigma` "min" and "max";
                 `timestep` "schedule" (see samplers.schedules.trained), "spacing" and "offset"
                 (samplers.schedules.spaced); `flow` "scale" (the input is scale * t), "shift"
    prediction   `sample`, `epsilon`, `v` or `flow`: what the graph's output estimates
    sampler, steps            the defaults
    conditions   name -> {"min", "max", "default", "shape", "dtype"}, and "unconditional", the value
                 that tells the model nothing, for classifier-free guidance
    guidance     the default scale, or null
    range        [low, high] of the values of a sample, or null
    render       `relief` for heightmaps, or null
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from leangen import samplers
from leangen.errors import RequestError
from leangen.families import guidance, imaging
from leangen.records import Media, Output, Step
from leangen.samplers import Array, Denoiser, Level, schedules
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
    """A name in `samplers.SAMPLERS`."""
    conditions: Mapping[str, float] = field(default_factory=dict)
    """For example `{"difficulty": 0.5}`."""
    guidance: float | None = None
    """Scale of classifier-free guidance: 1 is none, more exaggerates the conditions."""
    guidance_rescale: float = 0.0
    """0 to 1: how far guidance gives back the contrast it has added."""
    image: Any = None
    """To start from: an array [h, w, c] of the model's values, or the path of a .npy or picture."""
    strength: float | None = None
    """How much of the way to noise the image goes, and how many of the steps back: 0 to 1."""
    mask: Any = None
    """What of the image to paint anew: an array [h, w], 1 where to and 0 elsewhere, or a path."""

    def __post_init__(self) -> None:
        imaging.check_count(self.count, self.seed)
        if self.steps is not None and self.steps < 1:
            raise RequestError(f"steps is {self.steps}, expected 1 or more")
        if self.sampler is not None:
            samplers.get(self.sampler)
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise RequestError(f"guidance is {self.guidance}, expected a number")
        if not 0 <= self.guidance_rescale <= 1:
            raise RequestError(f"guidance_rescale is {self.guidance_rescale}, expected 0 to 1")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise RequestError(f"strength is {self.strength}, expected more than 0, up to 1")
        for name in ("strength", "mask"):
            if getattr(self, name) is not None and self.image is None:
                raise RequestError(f"{name} is given without an image: give the image it is for")
        if self.image is not None and self.strength is None and self.mask is None:
            raise RequestError(
                "image is given alone: give strength (how far to leave it) or a mask (where to)"
            )

    def describe(self) -> dict[str, Any]:
        """The options as plain JSON types; of an image and a mask only whether there is one."""
        return {
            "count": self.count,
            "seed": self.seed,
            "steps": self.steps,
            "sampler": self.sampler,
            "conditions": dict(self.conditions),
            "guidance": self.guidance,
            "guidance_rescale": self.guidance_rescale,
            "image": self.image is not None,
            "strength": self.strength,
            "mask": self.mask is not None,
        }


def prepare(session: Session) -> None:
    """Open the graph."""
    session.graph("model")


def run(session: Session, request: Request) -> Generator[Step, None, Output]:
    """Draw samples; one `denoise` step per sampler step, the last of a sample completing it."""
    config = session.bundle.config
    steps = len(_levels(config, request)) - 1
    drawn = []
    for index in range(request.count):
        for step, x in enumerate(trajectory(session, request, index), start=1):
            if step == steps:
                drawn.append(x)
            yield Step(kind="denoise", units=float(step == steps))
    return Output(array=imaging.images(drawn), media=MEDIA, extra=imaging.rendering(config))


def trajectory(session: Session, request: Request, index: int = 0) -> Iterator[Array]:
    """What each step leaves of sample `index`, [1, c, h, w]; the last is the sample."""
    config = session.bundle.config
    sampler = samplers.get(request.sampler or config["sampler"])
    denoise = _denoiser(session, request)
    levels = _levels(config, request)
    rng = imaging.generator(request.seed, index)
    shape = tuple(config["sample"]["shape"])
    x = rng.standard_normal((1, *shape), np.float32) * np.float32(levels[0].sigma)
    if request.image is not None:
        image = imaging.picture(request.image, shape, config.get("range"))
        x = x + levels[0].alpha * image
        if request.mask is not None:
            denoise = _inpainting(denoise, image, imaging.mask(request.mask, shape))
    yield from sampler.sample(denoise, x, levels, rng)


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
    request = Request(steps=levels)
    denoise = _denoiser(session, request)
    visited = _levels(session.bundle.config, request)
    rng = np.random.default_rng(imaging.CALIBRATION_SEED)
    for index in range(max(levels, len(images))):
        level = visited[index % levels]
        image = images[index % len(images)][None]
        noise = rng.standard_normal(image.shape, np.float32)
        denoise(level.alpha * image + level.sigma * noise, level)


def _levels(config: Mapping[str, Any], request: Request) -> list[Level]:
    """The noise levels to visit: all of them, or with an image the last `strength` of them."""
    noise = config["noise_level"]
    steps = config["steps"] if request.steps is None else request.steps
    if noise["kind"] == "sigma":
        levels = schedules.karras(steps, noise["min"], noise["max"])
    elif noise["kind"] == "flow":
        levels = schedules.flow(steps, noise.get("shift", 1.0))
    else:
        trained = schedules.trained(noise["schedule"])
        if steps > len(trained):
            raise RequestError(
                f"steps is {steps}, expected at most the {len(trained)} this model was trained with"
            )
        spacing = noise.get("spacing", "linspace")
        levels = schedules.spaced(trained, steps, spacing, noise.get("offset", 0))
    if request.strength is None:
        return levels
    kept = int(steps * request.strength)
    if kept < 1:
        raise RequestError(
            f"strength {request.strength:g} of {steps} steps is less than one step: "
            f"expected {1 / steps:g} or more"
        )
    return levels[steps - kept :]


def _denoiser(session: Session, request: Request) -> Denoiser:
    """The graph as a denoiser, guided where that is asked for."""
    config = session.bundle.config
    sample, noise = config["sample"], config["noise_level"]
    conditions = imaging.condition_feeds(config, request.conditions)
    inputs = {each.name: each.shape for each in session.graph("model").get_inputs()}
    guided = guidance.plan(config, request.guidance, request.guidance_rescale, inputs)
    noise_input = _noise_input(noise)

    def ask(feeds: Mapping[str, Any]) -> Array:
        answer: Array = session.run("model", feeds, [sample["output"]])[0]
        return answer

    def denoise(x: Array, level: Level) -> Array:
        feeds = {
            sample["input"]: x,
            noise["input"]: np.full(noise["shape"], noise_input(level), noise["dtype"]),
            **conditions,
        }
        answer = ask(feeds) if guided is None else guided(ask, feeds)
        return schedules.clean(config["prediction"], answer, x, level)

    return denoise


def _noise_input(noise: Mapping[str, Any]) -> Callable[[Level], float]:
    """What the graph is told of a level; whole where its input takes whole numbers."""
    if noise["kind"] == "sigma":
        return lambda level: level.sigma
    if noise["kind"] == "flow":
        return lambda level: float(noise.get("scale", 1000.0) * level.sigma)
    trained = schedules.trained(noise["schedule"])
    digits = 0 if np.dtype(noise["dtype"]).kind in "iu" else 6
    return lambda level: round(schedules.timestep(trained, level), digits)


def _inpainting(denoise: Denoiser, image: Array, mask: Array) -> Denoiser:
    """A denoiser that knows the sample where `mask` is 0: every sampler then keeps the image."""
    return lambda x, level: mask * denoise(x, level) + (1 - mask) * image
