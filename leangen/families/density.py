"""Rows or images from a normalizing flow: draw samples, or score data by log-density.

A bundle of this task has the graphs `sample` (latent -> x) and `log_prob` (x -> log_prob, latent),
[n, d], and this config:

    columns   d names
    latent    {"kind": "uniform" or "normal", "bound" of the uniform one}
    dtype     `float32` or `float64` of all inputs and outputs; by default `float64`
    image     {"shape": [c, h, w], "range": [low, high], "levels"} where a row is an image, its
              values stand channel by channel, and the flow was trained on dequantized ones: pixel
              level k, plus noise between 0 and 1, over `levels` goes from low to high
"""

from __future__ import annotations

import csv
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leangen.errors import RequestError
from leangen.families import imaging
from leangen.families.sampling import check, is_real, is_whole
from leangen.records import Media, Output, Step
from leangen.session import Session

UNIT = "sample"
MEDIA: Media = "table"
INPUTS = ("count", "data")
EXAMPLE = {"count": 1000}

Array = np.ndarray[Any, Any]

BATCH = 8192
"""Rows per step, at most: enough to keep the cores busy, few enough for about 200 MB of memory."""
BATCH_VALUES = 2**18
"""Values of all rows of a step: wide rows go in smaller steps."""

HOTTEST = 1000
"""Temperature: what flows compute of far hotter draws is no number."""

CALIBRATION_ROWS = 2048
CALIBRATION_VALUES = 2**17


@dataclass(frozen=True, slots=True)
class Request:
    """Either `count` samples, or the log-density of `data`."""

    count: int | None = None
    """How many rows to draw."""
    data: Any = None
    """Rows to score: array-like [n, d], or the path of a `.npy` or `.csv` file (a header row may
    name the columns, in any order). Images: also [n, h, w, c] of the model's values, a picture or
    a folder of them, dequantized with noise of the seed."""
    seed: int = 0
    temperature: float = 1.0
    """Draws: the spread of a normal latent; below 1 they are likelier and less varied (Kingma and
    Dhariwal, arXiv:1807.03039)."""

    def __post_init__(self) -> None:
        check(
            self,
            temperature=(
                is_real(self.temperature) and 0 <= self.temperature <= HOTTEST,
                f"0 to {HOTTEST}",
            ),
            count=(self.count is None or is_whole(self.count, 1), "a whole number, 1 or more"),
            seed=(is_whole(self.seed, 0), "a whole number, 0 or more"),
        )
        if self.data is not None and self.temperature != 1:
            raise RequestError("temperature is for draws: leave it out where data is scored")
        if (self.count is None) == (self.data is None):
            raise RequestError(
                "expected either count (rows to draw) or data (rows to score), "
                f"given {'both' if self.data is not None else 'neither'}"
            )

    def describe(self) -> Mapping[str, Any]:
        """The options, for the receipt."""
        mode = "log-density" if self.count is None else "sample"
        told = {"mode": mode, "count": self.count, "seed": self.seed}
        return told | ({} if self.temperature == 1 else {"temperature": self.temperature})


def media(config: Mapping[str, Any]) -> Media:
    """Samples are images where the rows are images; scores are a table all the same."""
    return "image" if "image" in config else MEDIA


def prepare(session: Session) -> None:
    """Open the graph of each direction."""
    for role in ("sample", "log_prob"):
        session.graph(role)


def run(session: Session, request: Request) -> Generator[Step, None, Output]:
    """Draw or score, in steps `flow` of up to BATCH rows.

    The output's array: samples [n, d] or [n, h, w, c], or log-densities [n] in nats (-inf outside
    the flow's support), of images with their bits per dimension beside them, [n, 2].
    `extra["columns"]` names the columns. The seed alone decides the samples, in whatever batches
    they are drawn.
    """
    config = session.bundle.config
    if request.count is not None:
        batches = latents(session, request.count, request.seed, request.temperature)
        role, feed, result = "sample", "latent", "x"
    else:
        rows = rows_of(request.data, config, request.seed)
        batches = batches_of(rows, config)
        role, feed, result = "log_prob", "x", "log_prob"
    parts = []
    for batch in batches:
        parts += session.run(role, {feed: batch}, [result])
        yield Step(kind="flow", units=len(batch))
    made = np.concatenate(parts)
    if request.count is None:
        columns = ["log_density"]
        if "image" in config:
            made = np.stack([made, bits_per_dimension(made, config)], axis=1)
            columns.append("bits_per_dimension")
        return Output(array=made, media=MEDIA, extra={"columns": columns})
    if "image" in config:
        pictures = imaging.images([made.reshape(-1, *config["image"]["shape"])])
        return Output(array=pictures, media="image", extra=imaging.rendering(config["image"]))
    return Output(array=made, media=MEDIA, extra={"columns": list(config["columns"])})


def calibration_requests(session: Session) -> list[Request]:
    """Draws, and the scoring of those draws: both graphs see what they see in use."""
    dim = len(session.bundle.config["columns"])
    count = min(CALIBRATION_ROWS, max(64, CALIBRATION_VALUES // dim))
    drawn = [
        session.run("sample", {"latent": latent}, ["x"])[0]
        for latent in latents(session, count, seed=0)
    ]
    return [Request(count=count), Request(data=np.concatenate(drawn))]


def latents(session: Session, count: int, seed: int, temperature: float = 1.0) -> Iterator[Array]:
    """Draws of the latent distribution, [rows of a step, d] at a time."""
    config = session.bundle.config
    latent, size = config["latent"], batch_rows(config)
    if latent["kind"] != "normal" and temperature != 1:
        raise RequestError(
            f"temperature is {temperature}: this flow's latent is {latent['kind']}, which has "
            "none; leave it out"
        )
    rng = np.random.default_rng(seed)
    for start in range(0, count, size):
        shape = (min(size, count - start), len(config["columns"]))
        if latent["kind"] == "normal":
            drawn = temperature * rng.standard_normal(shape)
        else:
            drawn = rng.uniform(-latent["bound"], latent["bound"], shape)
        yield drawn.astype(config.get("dtype", "float64"), copy=False)


def batch_rows(config: Mapping[str, Any]) -> int:
    """Rows of a step."""
    return max(1, min(BATCH, max(16, BATCH_VALUES // len(config["columns"]))))


def batches_of(rows: Array, config: Mapping[str, Any]) -> Iterator[Array]:
    """Rows [n, d] in the type and the portions that the graphs take."""
    size = batch_rows(config)
    typed = rows.astype(config.get("dtype", "float64"), copy=False)
    return iter(np.split(typed, range(size, len(rows), size)))


def bits_per_dimension(log_density: Array, config: Mapping[str, Any]) -> Array:
    """Bits that a lossless code of the pixels' levels would take, per value of an image.

    The density of dequantized values bounds it (Theis et al., arXiv:1511.01844, section 3.1).
    """
    image = config["image"]
    low, high = image["range"]
    levels_per_unit = image["levels"] / (high - low)
    dim = len(config["columns"])
    bits: Array = np.log2(levels_per_unit) - np.asarray(log_density) / (dim * np.log(2))
    return bits


def as_rows(array: Any) -> Array:
    """Images [n, h, w, c] as rows [n, d] in the order of the model's values; rows as they are."""
    array = np.asarray(array)
    rows: Array = np.moveaxis(array, -1, 1).reshape(len(array), -1) if array.ndim == 4 else array
    return rows


def rows_of(data: Any, config: Mapping[str, Any], seed: int = 0) -> Array:
    """The rows to score, float64 [n, d]; RequestError when they are not that."""
    columns = config["columns"]
    if isinstance(data, str | Path):
        path = Path(data)
        if "image" in config and path.suffix not in (".npy", ".csv"):
            return _pictures(path, config["image"], seed)
        data = _read(path, columns)
    try:
        rows = np.asarray(data, np.float64)
    except (TypeError, ValueError):
        raise RequestError(
            f"data is not numeric: expected rows of {len(columns)} numbers each"
        ) from None
    if "image" in config and rows.ndim == 4:
        channels, *size = config["image"]["shape"]
        if rows.shape[1:] != (*size, channels):
            raise RequestError(
                f"data has shape {list(rows.shape)}, expected images [n, *{[*size, channels]}]"
            )
        rows = as_rows(rows)
    if rows.ndim != 2 or rows.shape[1] != len(columns) or not len(rows):
        raise RequestError(
            f"data has shape {list(rows.shape)}, expected [rows, {len(columns)}] with the columns "
            f"{', '.join(columns[:10])}{', ...' if len(columns) > 10 else ''}"
        )
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise RequestError(
            f"{bad.size} of {len(rows)} rows hold NaN or infinity, row {bad[0]} first: remove them"
        )
    return rows


def _pictures(path: Path, image: Mapping[str, Any], seed: int) -> Array:
    """A picture, or all of a folder, as dequantized rows [n, d]."""
    names = imaging.pictures_in(path) if path.is_dir() else [path]
    low, high = image["range"]
    samples = [imaging.picture(name, image["shape"], (0.0, 255.0)) for name in names]
    levels = np.floor(np.concatenate(samples).astype(np.float64) * image["levels"] / 256)
    noise = np.random.default_rng(seed).uniform(size=levels.shape)
    values: Array = low + (levels + noise) / image["levels"] * (high - low)
    return values.reshape(len(values), -1)


def _read(path: Path, columns: Sequence[str]) -> Any:
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                return _pick(list(csv.reader(file, strict=True)), columns)
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, EOFError, csv.Error) as error:  # a .npy damaged or pickled, a .csv no text
        raise RequestError(f"cannot read {path} as {path.suffix[1:]}: {error}") from error
    raise RequestError(f"data is {path}, expected a .npy or .csv file")


def _pick(table: list[list[str]], columns: Sequence[str]) -> list[list[str]]:
    """The flow's columns of a CSV table by its header, or all of them when it has none."""
    table = [row for row in table if row]
    if table and set(columns) <= set(table[0]):
        places = [table[0].index(name) for name in columns]
        return [[row[place] for place in places if place < len(row)] for row in table[1:]]
    return table
