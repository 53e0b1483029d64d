"""Beam search: the reply with the highest mean log-probability that a search of some width finds.

The rules are those of transformers' `generate` with its defaults (length penalty 1, no early
stopping): a beam that ends among the best of its round is kept aside, and the search ends when no
running beam has a better mean than the worst of as many finished ones as there are beams.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from leangen.families.decoder import Decoder, Floats
from leangen.families.sampling import likeliest, log_softmax
from leangen.session import Session

Mask = Callable[[Floats, int], None]
"""Sets to -inf, in the scores of the next token, what may not follow so many tokens."""


@dataclass(frozen=True, slots=True)
class _Beam:
    tokens: tuple[int, ...]
    logprob: float
    parent: int = 0
    """Its place among the beams of the round before."""

    @property
    def score(self) -> float:
        return self.logprob / len(self.tokens)


def search(
    session: Session,
    decoder: Decoder,
    logits: Floats,
    *,
    beams: int,
    ends: Collection[int],
    limit: int,
    mask: Mask | None = None,
) -> Iterator[Sequence[int] | None]:
    """None after each round of one token per beam; at last the tokens found, at most `limit`.

    `logits` [vocab] follow the prompt that `decoder` holds. Each beam beside the first takes a
    cache of its own. `mask` takes tokens out of the log-probabilities, which stay what they were.
    """
    width = max(2, 1 + len(ends)) * beams  # even if all of them end, as many go on
    running, finished = [_Beam((), 0.0)], list[_Beam]()
    decoders, rows = [decoder], [logits]
    with ExitStack() as stack:
        while True:
            candidates = _continued(running, rows, width, mask)
            last = len(candidates[0].tokens) == limit
            ended = [beam for beam in candidates if last or beam.tokens[-1] in ends]
            finished += [beam for beam in candidates[:beams] if beam in ended]
            finished = sorted(finished, key=lambda beam: -beam.score)[:beams]
            running = [beam for beam in candidates if beam not in ended][:beams]
            full = len(finished) == beams
            if last or not running or (full and running[0].score <= finished[-1].score):
                yield finished[0].tokens
                return
            yield None
            while len(decoders) < len(running):
                decoders.append(stack.enter_context(decoder.fork(session)))
            decoders = _inherited(decoders, [beam.parent for beam in running])
            heirs = zip(decoders, running, strict=False)
            rows = [heir.feed([beam.tokens[-1]]) for heir, beam in heirs]


def _continued(
    running: Sequence[_Beam], rows: Sequence[Floats], width: int, mask: Mask | None
) -> list[_Beam]:
    """The `width` likeliest sequences that are a token longer, likeliest first."""
    parts = []
    for beam, row in zip(running, rows, strict=True):
        logprobs = log_softmax(row)
        if mask is not None:
            mask(logprobs, len(beam.tokens))
        parts.append(logprobs + np.float32(beam.logprob))
    totals = np.concatenate(parts)
    vocab = len(rows[0])
    return [
        _Beam((*running[at // vocab].tokens, at % vocab), float(totals[at]), at // vocab)
        for at in likeliest(totals, width).tolist()
    ]


def _inherited(decoders: Sequence[Decoder], parents: Sequence[int]) -> list[Decoder]:
    """Decoders in the order of the children, each holding what its parent's held."""
    free = [decoder for at, decoder in enumerate(decoders) if at not in parents]
    out = []
    for child, parent in enumerate(parents):
        if parent not in parents[:child]:
            out.append(decoders[parent])
            continue
        out.append(free.pop())
        out[-1].become(decoders[parent])
    return out + free
