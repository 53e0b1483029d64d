"""What a checkpoint's tensors are called and how they are stored, and the weights taken from them.

Rows are moved before they are converted, so that low-bit blocks can be moved as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from leangen.errors import SourceError
from leangen.exporters import rope
from leangen.exporters.decoder import DecoderConfig, Matrix
from leangen.exporters.gguf_blocks import Floats
from leangen.exporters.rope import Angles

Json = Mapping[str, Any]
Rows = np.ndarray[Any, Any]
"""A tensor as it is stored, rows first: numbers, or the bytes of blocks."""
Shape = tuple[int | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A model's shape, and where its tensors are."""

    config: DecoderConfig
    encoder: DecoderConfig | None = None
    """Of a model that has an encoder as well."""
    names: Mapping[str, str]
    """Our name without `layers.I.` to the tensor's without `.weight`; `{i}` layer, `{e}` expert.

    A name without `{e}` for a part of experts is of one tensor that holds that part of all."""
    transposed: bool = False
    """Matrices of the layers are stored [inputs, outputs] (GPT-2's Conv1D)."""
    unit_gain: bool = False
    """Norms are stored as what is added to a gain of 1 (Gemma)."""
    interleaved_qkv: bool = False
    """The joint q, k, v matrix holds a head's three parts beside each other (GPT-NeoX)."""
    joint: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    """Our name to the joint matrix that holds it and its place there: rows of equal share, or for
    q, k and v rows by their heads."""
    skipped_positions: int = 0
    """Rows at the start of the table of positions that no token uses (OPT)."""
    unbiased: frozenset[str] = frozenset()
    """What has no bias, by our name without `layers.I.` or `experts.E.`."""
    rotated: float | Fraction = 1.0
    """The share of each head that is rotated."""
    neighbours: bool = False
    """Rows of q and k that are rotated together stand beside each other (GGUF's llama)."""
    ropes: Mapping[str, Json] = field(default_factory=dict)
    """The parameters of each table of angles."""

    @property
    def rotary_dims(self) -> int:
        """How many numbers of each head are rotated."""
        return int(self.config.head_dim * self.rotated)


class Checkpoint(ABC):
    """The weights of a file or folder, under the names of `decoder.Weights`.

    A reader says where it keeps its tensors; this class knows how they stand in one another.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    @abstractmethod
    def _shape(self, tensor: str) -> tuple[int, ...] | None:
        """Of a stored tensor, rows first; None when there is none of that name."""

    @abstractmethod
    def _rows(self, tensor: str) -> Rows:
        """A tensor as it is stored."""

    @abstractmethod
    def _floats(self, tensor: str, rows: Rows) -> Floats:
        """Rows of a tensor as numbers."""

    def _matrix(self, tensor: str, rows: Rows) -> Matrix:
        """Rows of a tensor as numbers, or as low-bit blocks."""
        return self._floats(tensor, rows)

    def gain(self, name: str) -> Floats:
        """A norm's gain."""
        tensor = self._tensor(name)
        gain = self._floats(tensor, self._rows(tensor))
        return gain + np.float32(1) if self.layout.unit_gain else gain

    def matrix(self, name: str) -> Matrix:
        """A weight [n, k] with q and k rows in half-rotation order, or what else it may be."""
        tensor, rows = self._taken(name, ".weight")
        if name == "positions":
            rows = rows[self.layout.skipped_positions :]
        return self._matrix(tensor, rows)

    def bias(self, name: str) -> Floats | None:
        """The bias of a linear layer or norm, if there is one."""
        if self._shape(self._tensor(self._holder(name), ".bias")) is None:
            return None
        tensor, rows = self._taken(name, ".bias")
        return self._floats(tensor, rows)

    def rotation(self, table: str) -> tuple[Angles, Angles]:
        """Cosines and sines [context, head_dim / 2]; 1 and 0 where a head stands still."""
        config, rotated = self.layout.config, self.layout.rotary_dims
        turned, factor = rope.frequencies(self.layout.ropes[table], rotated, config.context)
        angles = np.outer(np.arange(config.context), turned)
        cosines, sines = np.cos(angles), np.sin(angles, out=angles)  # long contexts make them large
        cosines *= factor
        sines *= factor
        if pairs := (config.head_dim - rotated) // 2:
            still = ((0, 0), (0, pairs))
            cosines, sines = np.pad(cosines, still, constant_values=1), np.pad(sines, still)
        return cosines, sines

    def _holder(self, name: str) -> str:
        """The name of the joint matrix that holds this one, or its own."""
        label = name.rpartition(".")[2]
        joint = self.layout.joint.get(label)
        return name if joint is None else name.removesuffix(label) + joint[0]

    def _tensor(self, name: str, suffix: str = ".weight") -> str:
        """`layers.3.experts.5.gate` -> what the file calls it."""
        parts = name.split(".")
        numbers = [part for part in parts if part.isdigit()]
        label = ".".join(part for part in parts if part != "layers" and not part.isdigit())
        return self.layout.names[label].format(**dict(zip("ie", numbers, strict=False))) + suffix

    def _taken(self, name: str, suffix: str) -> tuple[str, Rows]:
        """The tensor that holds `name`, and the rows of it that are meant, in our order."""
        label = name.rpartition(".")[2]
        tensor = self._tensor(self._holder(name), suffix)
        rows = self._rows(tensor)
        if ".experts." in name and "{e}" not in self.layout.names[f"experts.{label}"]:
            rows = rows[int(name.split(".")[3])]
        if self.layout.transposed and name.startswith("layers.") and rows.ndim == 2:
            rows = rows.T
        if label in self.layout.joint:
            rows = self._part(label, rows)
        return tensor, self._ordered(label, rows)

    def _part(self, label: str, whole: Rows) -> Rows:
        """The rows of one of the matrices that stand in a joint one."""
        config, place = self.layout.config, self.layout.joint[label][1]
        if label not in ("q", "k", "v"):
            return np.split(whole, 2)[place]
        if self.layout.interleaved_qkv:
            by_head = whole.reshape(config.heads, 3, config.head_dim, *whole.shape[1:])
            return by_head[:, place].reshape(-1, *whole.shape[1:])
        rows = [count * config.head_dim for count in (config.heads, *[config.kv_heads] * 2)]
        return np.split(whole, np.cumsum(rows)[:2])[place]

    def _ordered(self, label: str, rows: Rows) -> Rows:
        """Put rows of q and k that are rotated together half a head apart."""
        head_dim, rotated = self.layout.config.head_dim, self.layout.rotary_dims
        if label not in ("q", "k") or (rotated == head_dim and not self.layout.neighbours):
            return rows
        turned = np.arange(rotated)
        pairs = turned.reshape(-1, 2).T if self.layout.neighbours else turned.reshape(2, -1)
        still = np.arange(rotated, head_dim).reshape(2, -1)
        order = np.concatenate([pairs, still], axis=1).reshape(-1)
        heads = rows.reshape(-1, head_dim, *rows.shape[1:])
        return np.ascontiguousarray(heads[:, order].reshape(rows.shape))

    def check(self, source: object) -> None:
        """SourceError listing the tensors that are missing or of another shape."""
        wrong = []
        for name, shape in expected(self.layout):
            tensor = self._tensor(name)
            found = self._shape(tensor)
            if found is None:
                wrong.append(f"{tensor} is missing")
                continue
            if self.layout.transposed and name.startswith("layers."):
                found = found[::-1]
            if len(found) != len(shape) or any(
                want is not None and want != have for want, have in zip(shape, found, strict=True)
            ):
                wanted = ", ".join("any" if size is None else str(size) for size in shape)
                wrong.append(f"{tensor} is {list(found)}, expected [{wanted}]")
            bias = self._tensor(name, ".bias")
            if name.rpartition(".")[2] in self.layout.unbiased and self._shape(bias) is not None:
                wrong.append(f"{bias} is there, of which config.json says nothing")
        if wrong:
            more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise SourceError(
                f"{source} does not fit its own description: {'; '.join(wrong[:8])}{more}; "
                "download or convert it again"
            )


class Held(Checkpoint):
    """Weights that lie in memory, or are mapped into it, by their tensors' names."""

    def __init__(self, path: Path, stored: Mapping[str, Rows], layout: Layout) -> None:
        self.stored = stored
        super().__init__(layout)
        self.check(path)

    def _shape(self, tensor: str) -> tuple[int, ...] | None:
        return self.stored[tensor].shape if tensor in self.stored else None

    def _rows(self, tensor: str) -> Rows:
        return self.stored[tensor]

    def _floats(self, tensor: str, rows: Rows) -> Floats:
        return np.asarray(rows, np.float32)


def expected(layout: Layout) -> list[tuple[str, Shape]]:
    """Our names of all tensors, with their shapes (rows first); None is any size."""
    config, encoder = layout.config, layout.encoder
    width = config.width
    rows: list[tuple[str, Shape]] = [("embed", (config.vocab, width))]
    if not config.tied_head:
        rows.append(("head", (config.head_vocab or config.vocab, width)))
    if config.learned_positions:
        rows.append(("positions", (config.context + layout.skipped_positions, width)))
    shapes: dict[str, Shape] = {"norm": (width,)}
    if config.relative is not None:
        shapes["relative"] = (config.relative.buckets, config.heads)
    if encoder is not None:
        shapes |= {"encoder.norm": (encoder.width,), "encoder.conv1": (encoder.width, None, 3)}
        shapes["encoder.embed"] = (encoder.vocab, encoder.width)
        shapes["encoder.conv2"] = (encoder.width, encoder.width, 3)
        shapes["encoder.positions"] = (encoder.context, encoder.width)
        if encoder.relative is not None:
            shapes["encoder.relative"] = (encoder.relative.buckets, encoder.heads)
    rows += [(name, shape) for name, shape in shapes.items() if name in layout.names]
    if encoder is not None:
        rows += _of_layers(layout, encoder, "encoder.")
    return rows + _of_layers(layout, config, "")


def _of_layers(layout: Layout, config: DecoderConfig, prefix: str) -> list[tuple[str, Shape]]:
    """What each layer of a decoder or an encoder has."""
    width, q, kv = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
    by_row = config.query_key_norm == "row"
    source = width if layout.encoder is None else layout.encoder.width
    shapes: dict[str, Shape] = {
        "qkv": (q + 2 * kv, width),
        "q": (q, width),
        "k": (kv, width),
        "v": (kv, width),
        "o": (width, q),
        "cross_q": (q, width),
        "cross_k": (q, source),
        "cross_v": (q, source),
        "cross_kv": (2 * q, source),
        "cross_o": (width, q),
        "q_norm": (q if by_row else config.head_dim,),
        "k_norm": (kv if by_row else config.head_dim,),
    }
    experts = config.experts
    names = [name for name, tensor in layout.names.items() if "{i}" in tensor]
    labels = [
        name.removeprefix(prefix) for name in names if name.startswith("encoder.") == bool(prefix)
    ]
    rows: list[tuple[str, Shape]] = []
    for layer in range(config.layers):
        for label in labels:
            if label in layout.joint:
                continue
            norm_before = label in ("attn_norm", "mlp_norm")
            if label.endswith("_norm") and norm_before and config.norms == "after":
                continue
            mlp = label in ("gate", "up", "down", "gate_up")
            if (config.routed(layer) and mlp) or (
                not config.routed(layer) and label.startswith(("experts.", "router"))
            ):
                continue
            shape: Shape = shapes.get(label, (None, width))
            if label.endswith("down"):
                shape = (width, None)
            elif label.endswith("_norm") and label not in shapes:
                shape = (width,)
            if label == "router" and experts is not None:
                shape = (experts.count, width)
            if label.startswith("experts.") and experts is not None:
                part, together = label.removeprefix("experts."), "{e}" not in layout.names[label]
                shape = (experts.count, *shape) if together else shape
                rows += [
                    (f"layers.{layer}.experts.{e}.{part}", shape)
                    for e in range(1 if together else experts.count)
                ]
            else:
                rows.append((f"{prefix}layers.{layer}.{label}", shape))
    return rows
