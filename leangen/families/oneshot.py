"""One-shot decoders (GAN generators, VAE decoders): a latent in, an image out, in one step.

The bundle has one graph, `model`, and in its config

    latent       {"input", "shape" without the batch, "kind": "normal" or "uniform" on [-1, 1]}
    output       the graph's output, [1, c, h, w]
    conditions   name -> {"min", "max", "default", "shape", "dtype"}
    range        [low, high] of the values of an image, or null
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from leangen.families import imaging
from leangen.records import Media, Output, Step
from leangen.session import Session

UNIT = "image"
MEDIA: Media = "image"
INPUTS = ()
EXAMPLE: Mapping[str, Any] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Images to decode from random latents."""

    count: int = 1
    """Images to make, one after another."""
    seed: int = 0
    """Same seed, same latents, in every scheme."""
    conditions: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        imaging.check_count(self.count, self.seed)

    def describe(self) -> dict[str, Any]:
        """The options as plain JSON types."""
        return {"count": self.count, "seed": self.seed, "conditions": dict(self.conditions)}


def prepare(session: Session) -> None:
    """Open the graph."""
    session.graph("model")


def run(session: Session, request: Request) -> Generator[Step, None, Output]:
    """Decode latents; one `decode` step per image."""
    config = session.bundle.config
    latent = config["latent"]
    shape = (1, *latent["shape"])
    conditions = imaging.condition_feeds(config, request.conditions)
    decoded = []
    for index in range(request.count):
        rng = imaging.generator(request.seed, index)
        if latent["kind"] == "normal":
            z = rng.standard_normal(shape, np.float32)
        else:
            z = rng.uniform(-1, 1, shape).astype(np.float32)
        feeds = {latent["input"]: z, **conditions}
        decoded += session.run("model", feeds, [config["output"]])
        yield Step(kind="decode", units=1)
    return Output(array=imaging.images(decoded), media=MEDIA, extra=imaging.rendering(config))


def calibration_requests(session: Session) -> list[Request]:
    """Three images across the range of the conditions."""
    return [
        Request(
            seed=imaging.CALIBRATION_SEED + index,
            conditions=imaging.spread_conditions(session.bundle.config, share),
        )
        for index, share in enumerate((0.5, 0.0, 1.0))
    ]
