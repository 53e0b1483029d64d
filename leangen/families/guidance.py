"""Classifier-free guidance (arXiv 2207.12598): away from what a model draws when told nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from leangen.errors import RequestError
from leangen.families import imaging

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Guidance:
    """Asks a model twice, with its conditions and with their unconditional values."""

    scale: float
    """1 follows the condition as trained, more exaggerates it, 0 ignores it."""
    rescale: float
    """0 to 1: how far the guided answer gets back the contrast of the conditional one."""
    unconditional: Feeds
    batched: bool
    """Both at once, as a batch of two; else one after the other, in less memory."""

    def __call__(self, ask: Callable[[Feeds], Array], feeds: Feeds) -> Array:
        """The guided answer [1, ...] to `feeds`, whose arrays have a batch of one."""
        other = {**feeds, **self.unconditional}
        if self.batched:
            both = ask({name: np.concatenate([feeds[name], other[name]]) for name in feeds})
            return combine(both[:1], both[1:], self.scale, self.rescale)
        return combine(ask(feeds), ask(other), self.scale, self.rescale)


def combine(conditional: Array, unconditional: Array, scale: float, rescale: float) -> Array:
    """unconditional + scale (conditional - unconditional), its contrast rescaled.

    `rescale` mixes in the same with the conditional answer's standard deviation (arXiv 2305.08891,
    eq. 15 and 16). Shapes are [1, ...].
    """
    guided: Array = unconditional + scale * (conditional - unconditional)
    if rescale > 0:
        contrast = float(guided.std())
        if contrast > 0:
            guided = guided * (rescale * float(conditional.std()) / contrast + 1 - rescale)
    return guided


def wanted(config: Mapping[str, Any], scale: float | None) -> float | None:
    """The scale to guide by, None for no guidance; `scale` None is the model's default."""
    chosen = config.get("guidance") if scale is None else scale
    return None if chosen == 1 else chosen


def unconditional(config: Mapping[str, Any]) -> dict[str, Array]:
    """Feeds of the conditions that name an `unconditional` value: those to be guided by."""
    return {
        entry.get("input", name): imaging.fill(entry, entry["unconditional"])
        for name, entry in config.get("conditions", {}).items()
        if entry.get("unconditional") is not None
    }


def plan(
    config: Mapping[str, Any],
    scale: float | None,
    rescale: float,
    free: Feeds,
    inputs: Mapping[str, list[int | str | None]],
) -> Guidance | None:
    """The guidance a request asks for, None for none; `scale` None is the model's default.

    `free` are the feeds that tell the model nothing. `inputs` are the graph's shapes: where all
    leave their first dimension open, both answers come from one batch. Raises RequestError where
    there is nothing to guide by.
    """
    chosen = wanted(config, scale)
    if chosen is None:
        return None
    if scale is not None and not free:
        raise RequestError(
            f"guidance is {scale:g}, but no condition of this model has an unconditional value "
            f"(its conditions: {', '.join(config.get('conditions', {})) or 'none'}): leave it out"
        )
    batched = all(shape and not isinstance(shape[0], int) for shape in inputs.values())
    return Guidance(chosen, rescale, free, batched)
