"""One sequence in a language model: feed tokens, get the logits of what comes next.

The key and value caches are bound as both past and present, so that a run appends in place. Inputs
and the logits are bound once and changed in place too: a decoded token costs one call into ORT and
no copies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
import onnxruntime as ort

from leangen.families import key_values
from leangen.families.grown_cache import GrownCache
from leangen.session import Session

Floats = np.ndarray[Any, np.dtype[np.float32]]

CHUNK = 512
"""Prompt tokens per run: bounds the memory of attention scores and activations."""
_ROUND = 256  # capacities are multiples of this, so that a follow-up request fits the same cache


class Decoder:
    """A sequence and its cache of `capacity` tokens; a context manager that frees the cache.

    The cache freed last is kept, with its tokens, for the next sequence: one that begins like
    `prefix` starts from what they share (`length` tokens of it).
    `beside` are inputs of the graph that stay the same for the whole sequence, such as the keys
    and values that an encoder made.

    Not for use by two threads at once; several decoders of one session may run in several threads.
    `capacity` is checked by the caller.
    """

    def __init__(
        self,
        session: Session,
        capacity: int,
        prefix: Sequence[int] = (),
        *,
        role: str = "model",
        beside: Mapping[str, Floats] | None = None,
    ) -> None:
        self._role, self._beside = role, beside or {}
        self._spare: list[Any] = session.keep("language.spare_caches", list)
        try:  # one call, so that two threads never get the same one
            spare = self._spare.pop()
        except IndexError:
            spare = None
        self.length = 0 if spare is None else _shared(spare.tokens, prefix)
        """Tokens of the sequence that the cache holds."""
        if spare is not None and spare.capacity >= capacity:
            self._cache = spare
            spare.put_beside(self._beside)
            return
        if self.length == 0:
            spare = None  # freed before the larger one is made
        self._cache = _new_cache(session, role, capacity)
        self._cache.put_beside(self._beside)
        if spare is not None:
            self._cache.copy(spare, self.length)

    def fork(self, session: Session) -> Decoder:
        """Another sequence that begins like this one, with a cache of its own."""
        other = Decoder(session, self._cache.capacity, role=self._role, beside=self._beside)
        other.become(self)
        return other

    def become(self, other: Decoder) -> None:
        """Forget this sequence and continue the other's, which goes on too."""
        self.length = other.length
        self._cache.copy(other._cache, other.length)

    def rewind(self, length: int) -> None:
        """Forget all but the first `length` tokens."""
        self.length = min(self.length, length)

    def __enter__(self) -> Decoder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._spare[:] = [self._cache]

    def feed(self, tokens: Sequence[int]) -> Floats:
        """Append tokens; logits [vocab] after the last, valid until the next call."""
        logits = np.empty(0, np.float32)
        for start in range(0, len(tokens), CHUNK):
            logits = self._run(tokens[start : start + CHUNK], all_logits=False)[0]
        return logits

    def feed_all(self, tokens: Sequence[int]) -> Floats:
        """Append up to `CHUNK` tokens; logits [n, vocab] after each, valid until the next call."""
        return self._run(tokens, all_logits=True)

    def _run(self, tokens: Sequence[int], *, all_logits: bool) -> Floats:
        before, self.length = self.length, self.length + len(tokens)
        del self._cache.tokens[before:]
        logits: Floats = self._cache.run(tokens, self.length, all_logits=all_logits)
        self._cache.tokens += tokens
        return logits


def _new_cache(session: Session, role: str, capacity: int) -> Any:
    if "io" in session.bundle.config:
        return GrownCache(session, role)
    return _Cache(session, role, -(-capacity // _ROUND) * _ROUND)


class _Cache:
    """Key and value buffers, and the binding of them and of the other inputs and outputs."""

    def __init__(self, session: Session, role: str, capacity: int) -> None:
        self.capacity = capacity
        self.tokens: list[int] = []
        """What the buffers hold the keys and values of."""
        self._graph = session.graph(role)
        self._binding = self._graph.io_binding()
        config = session.bundle.config
        self._vocab = config.get("head_size", config["vocab_size"])
        self._kept = key_values.allocate(session, 1, capacity, role)
        self._kept.bind(self._binding)
        self._last = np.zeros(1, np.int32)
        self._total = np.zeros((), np.int32)
        self._logits_from = np.zeros(1, np.int64)
        key_values.bind_inputs(
            self._binding,
            seqlens_k=self._last,
            total_sequence_length=self._total,
            logits_from=self._logits_from,
        )
        self._ids = np.zeros((1, 0), np.int64)
        self._logits = np.zeros((1, 0, 0), np.float32)

    def put_beside(self, inputs: Mapping[str, Floats]) -> None:
        """Bind the inputs that stay the same."""
        self._beside = inputs  # ORT reads their memory
        key_values.bind_inputs(self._binding, **inputs)

    def copy(self, other: _Cache, length: int) -> None:
        """Take over the other's first `length` tokens; both caches have room for them."""
        # In whole rounds: leangen's attention orders keys otherwise than ORT's, in blocks of 16.
        self._kept.copy(other._kept, -(-length // _ROUND) * _ROUND)
        self.tokens = other.tokens[:length]

    def run(self, tokens: Sequence[int], total: int, *, all_logits: bool) -> Floats:
        """Logits [1 or n, vocab] of `tokens`, which end the sequence at `total`."""
        n = len(tokens)
        wanted = n if all_logits else 1
        if self._ids.shape[1] != n:
            self._ids = np.zeros((1, n), np.int64)
            key_values.bind_inputs(self._binding, input_ids=self._ids)
        if self._logits.shape[1] != wanted:
            self._logits = np.zeros((1, wanted, self._vocab), np.float32)
            value = ort.OrtValue.ortvalue_from_numpy(self._logits)
            self._binding.bind_ortvalue_output("logits", value)
        self._ids[0] = tokens
        self._last[0] = total - 1
        self._total[...] = total
        self._logits_from[0] = 0 if all_logits else -1
        self._graph.run_with_iobinding(self._binding)
        logits: Floats = self._logits[0]
        return logits


def encoder_states(session: Session, **feeds: np.ndarray[Any, Any]) -> dict[str, Floats]:
    """The keys and values that the graph `encoder` makes for its decoder, by its inputs' names."""
    layers = range(session.bundle.config["layers"])
    names = [f"cross_{kind}_{layer}" for layer in layers for kind in ("key", "value")]
    return dict(zip(names, session.run("encoder", feeds, names), strict=True))


def _shared(held: Sequence[int], prefix: Sequence[int]) -> int:
    """How many tokens the two begin with alike."""
    return next(
        (i for i, (a, b) in enumerate(zip(held, prefix, strict=False)) if a != b),
        min(len(held), len(prefix)),
    )
