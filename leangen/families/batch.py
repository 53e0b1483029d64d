"""Continuous batching: sequences of one language model that join and leave a running batch.

The key and value caches of all rows are one buffer, batch outermost. The sequences that decode are
its first b rows, so a step binds a view of them and copies nothing. Joining is the prefill of one
row, `CHUNK` tokens at a time between the decode steps of the others, whose streams go on; when a
sequence leaves, the last row moves into the hole.

What a sequence generates does not depend on who runs beside it. Prompts are cut into chunks at the
same places whatever the load, and a row's result has the same bits in a run of two rows or more:
ONNX Runtime's 4-bit kernel rounds a single row differently (4.6e-5 in a logit of SmolLM2-135M), so
a sequence that decodes alone runs beside an unused row, which costs about an eighth more time.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort

from leangen import clock
from leangen.errors import RequestError
from leangen.families import language
from leangen.families.decoder import Floats
from leangen.families.sampling import Choice
from leangen.records import Output, Step
from leangen.session import Session

CHUNK = 32
"""Prompt tokens per run: about as long as a decode step of a full batch."""
_LEAST_ROWS = 2
_POSITIONS = 64  # a cache is sized and copied by these: kernels group its positions by up to 16


class Sequence:
    """One request in a batch: its prompt, its reply, and `output` once it is done.

    Raises RequestError for a prompt that does not fit `capacity` tokens or the model's context, and
    for what only a sequence by itself can do: several samples, beams, speculation.
    """

    def __init__(self, session: Session, request: language.Request, capacity: int) -> None:
        for name, off in (("n", 1), ("beams", 1), ("speculate", 0)):
            if getattr(request, name) != off:
                raise RequestError(f"a batch takes no {name}: leave it out, or ask one by one")
        self.request = request
        self.prompt = language.encode(session, request)
        room = capacity - len(self.prompt)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(self.prompt)} tokens and a sequence holds {capacity} here: "
                f"shorten the prompt to at most {capacity - 1} tokens"
            )
        self.reply = language.empty_reply(session, request, self.prompt)
        self.reply.limit = min(self.reply.limit, room)
        self.reused = 0
        """Tokens of the prompt that another request had left in the cache."""
        self.output: Output | None = None
        self.length = 0
        """Tokens in the cache."""
        self._tokenizer = language.tokenizer(session)
        self._chooser = language.chooser(session, request, self.prompt)

    def take(self, logits: Floats) -> Step:
        """Choose the next token from logits [vocab]; `output` is set if it is the last one."""
        first = not self.reply.tokens
        choice = self._chooser.choose(logits)
        text = self.reply.push(choice)
        if self.reply.stop_reason is not None:
            self.output = self.so_far(self.reply.stop_reason)
        return Step(
            kind="prefill" if first else "decode",
            units=1,
            text=text,
            tokens=(choice.token,),
            counts={"reused": self.reused} if first else {},
        )

    def so_far(self, reason: str) -> Output:
        """What has been generated, ended for `reason`; with `extra["logprobs"]` if asked for."""
        reply = self.reply
        return Output(
            prompt_units=len(self.prompt),
            text=reply.text,
            tokens=list(reply.tokens),
            stop_reason=reason,
            extra={"logprobs": [self._told(choice) for choice in reply.choices]}
            if reply.choices
            else {},
        )

    def _told(self, choice: Choice) -> dict[str, Any]:
        def text(token: int) -> str:
            return self._tokenizer.decode([token], skip_special_tokens=False)

        return {
            "token": text(choice.token),
            "logprob": choice.logprob,
            "likeliest": [(text(token), logprob) for token, logprob in choice.likeliest],
        }


@dataclass(frozen=True, slots=True)
class Progress:
    """What one sequence gained in a step of the batch."""

    sequence: Sequence
    step: Step
    """A chunk of the prompt that ends in no token has 0 units."""
    busy_ns: int
    """Its part of the computing time: a run's time is split evenly among the run's rows."""


class Batch:
    """Up to `rows` sequences of up to `capacity` tokens each. Not for two threads at once.

    Memory is taken as it is written: `row_bytes` for each row that a sequence fills to its end.
    """

    def __init__(self, session: Session, *, rows: int, capacity: int) -> None:
        self.rows = rows
        self.capacity = capacity
        self._cache = _Rows(session, max(rows, _LEAST_ROWS), capacity)
        self._decoding: list[Sequence] = []  # by row
        self._waiting: list[Sequence] = []
        self._joining: Sequence | None = None
        self._joining_row = 0
        # What a row's cache holds of a prompt, for requests that begin alike: what was decoded is
        # not what a prompt's chunks would have computed, to the last bit.
        self._held: list[list[int]] = [[] for _ in range(self._cache.rows)]
        self._last_used = [0] * self._cache.rows
        self._uses = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of one row's cache."""
        return self._cache.row_bytes

    @property
    def size(self) -> int:
        """Sequences in the batch, joining ones included."""
        return len(self._decoding) + len(self._waiting) + (self._joining is not None)

    @property
    def cached_tokens(self) -> int:
        """Tokens of running sequences in the cache."""
        joining = 0 if self._joining is None else self._joining.length
        return joining + sum(sequence.length for sequence in self._decoding)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence join. Raises RequestError when all rows are taken."""
        if self.size >= self.rows:
            raise RequestError(f"all {self.rows} rows of the batch are taken: add it later")
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it stands; one that has left already is no error."""
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence is self._joining:
            self._held[self._joining_row] = sequence.prompt[: sequence.length]
            self._joining = None
        elif sequence in self._decoding:
            self._leave(self._decoding.index(sequence))

    def step(self) -> list[Progress]:
        """One token for every sequence that decodes, one chunk for the one that joins.

        Sequences whose `output` is then set have left the batch.
        """
        return [*self._decode(), *self._prefill()]

    def _decode(self) -> list[Progress]:
        sequences = list(self._decoding)
        if not sequences:
            return []
        begin_ns = clock.monotonic_ns()
        tokens = [sequence.reply.tokens[-1] for sequence in sequences]
        lengths = [sequence.length for sequence in sequences]
        while len(tokens) < _LEAST_ROWS:  # writes behind what that row holds, which is overwritten
            tokens.append(0)
            lengths.append(self._unused_position(len(lengths)))
        logits = self._cache.decode(tokens, lengths)
        each_ns = (clock.monotonic_ns() - begin_ns) // len(sequences)
        done = []
        for sequence, row in zip(sequences, logits, strict=False):
            sequence.length += 1
            done.append(_timed(sequence, partial(sequence.take, row), each_ns))
        for row in reversed(range(len(sequences))):
            if sequences[row].output is not None:
                self._leave(row)
        return done

    def _unused_position(self, row: int) -> int:
        if self._joining is not None and self._joining_row == row:
            return self._joining.length
        return min(len(self._held[row]), self.capacity - 1)

    def _prefill(self) -> list[Progress]:
        begin_ns = clock.monotonic_ns()
        if self._joining is None:
            if not self._waiting:
                return []
            self._joining = self._waiting.pop(0)
            self._joining_row = self._place(self._joining)
        sequence, row = self._joining, self._joining_row
        chunk = sequence.prompt[sequence.length : sequence.length + CHUNK]
        logits = self._cache.prefill(row, chunk, sequence.length)
        sequence.length += len(chunk)
        busy_ns = clock.monotonic_ns() - begin_ns
        if sequence.length < len(sequence.prompt):
            return [Progress(sequence, Step(kind="prefill", units=0), busy_ns)]
        self._joining = None
        done = _timed(sequence, partial(sequence.take, logits), busy_ns)
        self._held[row] = sequence.prompt[: sequence.length]
        if sequence.output is None:
            self._move(row, len(self._decoding), sequence.length)
            self._decoding.append(sequence)
        return [done]

    def _place(self, sequence: Sequence) -> int:
        """A free row for the sequence, with as much of its prompt as any row holds."""
        free = range(len(self._decoding), self._cache.rows)
        # The last token is always fed: its logits are wanted.
        shared = [_common(held, sequence.prompt[:-1]) for held in self._held]
        best = max(range(self._cache.rows), key=shared.__getitem__)
        row = min(free, key=self._last_used.__getitem__)
        if shared[best] and best in free:
            row = best
        elif shared[best]:
            self._cache.copy(best, row, shared[best])
        sequence.length = sequence.reused = shared[best]
        self._held[row] = sequence.prompt[: sequence.reused]
        self._use(row)
        return row

    def _leave(self, row: int) -> None:
        """Free a row: the last one moves into the hole."""
        last = self._decoding.pop()
        if row < len(self._decoding):
            self._decoding[row] = last
            self._move(len(self._decoding), row, last.length)

    def _move(self, source: int, target: int, length: int) -> None:
        if source != target:
            self._cache.copy(source, target, length)
            self._held[target] = list(self._held[source])
        self._use(target)

    def _use(self, row: int) -> None:
        self._uses += 1
        self._last_used[row] = self._uses


def _timed(sequence: Sequence, take: Callable[[], Step], busy_ns: int) -> Progress:
    begin_ns = clock.monotonic_ns()
    step = take()
    return Progress(sequence, step, busy_ns + clock.monotonic_ns() - begin_ns)


def _common(held: Items[int], prompt: Items[int]) -> int:
    """Tokens that both begin with, in whole chunks: the rest is computed in other runs."""
    length = 0
    while (
        length + CHUNK <= min(len(held), len(prompt))
        and held[length : length + CHUNK] == prompt[length : length + CHUNK]
    ):
        length += CHUNK
    return length


def _whole(positions: int) -> int:
    return -(-positions // _POSITIONS) * _POSITIONS


class _Rows:
    """The caches of all rows, and a binding for each set of rows that runs together."""

    def __init__(self, session: Session, rows: int, capacity: int) -> None:
        config = session.bundle.config
        self.rows = rows
        self._graph = session.graph("model")
        self._vocab = config["vocab_size"]
        # Zeroed pages are the kernel's until written: rows that are not used take no memory.
        capacity = _whole(capacity)
        shape = (config["layers"], 2, rows, config["kv_heads"], capacity, config["head_dim"])
        self._buffers = np.zeros(shape, np.float32)
        self._bindings: dict[tuple[int, int], _Binding] = {}

    @property
    def row_bytes(self) -> int:
        return self._buffers.nbytes // self.rows

    def prefill(self, row: int, tokens: Items[int], length: int) -> Floats:
        """Append to a row of `length` tokens; logits [vocab], valid until the next call."""
        logits: Floats = self._binding(row, row + 1).run([tokens], [length])[0]
        return logits

    def decode(self, tokens: Items[int], lengths: Items[int]) -> Floats:
        """Append one token to each of the first rows; logits [rows, vocab], valid as above."""
        return self._binding(0, len(tokens)).run([[token] for token in tokens], lengths)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row."""
        length = _whole(length)
        self._buffers[:, :, target, :, :length] = self._buffers[:, :, source, :, :length]

    def _binding(self, first: int, stop: int) -> _Binding:
        if (first, stop) not in self._bindings:
            part = self._buffers[:, :, first:stop]
            self._bindings[first, stop] = _Binding(self._graph, part, self._vocab)
        return self._bindings[first, stop]


class _Binding:
    """Some neighbouring rows bound as past and present, with inputs and logits of their own."""

    def __init__(self, graph: ort.InferenceSession, buffers: Floats, vocab: int) -> None:
        self._graph = graph
        self._binding = graph.io_binding()
        rows = buffers.shape[2]
        for layer, pair in enumerate(buffers):
            for kind, buffer in zip(("key", "value"), pair, strict=True):
                value = ort.OrtValue.ortvalue_from_numpy(buffer)
                self._binding.bind_ortvalue_input(f"past_{kind}_{layer}", value)
                self._binding.bind_ortvalue_output(f"present_{kind}_{layer}", value)
        self._last = np.zeros(rows, np.int32)
        self._total = np.zeros((), np.int32)
        self._logits_from = np.full(1, -1, np.int64)
        self._logits = np.zeros((rows, 1, vocab), np.float32)
        self._ids = np.zeros((rows, 0), np.int64)
        self._input("seqlens_k", self._last)
        self._input("total_sequence_length", self._total)
        self._input("logits_from", self._logits_from)
        logits = ort.OrtValue.ortvalue_from_numpy(self._logits)
        self._binding.bind_ortvalue_output("logits", logits)

    def run(self, tokens: Items[Items[int]], lengths: Items[int]) -> Floats:
        """Append `tokens`, as many to each row, to rows of `lengths`; logits [rows, vocab]."""
        new = len(tokens[0])
        if self._ids.shape[1] != new:
            self._ids = np.zeros((len(tokens), new), np.int64)
            self._input("input_ids", self._ids)
        self._ids[...] = tokens
        self._last[...] = lengths
        self._last += new - 1
        self._total[...] = self._last.max() + 1
        self._graph.run_with_iobinding(self._binding)
        logits: Floats = self._logits[:, 0]
        return logits

    def _input(self, name: str, array: np.ndarray[Any, Any]) -> None:
        # The OrtValue is a window on the array's memory: later changes to the array are seen.
        self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
