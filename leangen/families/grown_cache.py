"""The cache of a language model that another program exported: keys and values that grow.

Such a graph takes `past_key_values.I.key` of as many tokens as there were, and its `present.I.key`
is longer. What a run returns is bound as the past of the next one, so nothing is copied here.

The bundle's config has `io`, the names of what the graph takes and gives: `input_ids`, `logits`,
`past` and `present` (lists, a key and a value per layer, in one order), and where the graph has
them `attention_mask`, `position_ids`, `use_cache_branch` (optimum's merged graphs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from leangen.errors import BundleError
from leangen.session import Session

Array = np.ndarray[Any, Any]

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class GrownCache:
    """What `decoder.Decoder` keeps a sequence in, where the graph does not append in place."""

    def __init__(self, session: Session, role: str) -> None:
        config = session.bundle.config
        self.capacity: int = config["context_length"]
        self.tokens: list[int] = []
        self._io: Mapping[str, Any] = config["io"]
        self._graph = session.graph(role)
        types = {given.name: given.type for given in self._graph.get_inputs()}
        kept = _TYPES[types[self._io["past"][0]]]
        empty = np.zeros((1, config["kv_heads"], 0, config["head_dim"]), kept)
        self._past = [ort.OrtValue.ortvalue_from_numpy(empty) for _ in self._io["past"]]
        self._length = 0

    def put_beside(self, inputs: Mapping[str, Array]) -> None:
        """Nothing: such a graph has no encoder."""

    def copy(self, other: GrownCache, length: int) -> None:
        """Take over the other's first `length` tokens."""
        self._past = [_first(value, length) for value in other._past]
        self._length, self.tokens = length, other.tokens[:length]

    def run(self, tokens: Sequence[int], total: int, *, all_logits: bool) -> Array:
        """Logits [1 or n, vocab] of `tokens`, which end the sequence at `total`."""
        before = total - len(tokens)
        if before < self._length:
            self._past = [_first(value, before) for value in self._past]
        io, binding = self._io, self._graph.io_binding()
        feeds = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(before, total, dtype=np.int64)[None],
            "use_cache_branch": np.array([before > 0]),
        }
        for name, array in feeds.items():
            if name in io:
                binding.bind_cpu_input(io[name], array)
        for name, value in zip(io["past"], self._past, strict=True):
            binding.bind_ortvalue_input(name, value)
        for name in (io["logits"], *io["present"]):
            binding.bind_output(name, "cpu")
        self._graph.run_with_iobinding(binding)
        logits, *self._past = binding.get_outputs()
        self._length = total
        rows = np.asarray(logits.numpy()[0], np.float32)
        if all_logits and len(rows) != len(tokens):
            raise BundleError(
                f"the graph gives logits of its last token only ({len(rows)} for {len(tokens)} "
                "tokens): export it with the logits of all of them"
            )
        return rows if all_logits else rows[-1:]


def _first(value: ort.OrtValue, length: int) -> ort.OrtValue:
    """The first tokens of a layer's keys or values."""
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[:, :, :length]))
