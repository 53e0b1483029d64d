"""What the image families share: conditions, noise per sample, layout of the output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from leangen.errors import RequestError

Array = np.ndarray[Any, Any]

CALIBRATION_SEED = 20_000
"""First seed of calibration; far from the seeds people type, so that figures are not flattered."""


def check_count(count: int, seed: int) -> None:
    """RequestError unless there is at least one sample and the seed is not negative."""
    if count < 1:
        raise RequestError(f"count is {count}, expected 1 or more")
    if seed < 0:
        raise RequestError(f"seed is {seed}, expected 0 or more")


def generator(seed: int, index: int) -> np.random.Generator:
    """The noise source of one sample: sample i of a seed is the same whatever the count."""
    return np.random.Generator(np.random.PCG64([seed, index]))


def condition_feeds(config: Mapping[str, Any], chosen: Mapping[str, float]) -> dict[str, Array]:
    """Feeds of the conditions, the model's defaults where none is chosen.

    `config["conditions"]` maps a name to `min`, `max`, `default`, `shape` and `dtype`. Raises
    RequestError for a condition that the model lacks and for a value out of its range.
    """
    known = config.get("conditions", {})
    for name, value in chosen.items():
        if name not in known:
            raise RequestError(
                f"condition {name!r} is unknown: expected one of {', '.join(known) or 'none'}"
            )
        low, high = known[name].get("min"), known[name].get("max")
        if not isinstance(value, int | float) or not np.isfinite(value):
            raise RequestError(f"condition {name} is {value!r}, expected a number")
        if (low is not None and value < low) or (high is not None and value > high):
            ends = [end for end in (low, high) if end is not None]
            span = " to ".join(f"{end:g}" for end in ends)
            if len(ends) == 1:
                span += " or more" if high is None else " or less"
            raise RequestError(f"condition {name} is {value:g}, expected {span}")
    return {
        name: np.full(entry["shape"], chosen.get(name, entry["default"]), entry["dtype"])
        for name, entry in known.items()
    }


def spread_conditions(config: Mapping[str, Any], share: float) -> dict[str, float]:
    """A value for each condition that has a range, at `share` of it: what calibration visits."""
    return {
        name: entry["min"] + share * (entry["max"] - entry["min"])
        for name, entry in config.get("conditions", {}).items()
        if entry.get("min") is not None and entry.get("max") is not None
    }


def images(samples: list[Array]) -> Array:
    """Samples [1, c, h, w] as float32 images [n, h, w, c]."""
    return np.ascontiguousarray(np.moveaxis(np.concatenate(samples), 1, -1), np.float32)


def rendering(config: Mapping[str, Any]) -> dict[str, Any]:
    """How a picture is made of the values, for `Output.extra`."""
    return {"range": config.get("range"), "render": config.get("render")}
