"""A figure of quality with its spread, and what is asked of the models that are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leangen.errors import RequestError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure of quality with its spread."""

    name: str
    value: float
    u: float | None
    """Two standard errors over `n`; None for a single observation."""
    n: int
    of: str
    """What was observed `n` times: tokens, seeds, rows."""
    unit: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What both models are asked to do; a field that a family does not use is ignored."""

    data: Path | None = None
    """Language: a text. Density: rows. Images: a folder of pictures or an array of real data."""
    tokens: int = 384
    """Language: tokens of the text that are scored."""
    prompts: int = 0
    """Language: how many greedy continuations are compared."""
    new_tokens: int = 64
    """Language: length of a continuation."""
    seeds: int = 4
    """Images and speech: samples drawn, from the same noise in both models."""
    steps: int | None = None
    """Diffusion: steps; None is the model's default."""
    reuse: int | None = None
    """Diffusion: deep features reused over so many steps, by the candidate alone."""
    rows: int = 4096
    """Density: samples drawn and scored."""
    features: Path | None = None
    """Images: an ONNX network for perceptual and Fréchet distances."""
    recogniser: Path | None = None
    """Speech: a bundle that transcribes, for the word error rate."""

    def __post_init__(self) -> None:
        for name, least in (("tokens", 2), ("prompts", 0), ("new_tokens", 1), ("seeds", 1)):
            if getattr(self, name) < least:
                raise RequestError(f"{name} is {getattr(self, name)}, expected {least} or more")
        if self.rows < 16:
            raise RequestError(f"rows is {self.rows}, expected 16 or more")


def mean(name: str, values: Sequence[float] | Array, of: str, unit: str = "") -> Measure:
    """The mean of independent observations with two standard errors."""
    array = np.asarray(values, dtype=np.float64)
    u = 2 * array.std(ddof=1) / math.sqrt(array.size) if array.size > 1 else None
    return Measure(name, float(array.mean()), None if u is None else float(u), array.size, of, unit)
