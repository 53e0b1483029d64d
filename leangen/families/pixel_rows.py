"""Images row by row from masked convolutions (PixelCNN, van den Oord et al. 2016).

A bundle of this task has the graph `model`, which takes any number of rows and what its layers
remember of the rows above:

    rows [n, new, width] int64, the conditions' inputs, state_I [n, ...]
 -> logits [n, new, width, levels], next_state_I

The logits at a place depend on the rows above and on what is left of it, so that a row is given
unfinished: a pixel costs one pass over one row. In the config

    size          [height, width]
    levels        what a pixel is one of, evenly over `range`
    range         [low, high]
    states        name to shape, without the batch, of what the layers remember
    conditions    name to input, range and names, as a denoiser's (see `families.imaging`)
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

import numpy as np

from leangen.families import imaging
from leangen.families.pixel_request import Request, judged
from leangen.families.sampling import Chooser
from leangen.records import Media, Output, Step
from leangen.session import Session

__all__ = ["Request"]

UNIT = "pixel"
MEDIA: Media = "image"
INPUTS = ()
EXAMPLE: dict[str, Any] = {}

Array = np.ndarray[Any, Any]


def prepare(session: Session) -> None:
    """Open the graph."""
    session.graph("model")


def run(session: Session, request: Request) -> Generator[Step, None, Output]:
    """Draw images, all at once: a `prefill` step of what is kept and then a `decode` step a row."""
    config = session.bundle.config
    height, width = config["size"]
    choosers = [Chooser(request.sampling(index), ()) for index in range(request.count)]
    drawn = np.zeros((request.count, height, width), np.int64)
    model = _Rows(session, request, request.count)
    kept = request.rows_kept(height)
    if kept:
        drawn[:, :kept] = nearest(config, request.image)[:kept]
        model.keep(drawn[:, :kept])
        yield Step(kind="prefill", units=0)
    for y in range(kept, height):
        row = drawn[:, y : y + 1]
        for x in range(width):
            logits = model.logits(row)[:, 0, x]
            row[:, 0, x] = [
                chooser.choose(each).token for chooser, each in zip(choosers, logits, strict=True)
            ]
        if y + 1 < height:
            model.keep(row)
        yield Step(kind="decode", units=row.size, tokens=row.flatten().tolist())
    return Output(
        array=values(config, drawn)[..., None], media=MEDIA, extra=imaging.rendering(config)
    )


class _Rows:
    """The graph between two rows."""

    def __init__(self, session: Session, request: Request, count: int) -> None:
        config = session.bundle.config
        conditions = imaging.condition_feeds(config, request.conditions)
        self._session = session
        self._beside = {name: np.repeat(value, count, 0) for name, value in conditions.items()}
        self._states = {
            name: np.zeros((count, *shape), np.float32) for name, shape in config["states"].items()
        }

    def logits(self, rows: Array) -> Array:
        """What follows from the rows before and from what is left of each place."""
        (logits,) = self._run(rows, ["logits"])
        return logits

    def keep(self, rows: Array) -> None:
        """Remember finished rows."""
        names = list(self._states)
        states = self._run(rows, [f"next_{name}" for name in names])
        self._states = dict(zip(names, states, strict=True))

    def _run(self, rows: Array, outputs: Sequence[str]) -> Sequence[Array]:
        feeds = {"rows": np.ascontiguousarray(rows), **self._beside, **self._states}
        return self._session.run("model", feeds, list(outputs))


def draw(session: Session, seed: int) -> list[int]:
    """The levels of one image."""
    steps = run(session, judged(session.bundle.config, seed))
    return [token for step in steps for token in step.tokens]


def logits(
    session: Session, tokens: Sequence[int], seed: int = 0, request: Request | None = None
) -> Array:
    """Logits [n, levels] of each pixel of the image that `draw` made, given those before it.

    Or of an image that was asked for by `request`, of which only the conditions count.
    """
    config = session.bundle.config
    rows = np.asarray(tokens, np.int64).reshape(1, *config["size"])
    found = _Rows(session, request or judged(config, seed), 1).logits(rows)
    scored: Array = found.reshape(-1, config["levels"])
    return scored


def nearest(config: Mapping[str, Any], image: Any) -> Array:
    """The levels [h, w] nearest to an image's; RequestError for another size."""
    low, high = config["range"]
    pixels = imaging.picture(image, (1, *config["size"]), config["range"])[0, 0]
    places = np.rint((pixels - low) / (high - low) * (config["levels"] - 1))
    found: Array = np.clip(places, 0, config["levels"] - 1).astype(np.int64)
    return found


def values(config: Mapping[str, Any], levels: Array) -> Array:
    """The values of levels, float32."""
    low, high = config["range"]
    table = np.linspace(low, high, config["levels"], dtype=np.float32)
    found: Array = table[levels]
    return found


def calibration_requests(session: Session) -> list[Request]:
    """Three images across the range of the conditions."""
    return [
        Request(
            seed=imaging.CALIBRATION_SEED + index,
            conditions=imaging.spread_conditions(session.bundle.config, share),
        )
        for index, share in enumerate((0.0, 0.5, 1.0))
    ]
