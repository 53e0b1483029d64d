"""Choosing the next token from logits: greedy, temperature, top-k, top-p, repetition penalty."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float32]]


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
    if 0 < top_k < len(logits):
        kept = np.argpartition(logits, -top_k)[-top_k:]
    else:
        kept = np.arange(len(logits))
    scaled = logits[kept].astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    if top_p < 1:
        order = np.argsort(-weights, kind="stable")
        kept, weights = kept[order], weights[order]
        within = int(np.searchsorted(np.cumsum(weights), top_p * weights.sum())) + 1
        kept, weights = kept[:within], weights[:within]
    edges = np.cumsum(weights)
    drawn = np.searchsorted(edges, rng.random() * edges[-1], side="right")
    return int(kept[min(int(drawn), len(kept) - 1)])
