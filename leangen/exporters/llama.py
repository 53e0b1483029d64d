"""What the graph of a llama-shaped decoder is built from: its shape and its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from leangen.exporters.gguf_blocks import Blocks, Floats

Matrix = Floats | Blocks
"""A weight [n, k], rows are outputs: float32, or low-bit blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """The shape of the model."""

    layers: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    window: int | None
    """Positions that a token attends to, its own among them; None: all before it."""
    rms_epsilon: float
    tied_head: bool


class Weights(Protocol):
    """Where the weights come from, one at a time, so that few are in memory at once.

    Names are `embed`, `head`, `norm` and, for each layer I, `layers.I.` with `attn_norm`, `q`,
    `k`, `v`, `o`, `mlp_norm`, `gate`, `up`, `down`. Rows of q and k stand in half-rotation order
    (not interleaved).
    """

    def gain(self, name: str) -> Floats:
        """A norm's gain [width]."""
        ...

    def matrix(self, name: str) -> Matrix:
        """A linear layer's weight [n, k], or the embedding [vocab, width]."""
        ...

    def bias(self, name: str) -> Floats | None:
        """A linear layer's bias [n], if it has one."""
        ...

    def inverse_frequencies(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Radians per position of each rotated pair [head_dim / 2]."""
        ...
