"""Between pictures and what a denoiser works on: encoder, decoder, and images as conditions.

A bundle whose denoiser works on latents has a graph `decoder` (`latent` -> `image`) and perhaps
`encoder` (`image` -> `latent`); `image_shape` in its config is [c, h, w] of its pictures. The
graphs scale the latents themselves. An image is a condition of the denoiser where the config has

    upscale     {"input", "shape": [c, h, w], "resize", "noise": {"condition", "schedule"}}: a small
                image, enlarged to the sample's size where `resize` says so, with noise added at the
                level that the condition (a timestep of the schedule) names
    inpainting  {"mask", "image"}: inputs that take the mask and the image without what it covers
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from leangen.errors import RequestError
from leangen.families import imaging
from leangen.records import Output
from leangen.samplers import schedules
from leangen.session import Session

if TYPE_CHECKING:
    from leangen.families.diffusion import Request

Array = np.ndarray[Any, Any]


def image_shape(config: Mapping[str, Any]) -> tuple[int, ...]:
    """[c, h, w] of a bundle's pictures."""
    return tuple(config.get("image_shape") or config["sample"]["shape"])


def rows(samples: Sequence[Array]) -> Output:
    """Latents [1, ...] as the rows of a table, which a decoder in another bundle takes."""
    table = np.concatenate([sample.reshape(1, -1) for sample in samples])
    columns = [f"z{place}" for place in range(table.shape[1])]
    return Output(array=table, media="table", extra={"columns": columns})


def decoded(session: Session, latent: Array) -> Array:
    """A picture [1, c, h, w] of what was denoised."""
    if "decoder" not in session.bundle.graphs:
        return latent
    return session.run("decoder", {"latent": latent})[0]


def encoded(session: Session, image: Array) -> Array:
    """A picture [1, c, h, w] as the denoiser works on it.

    Raises RequestError where the bundle's denoiser works on latents and it has no encoder.
    """
    if "decoder" not in session.bundle.graphs:
        return image
    if "encoder" not in session.bundle.graphs:
        raise RequestError(
            f"{session.bundle.name} has no encoder, so it cannot start from an image: leave it out"
        )
    return session.run("encoder", {"image": image})[0]


def shrunk(mask: Array, shape: Sequence[int]) -> Array:
    """A mask [1, 1, h, w] in the size of the latents, each the nearest of its pixels.

    >>> shrunk(np.arange(16.0).reshape(1, 1, 4, 4), [4, 2, 2])[0, 0].tolist()
    [[0.0, 2.0], [8.0, 10.0]]
    """
    rows, columns = (
        np.arange(small) * size // small
        for small, size in zip(shape[-2:], mask.shape[-2:], strict=True)
    )
    return mask[:, :, rows[:, None], columns]


def inpainting_feeds(session: Session, image: Array, mask: Array) -> dict[str, Array]:
    """What a denoiser trained to inpaint is fed: where to paint, and the rest of the image."""
    names = session.bundle.config["inpainting"]
    covered = (mask >= 0.5).astype(np.float32)
    shape = session.bundle.config["sample"]["shape"]
    rest = encoded(session, image * (1 - covered))
    return {names["mask"]: shrunk(covered, shape), names["image"]: rest}


def each(config: Mapping[str, Any], request: Request) -> Iterator[Request]:
    """The request once for each sample; of several images to enlarge, each with its own."""
    image = request.image
    several = "upscale" in config and isinstance(image, np.ndarray) and image.ndim == 4
    if not several or len(image) == 1:
        for _ in range(request.count):
            yield request
        return
    if request.count not in (1, len(image)):
        raise RequestError(
            f"count is {request.count}, but there are {len(image)} images to enlarge: leave it out"
        )
    for one in image:
        yield replace(request, image=one, count=1)


def upscaling_feeds(
    session: Session, image: Any, conditions: Mapping[str, Array], rng: np.random.Generator
) -> dict[str, Array]:
    """The small image that a super-resolution model is fed, with the noise it was trained with.

    Raises RequestError without an image, or for one of another shape.
    """
    config = session.bundle.config
    entry = config["upscale"]
    small = imaging.picture(image, entry["shape"], config.get("range"))
    if entry.get("resize"):
        small = enlarged(small, config["sample"]["shape"][1:])
    noise = entry["noise"]
    level = schedules.trained(noise["schedule"])[int(conditions[noise["condition"]].item())]
    fresh = rng.standard_normal(small.shape, np.float32)
    return {entry["input"]: np.float32(level.alpha) * small + np.float32(level.sigma) * fresh}


def enlarged(image: Array, size: Sequence[int]) -> Array:
    """An image [n, c, h, w] in another size, bilinear, corners on corners.

    >>> enlarged(np.float32([[[[0, 1]]]]), [1, 3])[0, 0].tolist()
    [[0.0, 0.5, 1.0]]
    """
    for axis, wanted in zip((2, 3), size, strict=True):
        have = image.shape[axis]
        place = np.linspace(0, have - 1, wanted)
        low = np.minimum(place.astype(int), max(have - 2, 0))
        high = np.minimum(low + 1, have - 1)
        shape = [1] * image.ndim
        shape[axis] = wanted
        share = (place - low).astype(np.float32).reshape(shape)
        image = image.take(low, axis) * (1 - share) + image.take(high, axis) * share
    return image
