"""Choosing the next token from logits: penalties and biases, then greedy, or a draw from what
temperature, top-k, top-p and min-p leave.

A `Chooser` holds all that a sequence's choice depends on beside the logits, so that whoever runs
the model (one sequence, a verified draft, a batch) chooses the same tokens.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np

from leangen.errors import RequestError

Floats = np.ndarray[Any, np.dtype[np.float32]]
Indices = np.ndarray[Any, np.dtype[np.int64]]

MOST_LOGPROBS = 20
LARGEST = 1e6
"""That a logit may be changed by, or divided: float32 holds whatever comes of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen; raises RequestError for a value that makes no sense."""

    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that hold this probability."""
    min_p: float = 0.0
    """Draw from tokens at least this share as likely as the likeliest (2407.01082)."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the reply become less likely (1909.05858)."""
    presence_penalty: float = 0.0
    """Taken once from the logit of each token that the reply has."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token as often as the reply has it."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens; -inf bans one."""
    logprobs: int | None = None
    """Keep each token's log-probability and those of this many likeliest; None: do not."""
    seed: int = 0

    def __post_init__(self) -> None:
        temperature, top_p, penalty = self.temperature, self.top_p, self.repetition_penalty
        most = MOST_LOGPROBS
        check(
            self,
            temperature=(is_real(temperature) and temperature >= 0, "0 (greedy) or more"),
            top_k=(is_whole(self.top_k, 0), "a whole number, 0 (off) or more"),
            top_p=(is_real(top_p) and 0 < top_p <= 1, "more than 0 and at most 1"),
            min_p=(is_real(self.min_p) and 0 <= self.min_p <= 1, "0 (off) to 1"),
            repetition_penalty=(
                _is_moderate(penalty) and penalty >= 1 / LARGEST,
                f"{1 / LARGEST:g} to {LARGEST:g} (1 is off)",
            ),
            presence_penalty=(_is_moderate(self.presence_penalty), f"{_MODERATE} (0 is off)"),
            frequency_penalty=(_is_moderate(self.frequency_penalty), f"{_MODERATE} (0 is off)"),
            logit_bias=(
                _is_bias(self.logit_bias),
                f"a mapping of token ids to numbers, {_MODERATE}, or -inf",
            ),
            logprobs=(
                self.logprobs is None or is_whole(self.logprobs, 0) and self.logprobs <= most,
                f"a whole number, 0 to {most}, or None",
            ),
            seed=(is_whole(self.seed, 0), "a whole number, 0 or more"),
        )


def check(request: object, **rules: tuple[bool, str]) -> None:
    """Raise RequestError for the first field whose rule (holds, expected) does not hold."""
    for name, (holds, expected) in rules.items():
        if not holds:
            raise RequestError(f"{name} is {getattr(request, name)!r}, expected {expected}")


def is_whole(value: object, least: int) -> bool:
    """Whether it is a whole number of at least that."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_real(value: object) -> bool:
    """Whether it is a number that a finite float can hold."""
    return isinstance(value, int | float) and abs(value) <= sys.float_info.max


def _is_moderate(value: object) -> bool:
    return is_real(value) and abs(cast(float, value)) <= LARGEST


_MODERATE = f"-{LARGEST:g} to {LARGEST:g}"


def _is_bias(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        is_whole(token, 0) and (_is_moderate(bias) or bias == -math.inf)
        for token, bias in value.items()
    )


class Constraint(Protocol):
    """What the text must obey, such as a grammar: see `leangen.families.grammar`."""

    def mask(self, logits: Floats) -> None:
        """Set the logits [vocab] of tokens that may not come next to -inf."""
        ...

    def accept(self, token: int) -> None:
        """Take the chosen token."""
        ...


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token; its log-probability in nats, and the likeliest tokens' with theirs.

    Log-probabilities are the model's own: before biases, penalties, temperature and cuts. None
    and empty where `Sampling.logprobs` does not ask for them.
    """

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


class Chooser:
    """Chooses the tokens of one sequence, one after the other.

    The choice depends on the options, the prompt, the seed, the logits given so far and nothing
    else. `seed` goes before that of the options.
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Collection[int],
        *,
        seed: int | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        self._sampling = sampling
        # Greedy draws nothing, and numpy.random takes 10 ms to import.
        seed = sampling.seed if seed is None else seed
        self._rng = np.random.default_rng(seed) if sampling.temperature else None
        self._constraint = constraint
        self._seen = set(prompt)
        self._counts: Counter[int] = Counter()
        self._biased = np.array(list(sampling.logit_bias), np.int64)
        self._bias = np.array(list(sampling.logit_bias.values()), np.float32)

    def choose(self, logits: Floats) -> Choice:
        """The next token from logits [vocab], which are left as they are."""
        options = self._sampling
        token = sample(
            self._adjusted(logits),
            self._rng,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            min_p=options.min_p,
        )
        self._seen.add(token)
        self._counts[token] += 1
        if self._constraint is not None:
            self._constraint.accept(token)
        if options.logprobs is None:
            return Choice(token)
        return _with_logprobs(token, logits, options.logprobs)

    def _adjusted(self, logits: Floats) -> Floats:
        options, out = self._sampling, logits
        if len(self._biased):
            out = logits.copy()
            out[self._biased] += self._bias
        if options.repetition_penalty != 1:
            out = penalize(out, self._seen, options.repetition_penalty)
        if options.presence_penalty or options.frequency_penalty:
            out = discourage(out, self._counts, options.presence_penalty, options.frequency_penalty)
        if self._constraint is not None:
            out = logits.copy() if out is logits else out
            self._constraint.mask(out)
        return out


def penalize(logits: Floats, seen: Collection[int], penalty: float) -> Floats:
    """Logits [vocab] with those of `seen` tokens made less likely by a factor (CTRL, 1909.05858).

    Positive logits are divided by `penalty`, negative ones multiplied; 1 changes nothing.
    """
    out = logits.copy()
    tokens = np.fromiter(seen, np.int64, len(seen))
    some = out[tokens]
    out[tokens] = np.where(some > 0, some / penalty, some * penalty)
    return out


def discourage(
    logits: Floats, counts: Mapping[int, int], presence: float, frequency: float
) -> Floats:
    """Logits [vocab] less `presence` for each counted token and `frequency` times its count."""
    out = logits.copy()
    tokens = np.fromiter(counts, np.int64, len(counts))
    times = np.fromiter(counts.values(), np.float32, len(counts))
    out[tokens] -= np.float32(presence) + np.float32(frequency) * times
    return out


def sample(
    logits: Floats,
    rng: np.random.Generator | None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> int:
    """One token drawn from softmax(logits [vocab] / temperature), after cutting its tail.

    `top_k` keeps that many tokens (0: all); `top_p` then keeps the fewest likeliest tokens that
    hold this much probability (nucleus sampling, 1904.09751), `min_p` those at least this share as
    likely as the likeliest (2407.01082). Temperature 0 is greedy and needs no `rng`.
    """
    if temperature == 0:
        return int(logits.argmax())
    assert rng is not None
    kept = _likeliest(logits, top_k) if top_k else np.arange(len(logits))
    # Colder is greedy to any float32, hotter draws from all alike; both would overflow.
    temperature = min(max(temperature, 1e-6), 1e6)
    weights = np.exp((logits[kept] - logits.max()) / np.float32(temperature))
    if top_p < 1:
        nucleus = _nucleus(weights, top_p)
        kept, weights = kept[nucleus], weights[nucleus]
    if min_p > 0:
        likely = weights >= np.float32(min_p)  # the likeliest token's weight is 1
        kept, weights = kept[likely], weights[likely]
    edges = np.cumsum(weights, dtype=np.float64)
    drawn = int(np.searchsorted(edges, rng.random() * edges[-1], side="right"))
    return int(kept[min(drawn, len(kept) - 1)])


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities of logits [vocab], in nats."""
    shifted = logits - logits.max()
    out: Floats = shifted - np.float32(np.log(np.exp(shifted).sum(dtype=np.float64)))
    return out


def likeliest(values: Floats, n: int) -> Indices:
    """Places of the n largest values, largest first, of equals the first first."""
    places = np.sort(_likeliest(values, n))
    return places[np.argsort(-values[places], kind="stable")]


def _with_logprobs(token: int, logits: Floats, n: int) -> Choice:
    logprobs = log_softmax(logits)
    top = likeliest(logits, n) if n else ()
    return Choice(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in top))


def _likeliest(values: Floats, n: int) -> Indices:
    """Places of the n largest values, in no order."""
    if n >= len(values):
        return np.arange(len(values))
    # partition on values is several times faster than argpartition
    least = np.partition(values, -n)[-n]
    above, ties = np.flatnonzero(values > least), np.flatnonzero(values == least)
    return np.concatenate([above, ties[: n - len(above)]])


def _nucleus(weights: Floats, top_p: float) -> Indices:
    """Places of the fewest largest weights that hold the share `top_p`, largest first."""
    enough = top_p * weights.sum(dtype=np.float64)
    n = 64  # mostly enough: sorting a whole vocabulary would take as long as a decoded token
    while True:
        places = _likeliest(weights, n)
        if n >= len(weights) or weights[places].sum(dtype=np.float64) >= enough:
            break
        n *= 8
    places = places[np.argsort(-weights[places], kind="stable")]
    within = np.searchsorted(np.cumsum(weights[places], dtype=np.float64), enough)
    return places[: int(within) + 1]
