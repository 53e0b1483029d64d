"""Text as a condition: a prompt through tokenizers and text encoders to what a denoiser is fed.

A bundle that takes a prompt has in its config `text`, with

    encoders   graph -> {"tokenizer": asset, "length", "pad", "masked"}: its inputs are `tokens`
               [1, length] and, where masked, `mask`; its outputs `hidden` [1, length, width] and
               perhaps `pooled` [1, width]
    feeds      input of the denoiser -> rows of parts such as "text_encoder.hidden": the parts of a
               row stand side by side along the last axis, filled up with zeros to the widest row;
               rows follow one another. `mask` is a part of each encoder too
    empty      `zeros` where no negative prompt is zeros in place of an empty text
    lowercase  whether the model knows text in lower case only
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from leangen.errors import RequestError
from leangen.session import Session

Array = np.ndarray[Any, Any]


def prepare(session: Session) -> None:
    """Open the text encoders and their tokenizers."""
    for role in _text(session).get("encoders", {}):
        session.graph(role)
        _tokenizer(session, role)


def reads_text(config: Mapping[str, Any]) -> bool:
    """Whether the bundle takes a prompt."""
    return bool(config.get("text"))


def check(session: Session, prompt: str | None, negative: str | None) -> None:
    """RequestError for a prompt to a model that reads none."""
    for name, given in (("prompt", prompt), ("negative_prompt", negative)):
        if given is not None and not _text(session):
            known = ", ".join(session.bundle.config.get("conditions", {})) or "none"
            raise RequestError(
                f"{name} is given, but {session.bundle.name} reads no text (its conditions: "
                f"{known}): leave it out"
            )


def feeds(session: Session, prompt: str | None) -> dict[str, Array]:
    """What the denoiser is fed of a prompt, None for an empty one; {} for a model without text."""
    text = _text(session)
    if not text:
        return {}
    words = (prompt or "").lower().strip() if text.get("lowercase") else prompt or ""
    parts: dict[str, Array] = {}
    for role in text["encoders"]:
        for name, array in _encode(session, role, words).items():
            parts[f"{role}.{name}"] = array
    return {name: _assemble(rows, parts) for name, rows in text["feeds"].items()}


def negative_feeds(session: Session, prompt: str | None, like: Mapping[str, Array]) -> Any:
    """What the denoiser is fed of a negative prompt; zeros where the model wants them for none."""
    if prompt is None and _text(session).get("empty") == "zeros":
        return {name: np.zeros_like(array) for name, array in like.items()}
    return feeds(session, prompt)


def _text(session: Session) -> Mapping[str, Any]:
    text: Mapping[str, Any] = session.bundle.config.get("text") or {}
    return text


def _tokenizer(session: Session, role: str) -> Tokenizer:
    entry = _text(session)["encoders"][role]

    def build() -> Tokenizer:
        tokenizer = Tokenizer.from_file(str(session.bundle.asset(entry["tokenizer"])))
        tokenizer.enable_truncation(entry["length"])
        pad = tokenizer.id_to_token(entry["pad"]) or "<pad>"
        tokenizer.enable_padding(length=entry["length"], pad_id=entry["pad"], pad_token=pad)
        return tokenizer

    return session.keep(f"tokenizer of {role}", build)


def _encode(session: Session, role: str, words: str) -> dict[str, Array]:
    encoding = _tokenizer(session, role).encode(words)
    tokens, mask = (np.array([row], np.int64) for row in (encoding.ids, encoding.attention_mask))
    given = {"tokens": tokens}
    if _text(session)["encoders"][role].get("masked"):
        given["mask"] = mask
    names = [output.name for output in session.graph(role).get_outputs()]
    return dict(zip(names, session.run(role, given, names), strict=True)) | {"mask": mask}


def _assemble(rows: Sequence[Sequence[str]], parts: Mapping[str, Array]) -> Array:
    """Parts side by side, rows one after the other.

    >>> _assemble([["a", "b"], ["c"]], {"a": np.ones((1, 1, 1)), "b": np.ones((1, 1, 1)),
    ...     "c": np.ones((1, 1, 3))}).tolist()
    [[[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]]
    """
    joined = [np.concatenate([parts[name] for name in row], axis=-1) for row in rows]
    if len(joined) == 1:
        return joined[0]
    widest = max(row.shape[-1] for row in joined)
    filled = [np.pad(row, [(0, 0), (0, 0), (0, widest - row.shape[-1])]) for row in joined]
    return np.concatenate(filled, axis=1)
