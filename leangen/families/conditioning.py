"""What a request says, encoded: texts, conditions and images as the denoiser takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from leangen.errors import RequestError
from leangen.families import guidance, imaging, latents, prompting
from leangen.samplers import Array
from leangen.session import Session

if TYPE_CHECKING:
    from leangen.families.diffusion import Request


@dataclass(frozen=True, slots=True)
class Given:
    """What a request says, as the denoiser takes it."""

    conditions: Mapping[str, Array]
    guided: guidance.Guidance | None
    image: Array | None
    """[1, c, h, w], as what is denoised."""
    mask: Array | None
    """[1, 1, h, w] in that size."""

    @classmethod
    def of(cls, session: Session, request: Request) -> Given:
        """Read and encode texts and images; RequestError for what does not fit the model."""
        config = session.bundle.config
        prompting.check(session, request.prompt, request.negative_prompt)
        conditions = imaging.condition_feeds(config, request.conditions)
        free = guidance.unconditional(config)
        scale = guidance.wanted(config, request.guidance)
        embedded = config.get("guidance_input")
        if embedded is not None:
            conditions[embedded] = np.array([1.0 if scale is None else scale], np.float32)
            scale = None
        if request.negative_prompt is not None and scale is None:
            raise RequestError(
                "negative_prompt is given without guidance away from it: give a guidance above 1"
                if embedded is None
                else f"{session.bundle.name} was distilled with its guidance and takes no "
                "negative_prompt: leave it out"
            )
        texts = prompting.feeds(session, request.prompt)
        if texts and scale is not None:
            free |= prompting.negative_feeds(session, request.negative_prompt, texts)
        image, mask = _image(session, request)
        if "inpainting" in config and image is not None and mask is not None:
            conditions |= latents.inpainting_feeds(session, image, mask)
        inputs = {each.name: each.shape for each in session.graph("model").get_inputs()}
        guided = None
        if embedded is None:
            guided = guidance.plan(config, request.guidance, request.guidance_rescale, free, inputs)
        if "inpainting" in config:  # it is told of both, and begins with noise unless asked not to
            image, mask = (None if request.strength is None else image), None
        if image is not None:
            image = latents.encoded(session, image)
        if mask is not None:
            mask = latents.shrunk(mask, config["sample"]["shape"])
        return cls(conditions | texts, guided, image, mask)


def _image(session: Session, request: Request) -> tuple[Array | None, Array | None]:
    """The picture to start from, [1, c, h, w], and where to paint, [1, 1, h, w]."""
    config = session.bundle.config
    name = session.bundle.name
    if "upscale" in config:
        if request.image is None:
            raise RequestError(f"{name} enlarges an image: give the small image")
        if request.strength is not None or request.mask is not None:
            raise RequestError(f"{name} enlarges an image: leave strength and mask out")
        return None, None
    if "inpainting" in config and (request.image is None or request.mask is None):
        raise RequestError(f"{name} paints a part of an image anew: give an image and a mask")
    if request.image is None:
        return None, None
    if request.strength is None and request.mask is None:
        raise RequestError(
            "image is given alone: give strength (how far to leave it) or a mask (where to)"
        )
    shape = latents.image_shape(config)
    image = imaging.picture(request.image, shape, config.get("range"))
    return image, None if request.mask is None else imaging.mask(request.mask, shape)
