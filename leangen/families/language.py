"""Language models: a prompt or a conversation goes in, text comes out token by token.

Keys of the bundle's config: `context_length`, `layers`, `kv_heads`, `head_dim`, `vocab_size`,
`bos_id` (or None), `eos_ids`, `chat_template` (a file, or None); with a second head `properties`
(see `families.properties`), which a step of its own reads after a text that has ended. The graph
`model` is described in `exporters/llm_graph.py`; sliding windows are its own affair: the cache
keeps all positions.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from operator import eq
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from leangen.errors import BundleError, RequestError
from leangen.families import beams, properties
from leangen.families.decoder import CHUNK, Decoder, Floats
from leangen.families.grammar import Grammar, Vocabulary
from leangen.families.reply import Reply
from leangen.families.sampling import Choice, Chooser
from leangen.families.speculation import PromptLookup
from leangen.families.text_request import INPUTS, Request
from leangen.families.text_stream import TextStream
from leangen.records import Media, Output, Step
from leangen.session import Session

__all__ = ["INPUTS", "Request"]

UNIT = "token"
MEDIA: Media = "text"
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


def prepare(session: Session) -> None:
    """Open the graph and read the tokenizer."""
    tokenizer(session)  # first: the graph may be opening meanwhile, see Session.open_ahead
    session.graph("model")


def run(session: Session, request: Request) -> Generator[Step, None, Output]:
    """Generate text: a `prefill` step that ends with the first token, then `decode` steps.

    The steps' texts join to the output's text; `tokens` ends with the end token if there was one.
    Text, tokens and stop reason are the first sample's; `extra["samples"]` has every `Reply`.
    Same seed, same output. Raises RequestError for a prompt that does not fit the context.
    """
    prompt = encode(session, request)
    # The last token is always fed: its logits are wanted.
    prefix = prompt[:-1] if request.prefix_cache else ()
    with Decoder(session, len(prompt) + limit(session, request, prompt), prefix) as decoder:
        return (yield from replies(session, request, decoder, prompt))


def replies(
    session: Session, request: Request, decoder: Decoder, prompt: Sequence[int]
) -> Generator[Step, None, Output]:
    """The steps of all samples that follow `prompt`, of which `decoder` may hold a part."""
    found = []
    choose = chooser(session, request, prompt)  # refuses a bad grammar before any work
    counts = {"reused": decoder.length} if request.prefix_cache else {}
    logits = decoder.feed(prompt[decoder.length :]).copy()
    for sample in range(request.n):
        if sample > 0:
            choose = chooser(session, request, prompt, sample)
        reply = empty_reply(session, request, prompt)
        found.append(reply)
        if request.beams > 1:
            steps = search(reply, session, request.beams, decoder, logits)
        else:
            steps = fill(reply, choose, decoder, prompt, logits, request.speculate)
        for step in steps:
            if counts:
                step, counts = replace(step, counts={**counts, **step.counts}), {}
            yield step if sample == 0 else replace(step, kind="decode", sample=sample)
        if reply.stop_reason == "eos" and session.bundle.config.get("properties"):
            decoder.rewind(len(prompt) + len(reply.tokens) - 1)
            row = decoder.feed(reply.tokens[-1:])
            reply.properties = properties.values(session.bundle.config, row)
            yield Step(kind="properties", units=0, sample=sample)
    first = found[0]
    return Output(
        prompt_units=len(prompt),
        text=first.text,
        tokens=first.tokens,
        stop_reason=first.stop_reason,
        extra={"samples": found},
    )


def chooser(session: Session, request: Request, prompt: Sequence[int], sample: int = 0) -> Chooser:
    """What chooses the tokens of that sample of the request; RequestError for a bad grammar."""
    config = _config(session)
    _checked(tuple(request.logit_bias), config["vocab_size"])
    constraint = None
    if request.constraint is not None:

        def vocabulary() -> Vocabulary:
            return Vocabulary(tokenizer(session), config["vocab_size"], config["eos_ids"])

        known = session.keep("language.vocabulary", vocabulary)
        constraint = Grammar(known, *request.constraint)
    return Chooser(request, prompt, seed=request.seed + sample, constraint=constraint)


def empty_reply(session: Session, request: Request, prompt: Sequence[int]) -> Reply:
    """The reply before its first token."""
    return Reply(
        TextStream(tokenizer(session), prompt, request.stop),
        () if request.ignore_eos else _config(session)["eos_ids"],
        limit(session, request, prompt),
    )


def limit(session: Session, request: Request, prompt: Sequence[int]) -> int:
    """How many tokens may follow a prompt."""
    context: int = _config(session)["context_length"]
    return min(request.max_new_tokens, context - len(prompt))


def fill(
    reply: Reply,
    chooser: Chooser,
    decoder: Decoder,
    prompt: Sequence[int],
    logits: Floats,
    speculate: int = 0,
) -> Iterator[Step]:
    """The steps of a reply to a prompt that `decoder` holds and that `logits` follow."""
    lookup = PromptLookup(prompt, speculate)
    rows, guess = logits[None], list[int]()
    while True:
        piece, begin = "", len(reply.tokens)
        for row, guessed in zip_longest(rows, guess):
            choice = chooser.choose(row)
            piece += reply.push(choice)
            if reply.stop_reason is not None or choice.token != guessed:
                break
        taken = reply.tokens[begin:]
        accepted = sum(map(eq, taken, guess))
        yield Step(
            kind="decode" if begin else "prefill",
            units=len(taken),
            text=piece,
            tokens=taken,
            counts={"guessed": len(guess), "accepted": accepted} if speculate else {},
        )
        if reply.stop_reason is not None:
            return
        if speculate:
            lookup.learn(len(guess), accepted)
            lookup.extend(taken)
            guess = lookup.guess(reply.limit - len(reply.tokens) - 1)
        decoder.rewind(len(prompt) + len(reply.tokens) - 1)
        fed = [reply.tokens[-1], *guess]
        rows = decoder.feed_all(fed) if guess else decoder.feed(fed)[None]


def search(
    reply: Reply,
    session: Session,
    width: int,
    decoder: Decoder,
    logits: Floats,
    mask: beams.Mask | None = None,
) -> Iterator[Step]:
    """A step per round of beam search; which tokens are the reply's only the last one tells."""
    found = beams.search(
        session, decoder, logits, beams=width, ends=reply.ends, limit=reply.limit, mask=mask
    )
    for number, tokens in enumerate(found):
        text = "".join(reply.push(Choice(token)) for token in tokens or ())
        kind = "decode" if number else "prefill"
        yield Step(kind=kind, units=len(reply.tokens), text=text, tokens=tokens or ())


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
    tokens = tokens_of(session, request)
    context = _config(session)["context_length"]
    if len(tokens) >= context:
        why = _config(session).get("reasons", {}).get("context_length")
        raise RequestError(
            f"the prompt has {len(tokens)} tokens and the model's context {context}"
            f"{f' ({why})' if why else ''}: shorten the prompt to at most {context - 1}, which "
            "leaves room for one new token"
        )
    return tokens


def tokens_of(session: Session, request: Request) -> list[int]:
    """The request's prompt as tokens, however many; RequestError when there are none."""
    config = _config(session)
    if request.tokens is not None:
        tokens = _checked(request.tokens, config["vocab_size"])
    elif request.messages is not None:
        text = chat_template(session)(request.messages, request.tools)
        tokens = tokenizer(session).encode(text, add_special_tokens=False).ids
    else:
        tokens = tokenizer(session).encode(request.prompt or "").ids
    if not tokens:
        raise RequestError("the prompt is empty, expected at least one token: give some text")
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


def chat_template(session: Session) -> Any:
    """The function from messages (and tools) to the prompt; RequestError where there is none."""

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
