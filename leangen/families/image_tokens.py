"""Images pixel by pixel from a decoder over colours (ImageGPT, Chen et al. 2020).

A bundle of this task has the graph `model` of a language model (see `exporters/llm_graph.py`), its
shape in the config keys of one, and

    size          [height, width]; pixels are drawn row by row from the top
    start         the token before the first pixel
    head_size     tokens that can be drawn: places in the file `colours`, float32 [n, 3]
    range         [low, high] of the colours' values
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leangen.errors import BundleError, RequestError
from leangen.families import imaging
from leangen.families.decoder import CHUNK, Decoder, Floats
from leangen.families.sampling import Chooser, Sampling, check, is_real
from leangen.records import Media, Output, Step
from leangen.session import Session

UNIT = "pixel"
MEDIA: Media = "image"
INPUTS = ()
EXAMPLE: dict[str, Any] = {}
COLOURS = "colours.npy"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Images to draw, or to complete."""

    count: int = 1
    seed: int = 0
    """Image i has the seed `seed` + i."""
    temperature: float = 1.0
    top_k: int = 0
    """Draw from this many likeliest colours; 0: from all."""
    top_p: float = 1.0
    image: Any = None
    """A picture of the model's size, or an array [h, w, 3] of its values, whose top is kept."""
    strength: float = 0.5
    """The share of an image's rows that is drawn anew."""

    def __post_init__(self) -> None:
        imaging.check_count(self.count, self.seed)
        self.sampling(0)
        share = is_real(self.strength) and 0 <= self.strength <= 1
        check(self, strength=(share, "a share, 0 to 1"))

    def sampling(self, index: int) -> Sampling:
        """How the colours of one image are chosen."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed + index,
        )

    def describe(self) -> dict[str, Any]:
        """The options as plain JSON types; of an image only that there is one."""
        return {
            "count": self.count,
            "seed": self.seed,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "image": self.image is not None,
            "strength": self.strength,
        }


def prepare(session: Session) -> None:
    """Open the graph and read the colours."""
    session.graph("model")
    colours(session)


def run(session: Session, request: Request) -> Generator[Step, None, Output]:
    """Draw images: a `prefill` step that ends with the first pixel, then `decode` steps."""
    config = session.bundle.config
    height, width = config["size"]
    kept: list[int] = []
    if request.image is not None:
        rows = round(height * (1 - request.strength))
        kept = nearest(session, request.image)[: rows * width]
    drawn = []
    for index in range(request.count):
        chooser = Chooser(request.sampling(index), ())
        tokens = list(kept)
        with Decoder(session, height * width) as decoder:
            fed = [config["start"], *kept]
            while len(tokens) < height * width:
                tokens.append(chooser.choose(decoder.feed(fed)).token)
                kind = "prefill" if len(tokens) == len(kept) + 1 else "decode"
                yield Step(kind=kind, units=1, tokens=tokens[-1:], sample=index)
                fed = tokens[-1:]
        drawn.append(colours(session)[tokens].reshape(height, width, -1))
    return Output(array=np.stack(drawn), media=MEDIA, extra=imaging.rendering(config))


def draw(session: Session, seed: int) -> list[int]:
    """The tokens of one image."""
    return [token for step in run(session, Request(seed=seed)) for token in step.tokens]


def logits(session: Session, tokens: Sequence[int]) -> Floats:
    """Logits [n, colours] before each of an image's first n tokens."""
    config = session.bundle.config
    fed = [config["start"], *tokens[:-1]]
    out = np.empty((len(fed), config["head_size"]), np.float32)
    with Decoder(session, len(fed)) as decoder:
        for begin in range(0, len(fed), CHUNK):
            part = fed[begin : begin + CHUNK]
            out[begin : begin + len(part)] = decoder.feed_all(part)
    return out


def nearest(session: Session, image: Any) -> list[int]:
    """The tokens of the colours nearest to an image's; RequestError for another size."""
    config, known = session.bundle.config, colours(session)
    shape = (known.shape[1], *config["size"])
    pixels = np.moveaxis(imaging.picture(image, shape, config["range"])[0], 0, -1)
    away = (pixels.reshape(-1, 1, known.shape[1]) - known[None]) ** 2
    found: list[int] = away.sum(axis=-1).argmin(axis=1).tolist()
    return found


def colours(session: Session) -> Floats:
    """The colour [3] of each token, float32 [n, 3]; BundleError when the file is damaged."""

    def load() -> Floats:
        path: Path = session.bundle.asset(COLOURS)
        try:
            table: Floats = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise BundleError(f"cannot read {path} ({error}): export the model again") from error
        return table

    table = session.keep("image_tokens.colours", load)
    if len(table) != session.bundle.config["head_size"]:
        raise RequestError(f"{COLOURS} has {len(table)} colours: export the model again")
    return table
