"""Encoder-decoders of text (T5): a text goes in, another one comes out token by token.

A bundle of this task has the graphs `encoder` and `decoder` (see `exporters/encoder_graph.py`) and
the config keys of a language model, with `source_length` (tokens that the encoder takes at most)
and `start`, the tokens that every reply begins after.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

import numpy as np

from leangen.errors import RequestError
from leangen.families import language
from leangen.families.decoder import Decoder, Floats, encoder_states
from leangen.families.text_request import INPUTS, Request
from leangen.records import Media, Output, Step
from leangen.session import Session

__all__ = ["INPUTS", "Request"]

UNIT = "token"
MEDIA: Media = "text"
EXAMPLE = {"prompt": "The old bridge over the river"}


def prepare(session: Session) -> None:
    """Open the graphs and read the tokenizer."""
    session.graph("encoder")
    session.graph("decoder")
    language.tokenizer(session)


def run(session: Session, request: Request) -> Generator[Step, None, Output]:
    """Encode the prompt once, then generate as `language.run` does; the first step has both.

    Raises RequestError for a prompt longer than the encoder takes.
    """
    if request.prefix_cache:
        raise RequestError("prefix_cache is for decoders alone: an encoder reads a prompt as one")
    source = language.tokens_of(session, request)
    start: list[int] = session.bundle.config["start"]
    states = encoded(session, source)
    capacity = len(start) + language.limit(session, request, start)
    with Decoder(session, capacity, role="decoder", beside=states) as decoder:
        output = yield from language.replies(session, request, decoder, start)
    return replace(output, prompt_units=len(source))


def encoded(session: Session, source: list[int]) -> dict[str, Floats]:
    """The keys and values that the decoder attends to, by the names of its inputs."""
    longest = session.bundle.config["source_length"]
    if len(source) > longest:
        raise RequestError(
            f"the prompt has {len(source)} tokens and the encoder takes {longest}: shorten it"
        )
    return encoder_states(session, input_ids=np.array([source], np.int64))
