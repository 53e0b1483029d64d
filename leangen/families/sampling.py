"""Choosing the next token from logits: greedy, temperature, top-k, top-p, repetition penalty."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float32]]
Indices = np.ndarray[Any, np.dtype[np.int64]]


def penalize(logits: Floats, seen: Collection[int], penalty: float) -> Floats:
    """Logits [vocab] with those of `seen` tokens made less likely by a factor (CTRL, 1909.05858).

    Positive logits are divided by `penalty`, negative ones multiplied; 1 changes nothing.
    """
    out = logits.copy()
    tokens = np.fromiter(seen, np.int64, len(seen))
    some = out[tokens]
    out[tokens] = np.where(some > 0, some / penalty, some * penalty)
    return out


def sample(
    logits: Floats,
    rng: np.random.Generator,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> int:
    """One token drawn from softmax(logits [vocab] / temperature), after cutting its tail.

    `top_k` keeps that many tokens (0: all); `top_p` then keeps the fewest likeliest tokens that
    hold this much probability (nucleus sampling, 1904.09751). Temperature 0 is greedy.
    """
    if temperature == 0:
        return int(logits.argmax())
    kept = _likeliest(logits, top_k) if top_k else np.arange(len(logits))
    # Colder than this is greedy to any float32, and would overflow.
    weights = np.exp((logits[kept] - logits.max()) / np.float32(max(temperature, 1e-6)))
    if top_p < 1:
        nucleus = _nucleus(weights, top_p)
        kept, weights = kept[nucleus], weights[nucleus]
    edges = np.cumsum(weights, dtype=np.float64)
    drawn = int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))
    return int(kept[min(drawn, len(kept) - 1)])


def _likeliest(values: Floats, n: int) -> Indices:
    """Places of the n largest values, in no order."""
    if n >= len(values):
        return np.arange(len(values))
    # partition on values is several times faster than argpartition
    least = np.partition(values, -n)[-n]
    above, ties = np.flatnonzero(values > least), np.flatnonzero(values == least)
    return np.concatenate([above, ties[: n - len(above)]])


def _nucleus(weights: Floats, top_p: float) -> Indices:
    """Places of the fewest largest weights that hold the share `top_p`, largest first."""
    enough = top_p * weights.sum(dtype=np.float64)
    n = 64  # mostly enough: sorting a whole vocabulary would take as long as a decoded token
    while True:
        places = _likeliest(weights, n)
        if n >= len(weights) or weights[places].sum(dtype=np.float64) >= enough:
            break
        n *= 8
    places = places[np.argsort(-weights[places], kind="stable")]
    within = np.searchsorted(np.cumsum(weights[places], dtype=np.float64), enough)
    return places[: int(within) + 1]
