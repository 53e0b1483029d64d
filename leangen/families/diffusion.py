"""Diffusion, flow-matching and consistency models: from noise to a sample in denoising steps.

The bundle has the graph `model`, and in its config

    sample       {"input", "output", "shape": [c, h, w]}
    noise_level  {"input", "kind", "shape", "dtype"}, and by kind: `sigma` "min" and "max";
                 `timestep` "schedule" (see samplers.schedules.trained), "spacing", "offset",
                 "distilled" and "inner" (samplers.schedules.spaced); `flow` "scale" (the input is
                 scale * t), "shift", "lowest" (samplers.schedules.flow)
    prediction   `sample`, `epsilon`, `v` or `flow`: what the graph's output estimates
    clip         {"limit"}, perhaps "quantile": how estimates are kept in range, or null
    sampler, steps            the defaults
    conditions   name -> {"min", "max", "default", "shape", "dtype"}, perhaps "input" (of the graph,
                 if called otherwise), "names" (name -> value) and "unconditional", the value that
                 tells the model nothing, for classifier-free guidance
    guidance     the default scale, or null
    guidance_input            the input that takes the scale, of models distilled with guidance
    range        [low, high] of the values of a picture, or null
    render       `relief` for heightmaps, or null
    latents      true where the samples are no pictures, but what another bundle decodes

A UNet may have its outer part as the graph `shallow`, which takes the output `deep` of `model`.
Text as a condition is `families.prompting`'s, latents and images as conditions `families.latents`'.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from leangen import samplers
from leangen.errors import RequestError
from leangen.families import denoising, imaging, latents, prompting, step_choice
from leangen.families.conditioning import Given
from leangen.families.sampling import check, is_real, is_whole
from leangen.records import Media, Output, Step
from leangen.samplers import Array
from leangen.session import Session

UNIT = "sample"
MOST_STEPS = 10_000
MEDIA: Media = "image"
INPUTS = ("prompt",)
EXAMPLE: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Samples to draw; None means the model's default."""

    prompt: str | None = None
    """What to draw, for a model that reads text; None is an empty text."""
    negative_prompt: str | None = None
    """What guidance leads away from; None is what the model was trained with."""
    count: int = 1
    """Samples to draw, one after another; of several images to enlarge, as many as there are."""
    seed: int = 0
    """Same seed, same noise, in every scheme."""
    steps: int | None = None
    """`auto`, of an engine's requests, chooses them and the sampler: see `step_choice`."""
    sampler: str | None = None
    """A name in `samplers.SAMPLERS`."""
    reuse: int | None = None
    """Run the inner levels of a UNet at every so many steps only, and reuse what they said between
    (DeepCache, arXiv 2312.00858): cheaper, not the same; None is at every step."""
    conditions: Mapping[str, Any] = field(default_factory=dict)
    """For example `{"difficulty": 0.5}`, `{"class": "otter"}` or `{"crop": [0, 0]}`."""
    guidance: float | None = None
    """Scale of classifier-free guidance: 1 is none, more exaggerates the conditions."""
    guidance_rescale: float = 0.0
    """0 to 1: how far guidance gives back the contrast it has added."""
    image: Any = None
    """To start from: an array [h, w, c] of the model's values, or the path of a .npy or picture.
    For a super-resolution model the small image, or an array [n, h, w, c] of several."""
    strength: float | None = None
    """How much of the way to noise the image goes, and how many of the steps back: 0 to 1."""
    mask: Any = None
    """What of the image to paint anew: an array [h, w], 1 where to and 0 elsewhere, or a path."""

    def __post_init__(self) -> None:
        imaging.check_common(self)
        steps, reuse, guidance = self.steps, self.reuse, self.guidance
        rescale, strength, named = self.guidance_rescale, self.strength, self.sampler
        check(
            self,
            prompt=(isinstance(self.prompt, str | None), "text"),
            negative_prompt=(isinstance(self.negative_prompt, str | None), "text"),
            steps=(
                steps is None or (is_whole(steps, 1) and steps <= MOST_STEPS),
                f"a whole number, 1 to {MOST_STEPS}",
            ),
            sampler=(named is None or isinstance(named, str), "a name"),
            reuse=(reuse is None or is_whole(reuse, 1), "1 (at every step) or more"),
            guidance=(guidance is None or is_real(guidance), "a number"),
            guidance_rescale=(is_real(rescale) and 0 <= rescale <= 1, "0 to 1"),
            strength=(
                strength is None or (is_real(strength) and 0 < strength <= 1),
                "more than 0, up to 1",
            ),
        )
        if named is not None:
            samplers.get(named)
        for name in ("strength", "mask"):
            if getattr(self, name) is not None and self.image is None:
                raise RequestError(f"{name} is given without an image: give the image it is for")

    def describe(self) -> dict[str, Any]:
        """The options as plain JSON types; of texts and images only whether there are any."""
        return {
            "prompt": self.prompt is not None,
            "negative_prompt": self.negative_prompt is not None,
            "count": self.count,
            "seed": self.seed,
            "steps": self.steps,
            "sampler": self.sampler,
            "reuse": self.reuse,
            "conditions": imaging.described_conditions(self.conditions),
            "guidance": self.guidance,
            "guidance_rescale": self.guidance_rescale,
            "image": self.image is not None,
            "strength": self.strength,
            "mask": self.mask is not None,
        }


def media(config: Mapping[str, Any]) -> Media:
    """Pictures, or latents as rows."""
    return "table" if config.get("latents") else MEDIA


def prepare(session: Session) -> None:
    """Open the graphs that every generation uses."""
    prompting.prepare(session)
    for role in ("model", "decoder"):
        if role in session.bundle.graphs:
            session.graph(role)


def run(session: Session, request: Request) -> Generator[Step, None, Output]:
    """Draw samples: `encode` what the request says, `denoise` in steps, `decode` latents.

    The last step of a sample completes it.
    """
    config = session.bundle.config
    steps = len(_levels(config, request)) - 1
    given = Given.of(session, request)
    pictured = request.image is not None and "encoder" in session.bundle.graphs
    if prompting.reads_text(config) or pictured:
        yield Step(kind="encode", units=0)
    decodes = "decoder" in session.bundle.graphs
    drawn = []
    for index, asked in enumerate(latents.each(config, request)):
        states = _states(session, asked, given, imaging.generator(request.seed, index))
        for step in range(1, steps + 1):
            x = next(states)
            units = float(step == steps and not decodes)
            picture = None if decodes or media(config) != MEDIA else np.moveaxis(x[0], 0, -1)
            yield Step(kind="denoise", units=units, picture=picture)
        drawn.append(latents.decoded(session, x))
        if decodes:
            yield Step(kind="decode", units=1)
    if config.get("latents"):
        return latents.rows(drawn)
    return Output(array=imaging.images(drawn), media=MEDIA, extra=imaging.rendering(config))


def trajectory(
    session: Session, request: Request, index: int = 0, *, rng: Any = None
) -> Iterator[Array]:
    """What each step leaves of sample `index`, [1, c, h, w]; the last is the finished picture.

    `rng` draws the noise in place of the generator of the request's seed.
    """
    rng = imaging.generator(request.seed, index) if rng is None else rng
    states = _states(session, request, Given.of(session, request), rng)
    x = next(states)
    for following in states:
        yield x
        x = following
    yield latents.decoded(session, x)


def _states(
    session: Session, request: Request, given: Given, rng: np.random.Generator
) -> Iterator[Array]:
    """What each step leaves of a sample."""
    config = session.bundle.config
    sampler = samplers.get(request.sampler or config["sampler"])
    levels = _levels(config, request)
    shape = tuple(config["sample"]["shape"])
    x = rng.standard_normal((1, *shape), np.float32)
    conditions = dict(given.conditions)
    if "upscale" in config:
        conditions |= latents.upscaling_feeds(session, request.image, conditions, rng)
    denoise = denoising.denoiser(session, conditions, given.guided, reuse=request.reuse or 1)
    if given.image is None:
        x = x * np.float32(denoising.pure_noise(config, levels[0]))
    else:
        x = levels[0].alpha * given.image + np.float32(levels[0].sigma) * x
        if given.mask is not None:
            denoise = denoising.inpainting(denoise, given.image, given.mask)
    yield from sampler.sample(denoise, x, levels, rng)


def _levels(config: Mapping[str, Any], request: Request) -> list[samplers.Level]:
    steps = config["steps"] if request.steps is None else request.steps
    return denoising.levels(config, steps, request.strength)


_CALIBRATION_STEPS = 4
_TRIAL_PROMPTS = (
    "a photograph of a lighthouse on a rocky coast at dusk",
    "an oil painting of a bowl of fruit on a wooden table",
    "a portrait of an old man with a white beard, soft light",
)


def settle(engine: step_choice.Draws, options: Mapping[str, Any]) -> Any:
    """The options of a request with what is to be measured first; see `step_choice`."""
    trials = [
        {
            name: value
            for name in ("prompt", "image", "mask", "seed", "conditions")
            if (value := getattr(trial(engine.session, seed), name)) is not None
        }
        for seed in step_choice.SEEDS
    ]
    return step_choice.settle(engine, options, trials)


def trial(session: Session, seed: int) -> Request:
    """A request that the bundle can carry out without being given anything."""
    config = session.bundle.config
    shape = config["upscale"]["shape"] if "upscale" in config else latents.image_shape(config)
    image = mask = None
    if {"upscale", "inpainting"} & set(config):
        image = _picture(seed, shape, config)
    if "inpainting" in config:
        mask = np.zeros(shape[1:], np.float32)
        mask[: shape[1] // 2] = 1
    prompt = _TRIAL_PROMPTS[seed % len(_TRIAL_PROMPTS)] if prompting.reads_text(config) else None
    conditions = imaging.directions(config, seed)
    return Request(prompt=prompt, seed=seed, image=image, mask=mask, conditions=conditions)


def calibration_requests(session: Session) -> list[Request]:
    """Three samples across the range of the conditions, of a few steps each.

    They begin with pictures where there is an encoder, so that it is run too.
    """
    config = session.bundle.config
    requests = []
    for index, share in enumerate((0.5, 0.0, 1.0)):
        request = replace(
            trial(session, imaging.CALIBRATION_SEED + index),
            steps=min(config["steps"], _CALIBRATION_STEPS),
            conditions=imaging.spread_conditions(config, share),
            reuse=2 if "shallow" in session.bundle.graphs else None,
        )
        if request.image is None and "encoder" in session.bundle.graphs:
            picture = _picture(request.seed, latents.image_shape(config), config)
            request = replace(request, image=picture, strength=1.0)
        requests.append(request)
    return requests


def _picture(seed: int, shape: Sequence[int], config: Mapping[str, Any]) -> Array:
    """A picture [h, w, c] without fine detail."""
    smooth = imaging.smooth_noise(np.random.default_rng(seed), shape, config.get("range"))
    return np.moveaxis(smooth[0], 0, -1)


def show(session: Session, images: Array, *, levels: int) -> None:
    """Run the denoiser on images [n, c, h, w] at the model's noise levels, once for each of both.

    Images take turns over `levels` noise levels, spread from the highest to the lowest.
    """
    given = Given.of(session, Request(steps=levels))
    denoise = denoising.denoiser(session, given.conditions, given.guided)
    visited = denoising.levels(session.bundle.config, levels)
    rng = np.random.default_rng(imaging.CALIBRATION_SEED)
    for index in range(max(levels, len(images))):
        level = visited[index % levels]
        image = latents.encoded(session, images[index % len(images)][None])
        noise = rng.standard_normal(image.shape, np.float32)
        denoise(level.alpha * image + level.sigma * noise, level)
