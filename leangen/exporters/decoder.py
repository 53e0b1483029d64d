"""What the graph of a language model is built from: its shape and its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from leangen.exporters.gguf_blocks import Blocks, Floats
from leangen.exporters.rope import Angles

Matrix = Floats | Blocks
"""A weight [n, k], rows are outputs: float32, or low-bit blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """A mixture of experts in place of the MLP (Shazeer et al. 2017)."""

    count: int
    active: int
    """How many of them each token goes through."""
    normalized: bool
    """Whether the active ones' shares are scaled to a sum of 1."""
    dense_layers: frozenset[int] = frozenset()
    """Layers with an ordinary MLP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Relative:
    """Biases of attention by distance, in buckets that widen with it (T5, 1910.10683)."""

    buckets: int
    most: int
    """From this distance on all share the last bucket."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder, or of an encoder beside one; the defaults are llama's."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    epsilon: float
    """Of the norms."""
    tied_head: bool
    head_vocab: int = 0
    """Tokens that can be chosen, where some of the vocabulary cannot; 0: all."""
    norm: Literal["rms", "layer"] = "rms"
    norms: Literal["before", "after", "both", "sum"] = "before"
    """Where the norms of attention and of the MLP stand; `sum` is after the block is added."""
    query_key_norm: Literal["none", "head", "row"] = "none"
    """RMS norm of queries and keys: over each head, or over all of them."""
    parallel: bool = False
    """The MLP reads what attention reads, not attention's result."""
    activation: str = "silu"
    """Of the MLP: silu, gelu, gelu_tanh, gelu_quick or relu."""
    gated: bool = True
    learned_positions: bool = False
    """A table of positions is added to the embedding; else heads are rotated."""
    relative: Relative | None = None
    """Positions are told by biases of attention: heads are not rotated."""
    cross: bool = False
    """Each layer also attends to what an encoder made."""
    rotations: tuple[str, ...] = ()
    """By layer: the table of angles, `""` for none. Empty: `rope` in every layer."""
    windows: tuple[int, ...] = ()
    """By layer: how many tokens attention sees, itself among them, 0 for all. Empty: all."""
    attention_scale: float | None = None
    """None is 1 / sqrt(head_dim)."""
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0
    head_scale: float = 1.0
    """Of what the output head reads."""
    experts: Experts | None = None

    @property
    def stated(self) -> dict[str, int]:
        """The keys of a bundle's config by which its caches and logits are sized."""
        return {
            "layers": self.layers,
            "kv_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": self.vocab,
        }

    def rotation(self, layer: int) -> str:
        """The table of angles of a layer; `""` where heads are not rotated."""
        if self.learned_positions or self.relative is not None:
            return ""
        return self.rotations[layer] if self.rotations else "rope"

    def window(self, layer: int) -> int:
        """Tokens that a layer's attention sees; 0 for all."""
        window = self.windows[layer] if self.windows else 0
        return window if window < self.context else 0

    def routed(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return self.experts is not None and layer not in self.experts.dense_layers


class Weights(Protocol):
    """Where the weights come from, one at a time, so that few are in memory at once.

    Names are `embed`, `positions`, `head`, `norm` and, for each layer I, `layers.I.` with `q`, `k`,
    `v`, `o`, `gate`, `up`, `down`, the norms `attn_norm`, `mlp_norm` (before), `attn_post_norm`,
    `mlp_post_norm` (after), `q_norm`, `k_norm`, for experts `router` and `experts.E.gate`, `.up`,
    `.down`, for attention to an encoder `cross_q` ... `cross_o` and `cross_norm` (or
    `cross_post_norm`); `relative` is T5's table [buckets, heads]. What belongs to an encoder has
    `encoder.` before its name. Rows of q and k stand in half-rotation order (not interleaved).
    """

    def gain(self, name: str) -> Floats:
        """A norm's gain."""
        ...

    def matrix(self, name: str) -> Matrix:
        """A linear layer's weight [n, k], a table [rows, width], a convolution's [n, k, taps]."""
        ...

    def bias(self, name: str) -> Floats | None:
        """The bias of a linear layer or norm, if it has one."""
        ...

    def rotation(self, table: str) -> tuple[Angles, Angles]:
        """Cosines and sines [context, head_dim / 2] of the pairs that are rotated together."""
        ...
