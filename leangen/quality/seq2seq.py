"""Quality of an encoder-decoder against its reference: the reference's own words, scored by both.

The reference writes what it makes of each source, greedily; both models then predict those tokens
one after the other, each from what its own encoder made of the source. The measures are those of a
language model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from leangen import families
from leangen.errors import RequestError
from leangen.families import language as language_family
from leangen.families import text_to_text, transcription
from leangen.families.decoder import Decoder, Floats
from leangen.quality import language
from leangen.quality.language import Scored
from leangen.quality.measures import Measure, Task
from leangen.session import Session

SENTENCES = 16
"""Of a text, each a source."""
NOISE = (0.0, 0.005, 0.02, 0.05)
"""Standard deviations of the noise that is laid over speech, one source each; as many as seeds."""


@dataclass(frozen=True, slots=True)
class Said:
    """What the reference wrote, and how a model scores it."""

    scored: Scored
    replies: list[list[int]]


@dataclass(frozen=True, slots=True)
class _Source:
    states: dict[str, Floats]
    prompt: list[int]
    """What the decoder begins with."""
    reply: partial[list[int]]
    """Writes what the model makes of it."""


def observe(session: Session, task: Task, reference: Said | None) -> Said:
    """Score the reference's replies, or this model's own if it is the reference."""
    rows, replies = [], []
    sound = families.key(session.bundle) == "seq2seq/transcription"
    sources = _sounds(session, task) if sound else _texts(session, task)
    for index, source in enumerate(sources):
        reply = source.reply() if reference is None else reference.replies[index]
        fed = [*source.prompt, *reply[:-1]]
        with Decoder(session, len(fed), role="decoder", beside=source.states) as decoder:
            rows.append(decoder.feed_all(fed)[len(source.prompt) - 1 :].copy())
        replies.append(reply)
    logits, tokens = np.concatenate(rows), np.concatenate(replies).astype(np.int64)
    return Said(Scored(logits, tokens, [], task.new_tokens), replies)


def measure(reference: Said, candidate: Said) -> list[Measure]:
    """KL divergence first; agreement, perplexities and flips on the reference's words."""
    return language.measure(reference.scored, candidate.scored)


def _texts(session: Session, task: Task) -> Iterator[_Source]:
    sentences = re.split(r"(?<=[.!?])\s+", language.read(task.data))
    sentences = [sentence.strip() for sentence in sentences if sentence.strip()][:SENTENCES]
    if not sentences:
        raise RequestError("the text has no sentence, expected one or more: give a longer --data")
    for sentence in sentences:
        tokens = language_family.tokens_of(session, text_to_text.Request(prompt=sentence))
        tokens = tokens[: session.bundle.config["source_length"]]
        request = text_to_text.Request(tokens=tokens, max_new_tokens=task.new_tokens)
        yield _Source(
            text_to_text.encoded(session, tokens),
            session.bundle.config["start"],
            partial(_written, session, request),
        )


def _sounds(session: Session, task: Task) -> Iterator[_Source]:
    config = session.bundle.config
    rate_hz, window = config["sample_rate_hz"], config["window_samples"]
    clean = transcription.Request(**transcription.EXAMPLE).samples(rate_hz)[:window]
    rng = np.random.default_rng(0)
    for level in NOISE[: task.seeds]:
        sound = clean + np.float32(level) * rng.standard_normal(len(clean), np.float32)
        request = transcription.Request(audio=sound, max_new_tokens=task.new_tokens)
        yield _Source(
            transcription.encoded(session, sound),
            transcription.first_tokens(config, request, "en"),
            partial(_written, session, request),
        )


def _written(session: Session, request: text_to_text.Request | transcription.Request) -> list[int]:
    steps = families.of(session.bundle).run(session, request)
    return [token for step in steps for token in step.tokens]
