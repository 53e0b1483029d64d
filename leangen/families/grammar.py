"""Text that obeys a JSON schema, a regular expression or a grammar, through llguidance.

At each token llguidance says which ones keep the text within the grammar; the others' logits go to
-inf. The end token is allowed where the text is complete, and is all that is allowed where nothing
may follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from leangen.errors import RequestError, needs
from leangen.families.sampling import Floats

KINDS = ("json_schema", "regex", "lark")


class Vocabulary:
    """What llguidance knows of a tokenizer: made once per session, in about 0.3 s."""

    def __init__(self, tokenizer: Tokenizer, size: int, ends: Sequence[int]) -> None:
        self.llguidance = _library()
        if not ends:
            raise RequestError("this model has no end token, which constrained text needs")
        try:
            self.tokenizer = self.llguidance.LLTokenizer(tokenizer.to_str(), size, list(ends))
        except ValueError as error:
            raise RequestError(
                f"llguidance cannot read this model's tokenizer ({error}): its text cannot be "
                "constrained"
            ) from error


class Grammar:
    """A text's place within its grammar: a `Constraint` of `leangen.families.sampling`.

    Raises RequestError for a grammar that llguidance does not take.
    """

    def __init__(self, vocabulary: Vocabulary, kind: str, source: str | Mapping[str, Any]) -> None:
        matcher = vocabulary.llguidance.LLMatcher
        compilers = {
            "json_schema": matcher.grammar_from_json_schema,
            "regex": matcher.grammar_from_regex,
            "lark": matcher.grammar_from_lark,
        }
        try:
            compiled = compilers[kind](source)
        except ValueError as error:
            raise RequestError(f"{kind} cannot be followed: {error}") from error
        self._kind = kind
        self._matcher = matcher(vocabulary.tokenizer, compiled, log_level=0)
        self._check()

    def mask(self, logits: Floats) -> None:
        """Set the logits [vocab] of tokens that would leave the grammar to -inf."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=len(logits), bitorder="little")
        logits[allowed == 0] = -np.inf

    def accept(self, token: int) -> None:
        """Take the chosen token."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            detail = self._matcher.get_error().strip().splitlines()[0]
            raise RequestError(f"{self._kind} cannot be followed: {detail}; change it")


def _library() -> Any:
    message = "constrained text needs llguidance: pip install 'leangen[grammar]'"
    with needs("llguidance", message=message):
        import llguidance
    return llguidance
