"""Quality of a language model against its reference: one text, scored by both.

The text is cut into windows of `WINDOW` tokens without overlap, and every token after the first of
a window is predicted from those before it. KL divergence and agreement look at the whole
distribution, perplexity at the token that came; flips (Dutta et al., "Accuracy is not all you
need", arXiv 2407.09141) count predictions that turned from right to wrong or back, which a mean
hides. Standard errors take tokens as independent.
"""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from leangen.errors import RequestError
from leangen.families import language
from leangen.quality.measures import Array, Measure, Task, mean
from leangen.session import Session

WINDOW = 512
PROMPT_TOKENS = 32
"""Tokens of a window that a greedy continuation starts from."""


@dataclass(frozen=True, slots=True)
class Scored:
    """A text as one model sees it."""

    logits: Array
    """[n, vocab] before each scored token; in an unlinked file, so memory holds what is used."""
    tokens: Array
    """[n]: the tokens that came."""
    continuations: list[list[int]]
    """Greedy, one for each prompt."""
    new_tokens: int
    """Length that was asked of them."""


def observe(session: Session, task: Task, reference: Scored | None) -> Scored:
    """Score the text and continue its windows.

    Raises RequestError for a text that cannot be read or is shorter than two tokens.
    """
    ids = language.tokenizer(session).encode(read(task.data)).ids[: task.tokens]
    size = min(WINDOW, session.bundle.config["context_length"])
    windows = [ids[start : start + size] for start in range(0, len(ids), size)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise RequestError(
            f"the text has {len(ids)} tokens, expected 2 or more: give a longer --data"
        )
    n = sum(len(window) - 1 for window in windows)
    with tempfile.TemporaryFile(prefix="leangen-") as file:
        vocab = session.bundle.config["vocab_size"]
        logits: Array = np.memmap(file, np.float32, "w+", shape=(n, vocab))
    done = 0
    for window in windows:
        logits[done : done + len(window) - 1] = language.logits(session, window)[:-1]
        done += len(window) - 1
    room = session.bundle.config["context_length"] - task.new_tokens
    starts = [window[: min(PROMPT_TOKENS, room)] for window in windows[: task.prompts]]
    return Scored(
        logits,
        np.concatenate([window[1:] for window in windows]),
        [_continue(session, start, task.new_tokens) for start in starts],
        task.new_tokens,
    )


def measure(reference: Scored, candidate: Scored) -> list[Measure]:
    """KL divergence first; then agreement, perplexities, flips, and where greedy texts part."""
    if reference.logits.shape != candidate.logits.shape:
        raise RequestError(
            f"the models score {reference.logits.shape} and {candidate.logits.shape} logits: "
            "expected the same tokenizer and vocabulary in both"
        )
    kl, same = kl_and_top1(reference.logits, candidate.logits)
    before, right_before = _losses(reference)
    after, right_after = _losses(candidate)
    return [
        mean("KL divergence", kl, "tokens", "nats"),
        mean("top-1 agreement", same * 100.0, "tokens", "%"),
        _perplexity("perplexity", after),
        _perplexity("reference perplexity", before),
        mean("log-perplexity change", after - before, "tokens", "nats"),
        mean("flip rate", (right_before != right_after) * 100.0, "tokens", "%"),
        *_divergence(reference, candidate),
    ]


def read(path: Path | None) -> str:
    """The text to score, without the <doc> tags of Wikipedia's dumps; None is a text of our own.

    Raises RequestError for a file that cannot be read or is empty.
    """
    if path is None:
        return files("leangen").joinpath("assets/quality.txt").read_text(encoding="utf-8")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {path} as text: {error}") from error
    text = re.sub(r"</?doc\b[^>]*>\n?", "", text).strip()
    if not text:
        raise RequestError(f"{path} is empty, expected text to score")
    return text


def log_softmax(logits: Array) -> Array:
    """Log-probabilities along the last axis in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def kl_and_top1(reference: Array, candidate: Array) -> tuple[Array, Array]:
    """Per position of logits [n, vocab]: KL(reference || candidate) in nats, and same argmax."""
    kl = np.empty(len(reference))
    for rows in _pieces(len(reference)):
        p, q = log_softmax(reference[rows]), log_softmax(candidate[rows])
        kl[rows] = (np.exp(p) * (p - q)).sum(axis=-1)
    return kl, np.asarray(reference.argmax(axis=-1) == candidate.argmax(axis=-1))


def _losses(scored: Scored) -> tuple[Array, Array]:
    """Per token: its negative log-probability in nats, and whether it was the first choice."""
    loss = np.empty(len(scored.tokens))
    for rows in _pieces(len(loss)):
        came = scored.tokens[rows, None]
        loss[rows] = -np.take_along_axis(log_softmax(scored.logits[rows]), came, axis=-1)[:, 0]
    return loss, np.asarray(scored.logits.argmax(axis=-1) == scored.tokens)


def _pieces(n: int) -> list[slice]:
    """64 rows of a 49k vocabulary in float64 are 25 MB."""
    return [slice(start, start + 64) for start in range(0, n, 64)]


def _perplexity(name: str, loss: Array) -> Measure:
    """exp of the mean loss; its spread by the delta method."""
    logarithm = mean(name, loss, "tokens")
    value = math.exp(logarithm.value)
    u = None if logarithm.u is None else value * logarithm.u
    return Measure(name, value, u, logarithm.n, "tokens")


def _continue(session: Session, start: list[int], count: int) -> list[int]:
    request = language.Request(tokens=start, max_new_tokens=count, temperature=0.0, ignore_eos=True)
    steps: Any = language.run(session, request)
    return [token for step in steps for token in step.tokens]


def _divergence(reference: Scored, candidate: Scored) -> list[Measure]:
    """Tokens until two greedy continuations part; those that never do count in full."""
    lengths = []
    for a, b in zip(reference.continuations, candidate.continuations, strict=True):
        parted = (i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y)
        lengths.append(float(next(parted, len(a))))
    if not lengths:
        return []
    name = f"greedy tokens in common, of {reference.new_tokens}"
    return [mean(name, lengths, "prompts", "tokens")]
