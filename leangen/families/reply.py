"""One sequence's reply as it grows: its tokens, the text they show, and why it ended."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

from leangen.families.properties import Property
from leangen.families.sampling import Choice
from leangen.families.text_stream import TextStream


@dataclass(slots=True)
class Reply:
    """What follows the prompt; complete when `stop_reason` is set."""

    stream: TextStream
    ends: Collection[int]
    """The tokens that end a reply; the text does not show them."""
    limit: int
    """Tokens at most."""
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    choices: list[Choice] = field(default_factory=list)
    """The tokens with their log-probabilities, where those were asked for."""
    properties: dict[str, Property] = field(default_factory=dict)
    """What the model's second head says of the whole text, where it has one."""
    stop_reason: str | None = None
    """`eos`, `stop` (a stop string) or `length`."""

    def to_json(self) -> dict[str, Any]:
        """Text, tokens and stop reason; `logprobs`, a mapping per token, where asked for;
        `properties` where the model says any.
        """
        logprobs = [
            {
                "token": choice.token,
                "logprob": choice.logprob,
                "likeliest": [{"token": t, "logprob": p} for t, p in choice.likeliest],
            }
            for choice in self.choices
        ]
        said: dict[str, Any] = {
            "text": self.text,
            "tokens": self.tokens,
            "stop_reason": self.stop_reason,
        }
        if self.properties:
            said["properties"] = {name: asdict(each) for name, each in self.properties.items()}
        return said | ({"logprobs": logprobs} if logprobs else {})

    def push(self, choice: Choice) -> str:
        """Take the next token; the text that can be shown now."""
        self.tokens.append(choice.token)
        if choice.logprob is not None:
            self.choices.append(choice)
        piece = ""
        if choice.token in self.ends:
            self.stop_reason = "eos"
        else:
            piece = self.stream.push(choice.token)
            if self.stream.stopped:
                self.stop_reason = "stop"
            elif len(self.tokens) == self.limit:
                self.stop_reason = "length"
        if self.stop_reason is not None:
            piece += self.stream.flush()
        self.text += piece
        return piece
