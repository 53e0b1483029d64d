"""What a language model is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from leangen.errors import RequestError
from leangen.families.sampling import Sampling, check, is_whole

INPUTS = ("prompt", "messages", "tokens")
ROLES = ("system", "user", "assistant", "tool")
MOST_GUESSES = 63


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
    n: int = 1
    """Samples of this one prompt, with the seeds `seed`, `seed` + 1 ..."""
    speculate: int = 0
    """Next tokens to guess at most from what was said, computed in one run where that pays. The
    text is the same but for ties: runs of another length round otherwise."""
    prefix_cache: bool = False
    """Start from what the sequence before has in common with this prompt, such as the turns of a
    conversation. Off, because what a generation costs then depends on the one before it."""

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
        guesses = is_whole(self.speculate, 0) and self.speculate <= MOST_GUESSES
        check(
            self,
            max_new_tokens=(is_whole(self.max_new_tokens, 1), "a whole number, 1 or more"),
            stop=(_texts(self.stop), "a list of strings, none of them empty"),
            n=(is_whole(self.n, 1), "a whole number, 1 or more"),
            speculate=(guesses, f"a whole number, 0 (off) to {MOST_GUESSES}"),
        )

    def describe(self) -> dict[str, Any]:
        """The options as plain JSON types; neither the prompt nor the messages."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in INPUTS}
        bias = {
            str(token): "-inf" if value == -math.inf else value
            for token, value in self.logit_bias.items()
        }
        return options | {"stop": list(self.stop), "logit_bias": bias}


def _texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, str) and v for v in value)


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
        if not isinstance(message["content"], str):
            raise RequestError("a message's content is not text, expected a string")
