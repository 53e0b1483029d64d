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

from leangen import clock
from leangen.errors import RequestError
from leangen.families import language
from leangen.families.decoder import Floats
from leangen.families.rows import Rows
from leangen.families.sampling import Choice
from leangen.families.text_stream import token_bytes
from leangen.records import Output, Step
from leangen.session import Session

CHUNK = 32
"""Prompt tokens per run: about as long as a decode step of a full batch."""
_LEAST_ROWS = 2


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
            logprobs=() if choice.logprob is None else (self._told(choice),),
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
        def told(token: int, logprob: float | None) -> dict[str, Any]:
            return {"bytes": token_bytes(self._tokenizer, token), "logprob": logprob}

        likeliest = [told(*likely) for likely in choice.likeliest]
        return told(choice.token, choice.logprob) | {"likeliest": likeliest}


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

    The caches' memory is taken as it is written: an unused row takes none.
    """

    def __init__(self, session: Session, *, rows: int, capacity: int) -> None:
        self.rows = rows
        self.capacity = capacity
        self._cache = Rows(session, max(rows, _LEAST_ROWS), capacity)
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
        """One token for every sequence that decodes, about one chunk for those that join.

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
        """Chunks of prompts, until together they are as long as one: short prompts join at once."""
        done: list[Progress] = []
        left = CHUNK
        while left > 0 and (self._joining is not None or self._waiting):
            progress, tokens = self._prefill_chunk()
            done.append(progress)
            left -= tokens
        return done

    def _prefill_chunk(self) -> tuple[Progress, int]:
        begin_ns = clock.monotonic_ns()
        if self._joining is None:
            self._joining = self._waiting.pop(0)
            self._joining_row = self._place(self._joining)
        sequence, row = self._joining, self._joining_row
        chunk = sequence.prompt[sequence.length : sequence.length + CHUNK]
        logits = self._cache.prefill(row, chunk, sequence.length)
        sequence.length += len(chunk)
        busy_ns = clock.monotonic_ns() - begin_ns
        if sequence.length < len(sequence.prompt):
            return Progress(sequence, Step(kind="prefill", units=0), busy_ns), len(chunk)
        self._joining = None
        done = _timed(sequence, partial(sequence.take, logits), busy_ns)
        self._held[row] = sequence.prompt[: sequence.length]
        if sequence.output is None:
            self._move(row, len(self._decoding), sequence.length)
            self._decoding.append(sequence)
        return done, len(chunk)

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
