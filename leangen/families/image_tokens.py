"""Images pixel by pixel from a decoder over colours (ImageGPT, Chen et al. 2020).

A bundle of this task has the graph `model` of a language model (see `exporters/llm_graph.py`), its
shape in the config keys of one, and

    size          [height, width]; pixels are drawn row by row from the top
    start         the token before the first pixel; with a condition that many tokens further
    conditions    name to range and names, as a denoiser's (see `families.imaging`): none or one
    head_size     tokens that can be drawn: places in the file `colours`, float32 [n, channels]
    range         [low, high] of the colours' values
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from leangen.errors import BundleError
from leangen.families import imaging
from leangen.families.decoder import CHUNK, Decoder, Floats
from leangen.families.pixel_request import Request, judged
from leangen.families.sampling import Chooser
from leangen.records import Media, Output, Step
from leangen.session import Session

__all__ = ["Request"]

UNIT = "pixel"
MEDIA: Media = "image"
INPUTS = ()
EXAMPLE: dict[str, Any] = {}
COLOURS = "colours.npy"


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
        kept = nearest(session, request.image)[: request.rows_kept(height) * width]
    start, drawn = _start(config, request), []
    for index in range(request.count):
        chooser = Chooser(request.sampling(index), ())
        tokens = list(kept)
        with Decoder(session, height * width) as decoder:
            fed = [start, *kept]
            while len(tokens) < height * width:
                tokens.append(chooser.choose(decoder.feed(fed)).token)
                kind = "prefill" if len(tokens) == len(kept) + 1 else "decode"
                yield Step(kind=kind, units=1, tokens=tokens[-1:], sample=index)
                fed = tokens[-1:]
        drawn.append(colours(session)[tokens].reshape(height, width, -1))
    return Output(array=np.stack(drawn), media=MEDIA, extra=imaging.rendering(config))


def draw(session: Session, seed: int) -> list[int]:
    """The tokens of one image."""
    steps = run(session, judged(session.bundle.config, seed))
    return [token for step in steps for token in step.tokens]


def logits(
    session: Session, tokens: Sequence[int], seed: int = 0, request: Request | None = None
) -> Floats:
    """Logits [n, colours] before each of the first n tokens of the image that `draw` made.

    Or of an image that was asked for by `request`, of which only the conditions count.
    """
    config = session.bundle.config
    fed = [_start(config, request or judged(config, seed)), *tokens[:-1]]
    out = np.empty((len(fed), config["head_size"]), np.float32)
    with Decoder(session, len(fed)) as decoder:
        for begin in range(0, len(fed), CHUNK):
            part = fed[begin : begin + CHUNK]
            out[begin : begin + len(part)] = decoder.feed_all(part)
    return out


def _start(config: Mapping[str, Any], request: Request) -> int:
    """The token before the first pixel."""
    chosen = imaging.condition_feeds(config, request.conditions)
    return int(config["start"] + sum(int(value) for value in chosen.values()))


def nearest(session: Session, image: Any) -> list[int]:
    """The tokens of the colours nearest to an image's; RequestError for another size."""
    config, known = session.bundle.config, colours(session)
    shape = (known.shape[1], *config["size"])
    pixels = np.moveaxis(imaging.picture(image, shape, config["range"])[0], 0, -1)
    away = (pixels.reshape(-1, 1, known.shape[1]) - known[None]) ** 2
    found: list[int] = away.sum(axis=-1).argmin(axis=1).tolist()
    return found


def colours(session: Session) -> Floats:
    """The colour of each token, float32 [n, channels]; BundleError when the file is damaged."""

    def load() -> Floats:
        path: Path = session.bundle.asset(COLOURS)
        try:
            table: Floats = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise BundleError(f"cannot read {path} ({error}): export the model again") from error
        return table

    table = session.keep("image_tokens.colours", load)
    if len(table) != session.bundle.config["head_size"]:
        raise BundleError(f"{COLOURS} has {len(table)} colours: export the model again")
    return table
