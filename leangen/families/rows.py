"""The caches of many sequences of one language model, and bindings of those that run together."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np
import onnxruntime as ort

from leangen.families import key_values
from leangen.families.decoder import Floats
from leangen.session import Session

_POSITIONS = 64  # a cache is sized and copied by these: kernels group its positions by up to 16


def _whole(positions: int) -> int:
    return -(-positions // _POSITIONS) * _POSITIONS


class Rows:
    """The caches of all rows, and a binding for each set of rows that runs together."""

    def __init__(self, session: Session, rows: int, capacity: int) -> None:
        self.rows = rows
        self._graph = session.graph("model")
        self._vocab = session.bundle.config["vocab_size"]
        self._kept = key_values.allocate(session, rows, _whole(capacity))
        self._bindings: dict[tuple[int, int], _Binding] = {}

    def prefill(self, row: int, tokens: Items[int], length: int) -> Floats:
        """Append to a row of `length` tokens; logits [vocab], valid until the next call."""
        logits: Floats = self._binding(row, row + 1).run([tokens], [length])[0]
        return logits

    def decode(self, tokens: Items[int], lengths: Items[int]) -> Floats:
        """Append one token to each of the first rows; logits [rows, vocab], valid as above."""
        return self._binding(0, len(tokens)).run([[token] for token in tokens], lengths)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row."""
        self._kept.copy(self._kept, _whole(length), source, target)

    def _binding(self, first: int, stop: int) -> _Binding:
        if (first, stop) not in self._bindings:
            binding = self._bindings[first, stop] = _Binding(self._graph, stop - first, self._vocab)
            self._kept.bind(binding.binding, first, stop)
        return self._bindings[first, stop]


class _Binding:
    """Some neighbouring rows bound as past and present, with inputs and logits of their own."""

    def __init__(self, graph: ort.InferenceSession, rows: int, vocab: int) -> None:
        self._graph = graph
        self.binding = graph.io_binding()
        self._last = np.zeros(rows, np.int32)
        self._total = np.zeros((), np.int32)
        self._logits_from = np.full(1, -1, np.int64)
        self._logits = np.zeros((rows, 1, vocab), np.float32)
        self._ids = np.zeros((rows, 0), np.int64)
        key_values.bind_inputs(
            self.binding,
            seqlens_k=self._last,
            total_sequence_length=self._total,
            logits_from=self._logits_from,
        )
        logits = ort.OrtValue.ortvalue_from_numpy(self._logits)
        self.binding.bind_ortvalue_output("logits", logits)

    def run(self, tokens: Items[Items[int]], lengths: Items[int]) -> Floats:
        """Append `tokens`, as many to each row, to rows of `lengths`; logits [rows, vocab]."""
        new = len(tokens[0])
        if self._ids.shape[1] != new:
            self._ids = np.zeros((len(tokens), new), np.int64)
            key_values.bind_inputs(self.binding, input_ids=self._ids)
        self._ids[...] = tokens
        self._last[...] = lengths
        self._last += new - 1
        self._total[...] = self._last.max() + 1
        self._graph.run_with_iobinding(self.binding)
        logits: Floats = self._logits[:, 0]
        return logits
