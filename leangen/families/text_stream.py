"""Tokens to text as they come: never half a character, never a part of a stop string."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

from tokenizers import Tokenizer

_TAIL = 4
_UNFINISHED = "\ufffd"  # what a decoder makes of a character whose last bytes are still to come


class TextStream:
    """The text that follows a prompt; the pieces that it gives out join to the whole text.

    Some tokens hold only a part of a UTF-8 character, and text may turn out to begin a stop
    string: both are held back until the next token tells.
    """

    stopped = False
    """Whether a stop string came; the text ends before it."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._held = ""
        # Decoding depends on what came before (a leading space), so it starts inside the prompt.
        self._ids = list(prompt[-_TAIL:])
        self._decoded = len(self._decode())

    def push(self, token: int) -> str:
        """Take a token; the text that can be printed now."""
        self._ids.append(token)
        text = self._decode()
        if text.endswith(_UNFINISHED):
            return ""
        piece = text[self._decoded :]
        self._ids = self._ids[-_TAIL:]
        self._decoded = len(self._decode())
        return self._until_stop(piece, last=False)

    def flush(self) -> str:
        """The rest, when no token follows."""
        piece = self._decode()[self._decoded :]
        self._decoded += len(piece)
        return self._until_stop(piece, last=True)

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special_tokens=True)

    def _until_stop(self, piece: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped = True
            self._held = ""
            return text[: min(places)]
        keep = 0 if last else max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:n])), 0)


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """What a token stands for, which may be a part of a UTF-8 character."""
    text: str = tokenizer.decode([token], skip_special_tokens=False)
    if _UNFINISHED not in text:
        return text.encode()
    written = tokenizer.id_to_token(token) or ""
    if byte := _BYTE.fullmatch(written):
        return bytes.fromhex(byte[1])
    try:
        return bytes(_level_bytes()[letter] for letter in written)
    except KeyError:
        return text.encode()


_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
"""How SentencePiece writes a byte."""


@cache
def _level_bytes() -> dict[str, int]:
    """By the letter that GPT-2's byte-level vocabularies write for it."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): byte for byte in shown}
    return letters | {chr(256 + index): byte for index, byte in enumerate(others)}
