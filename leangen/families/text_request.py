"""What a language model is asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from leangen.errors import RequestError
from leangen.families.grammar import KINDS
from leangen.families.sampling import Sampling, check, is_whole

INPUTS = ("prompt", "messages", "tokens")
TEXTS = (*INPUTS, *KINDS, "tools")
"""What the receipt does not keep."""
ROLES = ("system", "user", "assistant", "tool")
MOST_GUESSES = 63
MOST_BEAMS = 64
WITH_BEAMS = (*INPUTS, "tools", "beams", "max_new_tokens", "ignore_eos", "prefix_cache", "seed")


@dataclass(frozen=True, slots=True)
class Request(Sampling):
    """One generation. Give exactly one of `prompt`, `messages` and `tokens`.

    How tokens are chosen, and the seed, are the options of `Sampling`.
    """

    prompt: str | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    """A conversation for the model's chat template: mappings with `role` and `content`."""
    tokens: Sequence[int] | None = None
    """The prompt as token ids, taken as they are."""
    max_new_tokens: int = 128
    """Fewer are generated where the context ends: it is never shifted."""
    stop: Sequence[str] = ()
    """Generation ends before the first of these; the text does not contain it."""
    ignore_eos: bool = False
    json_schema: Mapping[str, Any] | str | None = None
    """The reply is JSON of this schema; a mapping, or its JSON text. Cut where tokens run out."""
    regex: str | None = None
    """The whole reply matches this (Rust's syntax)."""
    lark: str | None = None
    """The reply is of this grammar, in Lark's syntax as llguidance takes it."""
    tools: Sequence[Mapping[str, Any]] | None = None
    """Functions that the chat template tells the model of, as JSON schemas."""
    n: int = 1
    """Samples of this one prompt, with the seeds `seed`, `seed` + 1 ..."""
    beams: int = 1
    """Above 1: search for the likeliest reply with so many beams; nothing is drawn. See `beams`."""
    speculate: int = 0
    """Next tokens to guess at most from what was said, computed in one run where that pays. The
    tokens are chosen as ever from the logits of that run, which round otherwise than those of a
    run of one: by 1e-4 with fp32 activations, by as much as rounding activations does in ORT's
    int8 kernels (rms 0.2), so that greedy text may part there after some tens of tokens."""
    prefix_cache: bool = False
    """Start from what the sequence before has in common with this prompt, such as the turns of a
    conversation. Off, because cost and rounding then depend on what was generated before."""

    def __post_init__(self) -> None:
        Sampling.__post_init__(self)
        given = [name for name in INPUTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise RequestError(
                f"got {' and '.join(given) or 'no prompt'}, expected exactly one of prompt, "
                "messages and tokens"
            )
        if not isinstance(self.prompt, str | None):
            raise RequestError(f"prompt is of type {type(self.prompt).__name__}, expected a string")
        if self.messages is not None:
            _check_messages(self.messages)
        _check_constraint(self)
        beams = is_whole(self.beams, 1) and self.beams <= MOST_BEAMS
        guesses = is_whole(self.speculate, 0) and self.speculate <= MOST_GUESSES
        check(
            self,
            max_new_tokens=(is_whole(self.max_new_tokens, 1), "a whole number, 1 or more"),
            stop=(_texts(self.stop), "a list of strings, none of them empty"),
            tools=(_tools(self), "a list of JSON objects, to go with messages"),
            n=(is_whole(self.n, 1), "a whole number, 1 or more"),
            beams=(beams, f"a whole number, 1 (off) to {MOST_BEAMS}"),
            speculate=(guesses, f"a whole number, 0 (off) to {MOST_GUESSES}"),
        )
        if self.beams > 1:
            other = next((f.name for f in fields(self) if not _idle(self, f)), None)
            if other is not None:
                raise RequestError(f"beam search takes no {other}: drop it, or beams")

    @property
    def constraint(self) -> tuple[str, str | Mapping[str, Any]] | None:
        """What the reply must obey: its kind and itself."""
        given = [(kind, getattr(self, kind)) for kind in KINDS if getattr(self, kind) is not None]
        return given[0] if given else None

    def describe(self) -> dict[str, Any]:
        """The options as plain JSON types; of texts only that there are some."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in TEXTS}
        bias = {
            str(token): "-inf" if value == -math.inf else value
            for token, value in self.logit_bias.items()
        }
        return options | {
            "stop": list(self.stop),
            "logit_bias": bias,
            "constraint": self.constraint and self.constraint[0],
            "tools": len(self.tools or ()),
        }


def _idle(request: Request, option: Field[Any]) -> bool:
    """Whether the option has no say in a beam search."""
    default = {} if option.default is MISSING else option.default
    return option.name in WITH_BEAMS or getattr(request, option.name) in (default, [])


def _texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, str) and v for v in value)


def _tools(request: Request) -> bool:
    if request.tools is None:
        return True
    known = isinstance(request.tools, list | tuple) and request.messages is not None
    return known and all(isinstance(tool, Mapping) for tool in request.tools)


def _check_constraint(request: Request) -> None:
    given = [kind for kind in KINDS if getattr(request, kind) is not None]
    if not given:
        return
    if len(given) > 1:
        raise RequestError(f"got {' and '.join(given)}, expected one of them")
    if request.ignore_eos:
        raise RequestError(f"{given[0]} ends with the end token: drop ignore_eos")
    source = getattr(request, given[0])
    if given[0] == "json_schema":
        try:
            source = json.loads(source) if isinstance(source, str) else source
            fits = isinstance(json.loads(json.dumps(source)), dict)
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise RequestError("json_schema is not a JSON object, expected one")
    elif not isinstance(source, str):
        raise RequestError(f"{given[0]} is of type {type(source).__name__}, expected a string")


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    if not messages:
        raise RequestError("messages is empty, expected at least one message")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise RequestError("a message lacks role or content, expected both")
        if message["role"] not in ROLES:
            raise RequestError(
                f"message role is {message['role']!r}, expected one of {', '.join(ROLES)}"
            )
        calls = message["content"] is None and "tool_calls" in message
        if not isinstance(message["content"], str) and not calls:
            raise RequestError("a message's content is not text, expected a string")
