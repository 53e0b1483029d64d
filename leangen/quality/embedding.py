"""Quality of an embedding model against its reference: vectors of the same texts, and neighbours.

The loss is the mean of 1 - cosine between the two vectors of a text. What retrieval feels is
whether a text's nearest neighbours among the others stay the same.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from leangen.errors import RequestError
from leangen.families import embedding
from leangen.quality import language
from leangen.quality.measures import Array, Measure, Task, mean
from leangen.session import Session

WORDS = 24
"""Of a text's sentence at most: every model reads so many."""
NEIGHBOURS = 5


@dataclass(frozen=True, slots=True)
class Embedded:
    """The vectors [n, d] of the texts."""

    vectors: Array


def observe(session: Session, task: Task, reference: Embedded | None) -> Embedded:
    """Embed the sentences of the text; RequestError for a text of fewer than two."""
    sentences = re.split(r"(?<=[.!?])\s+", language.read(task.data))
    texts = [" ".join(sentence.split()[:WORDS]) for sentence in sentences if sentence.strip()]
    texts = texts[: task.rows]
    if len(texts) < 2:
        raise RequestError(f"the text has {len(texts)} sentences, expected 2 or more")
    return Embedded(embedding.embed(session, texts).astype(np.float64))


def measure(reference: Embedded, candidate: Embedded) -> list[Measure]:
    """The cosine distance first; how many of a text's nearest neighbours stay."""
    cosine = (_unit(reference.vectors) * _unit(candidate.vectors)).sum(axis=1)
    near, now = _neighbours(reference.vectors), _neighbours(candidate.vectors)
    kept = [len(set(a) & set(b)) / len(a) * 100 for a, b in zip(near, now, strict=True)]
    return [
        mean("cosine distance", 1 - cosine, "texts"),
        mean("neighbours kept", kept, "texts", "%"),
    ]


def _unit(vectors: Array) -> Array:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def _neighbours(vectors: Array) -> Array:
    """The nearest other texts of each [n, up to NEIGHBOURS]."""
    unit = _unit(vectors)
    closeness = unit @ unit.T
    np.fill_diagonal(closeness, -np.inf)
    return np.argsort(-closeness, axis=1)[:, : min(NEIGHBOURS, len(unit) - 1)]
