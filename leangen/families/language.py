"""Language models: a prompt or a conversation goes in, text comes out token by token.

Keys of the bundle's config: `context_length`, `layers`, `kv_heads`, `head_dim`, `vocab_size`,
`bos_id` (or None), `eos_ids`, `chat_template` (a file, or None). The graph `model` is described in
`exporters/llm_graph.py`.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from leangen.errors import BundleError, RequestError
from leangen.families import sampling
from leangen.families.decoder import CHUNK, Decoder, Floats
from leangen.families.text_stream import TextStream
from leangen.records import Media, Output, Step
from leangen.session import Session

UNIT = "token"
MEDIA: Media = "text"
INPUTS = ("prompt", "messages", "tokens")
EXAMPLE = {"prompt": "The old bridge over the river"}
CONFIG_KEYS = (
    "context_length",
    "layers",
    "kv_heads",
    "head_dim",
    "vocab_size",
    "bos_id",
    "eos_ids",
    "chat_template",
)
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Request:
    """One generation. Give exactly one of `prompt`, `messages` and `tokens`."""

    prompt: str | None = None
    messages: Sequence[Mapping[str, str]] | None = None
    """A conversation for the model's chat template: mappings with `role` and `content`."""
    tokens: Sequence[int] | None = None
    """The prompt as token ids, taken as they are."""
    max_new_tokens: int = 128
    """Fewer are generated where the context ends."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens that hold this probability."""
    repetition_penalty: float = 1.0
    """Above 1, tokens of the prompt and of the reply become less likely."""
    seed: int = 0
    stop: Sequence[str] = ()
    """Generation ends before the first of these; the text does not contain it."""
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        given = [
            name for name in ("prompt", "messages", "tokens") if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise RequestError(
                f"got {' and '.join(given) or 'no prompt'}, expected exactly one of prompt, "
                "messages and tokens"
            )
        if not isinstance(self.prompt, str | None):
            raise RequestError(f"prompt is of type {type(self.prompt).__name__}, expected a string")
        if self.messages is not None:
            _check_messages(self.messages)
        temperature, top_p, penalty = self.temperature, self.top_p, self.repetition_penalty
        for name, holds, expected in (
            ("max_new_tokens", _whole(self.max_new_tokens, 1), "a whole number, 1 or more"),
            ("temperature", _real(temperature) and temperature >= 0, "0 (greedy) or more"),
            ("top_k", _whole(self.top_k, 0), "a whole number, 0 (off) or more"),
            ("top_p", _real(top_p) and 0 < top_p <= 1, "more than 0 and at most 1"),
            ("repetition_penalty", _real(penalty) and penalty > 0, "more than 0 (1 is off)"),
            ("seed", _whole(self.seed, 0), "a whole number, 0 or more"),
            ("stop", _texts(self.stop), "a list of strings, none of them empty"),
        ):
            if not holds:
                raise RequestError(f"{name} is {getattr(self, name)!r}, expected {expected}")

    def describe(self) -> dict[str, Any]:
        """The options as plain JSON types; neither the prompt nor the messages."""
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "stop": list(self.stop),
            "ignore_eos": self.ignore_eos,
        }


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and value >= least


def _real(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, str) and v for v in value)


def _check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    if not messages:
        raise RequestError("messages is empty, expected at least one message")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise RequestError("a message lacks role or content, expected both")
        if message["role"] not in ROLES:
            raise RequestError(
                f"message role is {message['role']!r}, expected one of {', '.join(ROLES)}"
            )
        if not isinstance(message["content"], str):
            raise RequestError("a message's content is not text, expected a string")


def prepare(session: Session) -> None:
    """Open the graph and read the tokenizer."""
    session.graph("model")
    tokenizer(session)


def run(session: Session, request: Request) -> Generator[Step, None, Output]:
    """Generate text: a `prefill` step that ends with the first token, then `decode` steps.

    The steps' texts join to the output's text; `tokens` ends with the end token if there was one.
    Same seed, same output. Raises RequestError for a prompt that does not fit the context.
    """
    config = _config(session)
    prompt = encode(session, request)
    limit = min(request.max_new_tokens, config["context_length"] - len(prompt))
    ends = () if request.ignore_eos else config["eos_ids"]
    rng = np.random.default_rng(request.seed)
    text = TextStream(tokenizer(session), prompt, request.stop)
    seen = set(prompt)
    tokens: list[int] = []
    pieces: list[str] = []
    stop_reason = None
    with Decoder(session, len(prompt) + limit) as decoder:
        logits = decoder.feed(prompt)
        while stop_reason is None:
            if request.repetition_penalty != 1:
                logits = sampling.penalize(logits, seen, request.repetition_penalty)
            token = sampling.sample(
                logits,
                rng,
                temperature=request.temperature,
                top_k=request.top_k,
                top_p=request.top_p,
            )
            tokens.append(token)
            seen.add(token)
            piece = ""
            if token in ends:
                stop_reason = "eos"
            else:
                piece = text.push(token)
                if text.stopped:
                    stop_reason = "stop"
                elif len(tokens) == limit:
                    stop_reason = "length"
            if stop_reason is not None:
                piece += text.flush()
            pieces.append(piece)
            kind = "prefill" if len(tokens) == 1 else "decode"
            yield Step(kind=kind, units=1, text=piece, token=token)
            if stop_reason is None:
                logits = decoder.feed([token])
    return Output(
        prompt_units=len(prompt), text="".join(pieces), tokens=tokens, stop_reason=stop_reason
    )


def tokenizer(session: Session) -> Tokenizer:
    """The bundle's tokenizer, loaded once per session; BundleError when it is damaged."""

    def load() -> Tokenizer:
        path = session.bundle.asset("tokenizer.json")
        try:
            return Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises plain Exception
            raise BundleError(f"cannot read {path} ({error}): export the model again") from error

    return session.keep("language.tokenizer", load)


def encode(session: Session, request: Request) -> list[int]:
    """The request's prompt as tokens; RequestError when there are none, or too many."""
    config = _config(session)
    if request.tokens is not None:
        tokens = _checked(request.tokens, config["vocab_size"])
    elif request.messages is not None:
        text = _chat(session)(request.messages)
        tokens = tokenizer(session).encode(text, add_special_tokens=False).ids
    else:
        tokens = tokenizer(session).encode(request.prompt or "").ids
    if not tokens:
        raise RequestError("the prompt is empty, expected at least one token: give some text")
    context = config["context_length"]
    if len(tokens) >= context:
        raise RequestError(
            f"the prompt has {len(tokens)} tokens and the model's context {context}: shorten the "
            f"prompt to at most {context - 1}, which leaves room for one new token"
        )
    return tokens


def logits(session: Session, tokens: Sequence[int]) -> Floats:
    """Logits float32 [n, vocab] after each of the n tokens, for measures of quality.

    Computed in chunks, so that the result is what takes memory: 4 n vocab bytes.
    """
    config = _config(session)
    tokens = _checked(tokens, config["vocab_size"])
    if not 0 < len(tokens) <= config["context_length"]:
        raise RequestError(
            f"got {len(tokens)} tokens, expected 1 to {config['context_length']} (the context)"
        )
    out = np.empty((len(tokens), config["vocab_size"]), np.float32)
    with Decoder(session, len(tokens)) as decoder:
        for start in range(0, len(tokens), CHUNK):
            part = tokens[start : start + CHUNK]
            out[start : start + len(part)] = decoder.feed_all(part)
    return out


def _config(session: Session) -> Mapping[str, Any]:
    config = session.bundle.config
    missing = [key for key in CONFIG_KEYS if key not in config]
    if missing:
        raise BundleError(
            f"bundle {session.bundle.path} lacks {', '.join(missing)} in its config: "
            "export the model again"
        )
    return config


def _checked(tokens: Sequence[int], vocab: int) -> list[int]:
    for token in tokens:
        if not isinstance(token, int | np.integer) or not 0 <= token < vocab:
            raise RequestError(
                f"token {token!r} is not in the vocabulary, expected 0 to {vocab - 1}"
            )
    return [int(token) for token in tokens]


def _chat(session: Session) -> Any:
    def build() -> Any:
        from leangen.families import chat

        config, bundle = session.bundle.config, session.bundle
        if config["chat_template"] is None:
            raise RequestError("this model has no chat template: give a prompt, not messages")
        bos, eos = config["bos_id"], next(iter(config["eos_ids"]), None)

        def token(i: int | None) -> str:
            return "" if i is None else tokenizer(session).id_to_token(i) or ""

        return chat.compile_template(
            bundle.asset(config["chat_template"]).read_text(encoding="utf-8"),
            bos_token=token(bos),
            eos_token=token(eos),
        )

    return session.keep("language.chat", build)
