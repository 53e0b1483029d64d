"""One-shot models: a latent in and an image out (GAN generators, VAE decoders), or the reverse.

The bundle has one graph, `model`, and in its config

    latent       {"input", "shape" without the batch, "kind": "normal" or "uniform" on [-1, 1]},
                 or, for an encoder, image {"input", "shape": [c, h, w]}
    output       the graph's output: an image [1, c, h, w], or an encoder's latent
    conditions   name -> {"min", "max", "default", "shape", "dtype"}
    range        [low, high] of the values of an image, or null
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from leangen.errors import RequestError
from leangen.families import imaging, latents
from leangen.records import Media, Output, Step
from leangen.session import Session

UNIT = "image"
MEDIA: Media = "image"
INPUTS = ()
EXAMPLE: Mapping[str, Any] = {}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Images to decode from latents, or an image to encode."""

    count: int = 1
    """Images to make, one after another."""
    seed: int = 0
    """Same seed, same latents, in every scheme."""
    conditions: Mapping[str, float] = field(default_factory=dict)
    latent: Any = None
    """Decoders: latents [n, ...] of the model's shape or flattened, or a .npy file of them, in
    place of random ones; `count` is then theirs."""
    image: Any = None
    """Encoders: an array [h, w, c] of the model's values, or the path of a .npy or picture. Without
    one, smooth noise of the seed: for benchmarks."""

    def __post_init__(self) -> None:
        imaging.check_common(self)

    def describe(self) -> dict[str, Any]:
        """The options as plain JSON types."""
        given = {name: True for name in ("latent", "image") if getattr(self, name) is not None}
        conditions = imaging.described_conditions(self.conditions)
        return {"count": self.count, "seed": self.seed, "conditions": conditions} | given


def media(config: Mapping[str, Any]) -> Media:
    """Encoders put out latents."""
    return "table" if "image" in config else MEDIA


def prepare(session: Session) -> None:
    """Open the graph."""
    session.graph("model")


def run(session: Session, request: Request) -> Generator[Step, None, Output]:
    """Decode latents or encode images; one `decode` or `encode` step per image.

    The output's array has images [n, h, w, c], or latents [n, d].
    """
    config = session.bundle.config
    encoder = "image" in config
    feed = config["image" if encoder else "latent"]["input"]
    conditions = imaging.condition_feeds(config, request.conditions)
    made = []
    for sample in _images(config, request) if encoder else _latents(config, request):
        made += session.run("model", {feed: sample, **conditions}, [config["output"]])
        yield Step(kind="encode" if encoder else "decode", units=1)
    if encoder:
        return latents.rows(made)
    return Output(array=imaging.images(made), media=MEDIA, extra=imaging.rendering(config))


def _latents(config: Mapping[str, Any], request: Request) -> list[Array]:
    if request.image is not None:
        raise RequestError(
            "this model makes images and takes none: leave image out, or give latent"
        )
    latent = config["latent"]
    shape = (1, *latent["shape"])
    if request.latent is not None:
        return _given(request.latent, shape)
    found = []
    for index in range(request.count):
        rng = imaging.generator(request.seed, index)
        if latent["kind"] == "normal":
            found.append(rng.standard_normal(shape, np.float32))
        else:
            found.append(rng.uniform(-1, 1, shape).astype(np.float32))
    return found


def _given(latent: Any, shape: tuple[int, ...]) -> list[Array]:
    """Latents that the request brings, one sample each."""
    try:
        if isinstance(latent, str | Path):
            latent = np.load(latent, allow_pickle=False)
        values = np.asarray(latent, np.float32)
    except OSError as error:
        raise RequestError(f"cannot read latent {latent}: {error.strerror or error}") from error
    except (TypeError, ValueError, EOFError) as error:
        raise RequestError(f"latent is no array of numbers ({error})") from None
    one, flat = shape[1:], (int(np.prod(shape)),)
    fits = values.shape in (one, flat) or values.shape[1:] in (one, flat)
    if not values.size or not fits or not np.isfinite(values).all():
        wanted = ", ".join(map(str, ("n", *one)))
        raise RequestError(
            f"latent has shape {list(values.shape)}, expected finite numbers [{wanted}]"
        )
    return list(values.reshape(-1, *shape))


def _images(config: Mapping[str, Any], request: Request) -> list[Array]:
    if request.latent is not None:
        raise RequestError("this model encodes images and takes no latent: give image")
    shape, limits = config["image"]["shape"], config.get("range")
    if request.image is not None:
        return [imaging.picture(request.image, shape, limits)]
    return [
        imaging.smooth_noise(imaging.generator(request.seed, index), shape, limits)
        for index in range(request.count)
    ]


def calibration_requests(session: Session) -> list[Request]:
    """Three images across the range of the conditions."""
    return [
        Request(
            seed=imaging.CALIBRATION_SEED + index,
            conditions=imaging.spread_conditions(session.bundle.config, share),
        )
        for index, share in enumerate((0.5, 0.0, 1.0))
    ]
