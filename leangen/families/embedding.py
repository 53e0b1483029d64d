"""Text embeddings: texts go in, one vector for each comes out.

The graph `model` takes `input_ids` and, where it has them, `attention_mask` and `token_type_ids`,
int64 [n, t], and gives one vector per token [n, t, d], or per text [n, d]. Keys of the bundle's
config: `context_length`, `dimensions`, `inputs` (names), `output`, `pad_id`, `normalize`, and
`pooling`: `mean` over a text's tokens, `cls` for the first, `last`, or None where the graph pools.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from leangen.errors import RequestError
from leangen.families import finished
from leangen.families.language import tokenizer
from leangen.families.sampling import check, is_whole
from leangen.records import Media, Output, Step
from leangen.session import Session

UNIT = "token"
MEDIA: Media = "table"
INPUTS = ("prompt", "tokens")
EXAMPLE = {"prompt": "The old bridge over the river"}

Array = np.ndarray[Any, Any]

BATCH_TOKENS = 2048
"""Tokens of one run, padding included: bounds the memory of attention scores."""
POOLING = ("mean", "cls", "last", None)


@dataclass(frozen=True, slots=True)
class Request:
    """One or several texts to embed: either `prompt` or `tokens`."""

    prompt: str | Sequence[str] | None = None
    tokens: Sequence[Sequence[int]] | None = None
    """Texts as token ids, taken as they are: the model's own first and last tokens included."""
    seed: int = 0
    """As every request has one; nothing is drawn."""

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.tokens is None):
            raise RequestError(
                "expected either prompt (texts) or tokens (their ids), given "
                f"{'both' if self.tokens is not None else 'neither'}"
            )
        check(self, seed=(is_whole(self.seed, 0), "a whole number, 0 or more"))
        given = self.tokens if self.prompt is None else self.prompt
        texts = [given] if isinstance(given, str) and given else given
        if not isinstance(texts, list | tuple | str):
            raise RequestError(f"{type(texts).__name__} is given, expected a string or a list")
        if not texts:
            raise RequestError("there is no text to embed: give at least one")
        if self.prompt is not None and not all(isinstance(text, str) for text in texts):
            raise RequestError("prompt is not text, expected a string or a list of strings")

    @property
    def texts(self) -> list[str]:
        """The texts; none where tokens are given."""
        return [self.prompt] if isinstance(self.prompt, str) else list(self.prompt or ())

    def describe(self) -> Mapping[str, Any]:
        """The options, for the receipt; of texts only how many there are."""
        return {"texts": len(self.texts or self.tokens or ()), "seed": self.seed}


def prepare(session: Session) -> None:
    """Open the graph and read the tokenizer."""
    tokenizer(session)  # first: the graph may be opening meanwhile, see Session.open_ahead
    session.graph("model")


def run(session: Session, request: Request) -> Generator[Step, None, Output]:
    """Embed in steps `encode` of up to `BATCH_TOKENS`; the unit of work is a token read.

    The output's array is float32 [texts, d], in the order of the texts. Raises RequestError for a
    text that is longer than the model reads: nothing is cut off silently.
    """
    config = session.bundle.config
    ids = _ids(session, request)
    vectors = np.empty((len(ids), config["dimensions"]), np.float32)
    for rows in _batches([len(tokens) for tokens in ids]):
        vectors[rows] = _embedded(session, [ids[row] for row in rows])
        yield Step(kind="encode", units=sum(len(ids[row]) for row in rows))
    return Output(array=vectors, media=MEDIA)


def embed(session: Session, texts: Sequence[str]) -> Array:
    """The vectors of texts, float32 [texts, d], outside of any measuring."""
    return np.asarray(finished(run(session, Request(prompt=texts))).array)


def calibration_requests(session: Session) -> list[Request]:
    """Sentences of several lengths."""
    text = "The river did its work as the sky did, and what it did not grind today it would grind"
    words = text.split()
    return [Request(prompt=" ".join(words[: 3 * count])) for count in range(1, 5)]


def _ids(session: Session, request: Request) -> list[list[int]]:
    config = session.bundle.config
    if request.tokens is None:
        ids = [encoding.ids for encoding in tokenizer(session).encode_batch(request.texts)]
    else:
        vocabulary = tokenizer(session).get_vocab_size()
        ids = [[int(token) for token in tokens] for tokens in request.tokens]
        wrong = next((t for tokens in ids for t in tokens if not 0 <= t < vocabulary), None)
        if wrong is not None:
            raise RequestError(
                f"token {wrong} is not in the vocabulary, expected 0 to {vocabulary - 1}"
            )
    most = config["context_length"]
    for number, tokens in enumerate(ids):
        if not 0 < len(tokens) <= most:
            raise RequestError(
                f"text {number} has {len(tokens)} tokens, expected 1 to {most}: "
                "split it and embed its parts"
            )
    return ids


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Texts of like lengths together, the shortest first."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and lengths[row] * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _embedded(session: Session, ids: Sequence[Sequence[int]]) -> Array:
    """The vectors of one batch [n, d]."""
    config = session.bundle.config
    longest = max(map(len, ids))
    mask = np.array([[1] * len(t) + [0] * (longest - len(t)) for t in ids], np.int64)
    padded = [[*t, *[config["pad_id"]] * (longest - len(t))] for t in ids]
    feeds = {
        "input_ids": np.array(padded, np.int64),
        "attention_mask": mask,
        "token_type_ids": np.zeros_like(mask),
    }
    wanted = {name: feeds[name] for name in config["inputs"]}
    (hidden,) = session.run("model", wanted, [config["output"]])
    return _pooled(hidden, mask, config["pooling"], normalize=config["normalize"])


def _pooled(hidden: Array, mask: Array, pooling: str | None, *, normalize: bool) -> Array:
    if pooling == "mean":
        weights = mask[..., None].astype(np.float32)
        hidden = (hidden * weights).sum(axis=1) / weights.sum(axis=1)
    elif pooling == "cls":
        hidden = hidden[:, 0]
    elif pooling == "last":
        hidden = hidden[np.arange(len(hidden)), mask.sum(axis=1) - 1]
    if normalize:
        hidden = hidden / np.maximum(np.linalg.norm(hidden, axis=1, keepdims=True), 1e-12)
    return hidden
