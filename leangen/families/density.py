"""Rows of numbers from a normalizing flow: draw samples, or score rows by log-density.

A bundle of this task has the graphs `sample` (latent -> x) and `log_prob` (x -> log_prob, latent),
float64 [n, d], and this config: `columns` (d names) and `latent` (`kind`: uniform or normal, and
`bound` of the uniform one).
"""

from __future__ import annotations

import csv
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leangen.errors import RequestError
from leangen.records import Media, Output, Step
from leangen.session import Session

UNIT = "sample"
MEDIA: Media = "table"
INPUTS = ("count", "data")
EXAMPLE = {"count": 1000}

Array = np.ndarray[Any, Any]

BATCH = 8192
"""Rows per step: enough to keep the cores busy, few enough for about 200 MB of memory."""

CALIBRATION_ROWS = 2048


@dataclass(frozen=True, slots=True)
class Request:
    """Either `count` samples, or the log-density of `data`."""

    count: int | None = None
    """How many rows to draw."""
    data: Any = None
    """Rows to score: array-like [n, d], or the path of a `.npy` or `.csv` file (a header row may
    name the columns, in any order)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.count is None) == (self.data is None):
            raise RequestError(
                "expected either count (rows to draw) or data (rows to score), "
                f"given {'both' if self.data is not None else 'neither'}"
            )
        if self.count is not None and (self.count != int(self.count) or self.count < 1):
            raise RequestError(f"count is {self.count!r}, expected a whole number, 1 or more")
        if self.seed < 0:
            raise RequestError(f"seed is {self.seed}, expected 0 or more")

    def describe(self) -> Mapping[str, Any]:
        """The options, for the receipt."""
        mode = "log-density" if self.count is None else "sample"
        return {"mode": mode, "count": self.count, "seed": self.seed}


def prepare(session: Session) -> None:
    """Open the graph of each direction."""
    for role in ("sample", "log_prob"):
        session.graph(role)


def run(session: Session, request: Request) -> Generator[Step, None, Output]:
    """Draw or score, in steps `flow` of up to BATCH rows.

    The output's array is float64: samples [n, d], or log-densities [n] in nats (-inf outside the
    flow's support). `extra["columns"]` names the columns. The seed alone decides the samples, in
    whatever batches they are drawn.
    """
    columns = list(session.bundle.config["columns"])
    if request.count is not None:
        role, batches = "sample", latents(session, request.count, request.seed)
        feed, result = "latent", "x"
    else:
        rows = rows_of(request.data, columns)
        role, batches = "log_prob", iter(np.split(rows, range(BATCH, len(rows), BATCH)))
        feed, result = "x", "log_prob"
        columns = ["log_density"]
    parts = []
    for batch in batches:
        parts += session.run(role, {feed: batch}, [result])
        yield Step(kind="flow", units=len(batch))
    return Output(array=np.concatenate(parts), media=MEDIA, extra={"columns": columns})


def calibration_requests(session: Session) -> list[Request]:
    """Draws, and the scoring of those draws: both graphs see what they see in use."""
    drawn = [
        session.run("sample", {"latent": latent}, ["x"])[0]
        for latent in latents(session, CALIBRATION_ROWS, seed=0)
    ]
    return [Request(count=CALIBRATION_ROWS), Request(data=np.concatenate(drawn))]


def latents(session: Session, count: int, seed: int) -> Iterator[Array]:
    """Draws of the latent distribution, float64 [up to BATCH, d] at a time."""
    latent, dim = session.bundle.config["latent"], len(session.bundle.config["columns"])
    rng = np.random.default_rng(seed)
    for start in range(0, count, BATCH):
        shape = (min(BATCH, count - start), dim)
        if latent["kind"] == "normal":
            yield rng.standard_normal(shape)
        else:
            yield rng.uniform(-latent["bound"], latent["bound"], shape)


def rows_of(data: Any, columns: Sequence[str]) -> Array:
    """The rows to score, float64 [n, d]; RequestError when they are not that."""
    if isinstance(data, str | Path):
        data = _read(Path(data), columns)
    try:
        rows = np.asarray(data, np.float64)
    except (TypeError, ValueError) as error:
        raise RequestError(f"data is not numeric ({error}): expected rows of numbers") from None
    if rows.ndim != 2 or rows.shape[1] != len(columns) or not len(rows):
        raise RequestError(
            f"data has shape {list(rows.shape)}, expected [rows, {len(columns)}] with the columns "
            f"{', '.join(columns)}"
        )
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if bad.size:
        raise RequestError(
            f"{bad.size} of {len(rows)} rows hold NaN or infinity, row {bad[0]} first: remove them"
        )
    return rows


def _read(path: Path, columns: Sequence[str]) -> Any:
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix == ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                return _pick(list(csv.reader(file)), columns)
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # a damaged or pickled .npy, a .csv that is not text
        raise RequestError(f"cannot read {path} as {path.suffix[1:]}: {error}") from error
    raise RequestError(f"data is {path}, expected a .npy or .csv file")


def _pick(table: list[list[str]], columns: Sequence[str]) -> list[list[str]]:
    """The flow's columns of a CSV table by its header, or all of them when it has none."""
    table = [row for row in table if row]
    if table and set(columns) <= set(table[0]):
        places = [table[0].index(name) for name in columns]
        return [[row[place] for place in places if place < len(row)] for row in table[1:]]
    return table
