"""Retrieval: the passages of a folder of documents that are nearest to a question.

A part that is written with `retrieve` in place of `request` takes an embedding model and three
options: `question`, `documents` (a folder of .txt, .md and .rst files), `count` of passages. Its
state is an index of the folder's passages, kept in the store and brought up to date when files have
changed: only new passages are embedded, and what that costs is in the receipt.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from leangen.bundle import sha256_file
from leangen.engine import Engine
from leangen.errors import RequestError, needs
from leangen.families.language import tokenizer
from leangen.families.sampling import check, is_whole
from leangen.files import atomic_folder, default_home
from leangen.pipeline.ports import TEXT, Ports
from leangen.records import Media, Output, Step

SUFFIXES = (".txt", ".md", ".rst")
WORDS = 100
"""Of a passage at most: some 130 tokens of prose."""
BATCH = 32
"""Passages of one step."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """What is looked up, and where."""

    question: str
    documents: str | Path
    """A folder."""
    count: int = 3
    """Passages to give, nearest first; fewer where there are fewer."""

    def __post_init__(self) -> None:
        if not isinstance(self.question, str) or not self.question.strip():
            raise RequestError(f"question is {self.question!r}, expected text")
        check(self, count=(is_whole(self.count, 1), "a whole number, 1 or more"))
        if not isinstance(self.documents, str | Path) or not Path(self.documents).is_dir():
            raise RequestError(f"documents is {str(self.documents)!r}, expected a folder")

    def describe(self) -> Mapping[str, Any]:
        """The options, for the receipt; never the question."""
        return {"count": self.count}


@dataclass(frozen=True, slots=True)
class Passage:
    """A stretch of a document."""

    source: str
    """The file, from the folder on."""
    text: str

    @property
    def id(self) -> str:
        """A hash of the text: what is the same is embedded once."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(slots=True)
class Retriever:
    """An embedding model with the indexes of the folders that it was asked about."""

    engine: Engine
    ports: Ports = field(default=Ports({"text": TEXT}, {"question": TEXT}), init=False)
    media: Media = field(default="text", init=False)
    fields: tuple[str, ...] = field(default=tuple(f.name for f in fields(Request)), init=False)

    def __post_init__(self) -> None:
        if self.engine.bundle.family != "embedding":
            raise RequestError(
                f"retrieve needs an embedding model, and {self.engine.bundle.name} is a "
                f"{self.engine.bundle.family} model: expected one such as minilm-l6"
            )

    def request(self, options: Mapping[str, Any]) -> Request:
        """The validated request."""
        for name in ("question", "documents"):
            if name not in options:
                raise RequestError(f"retrieve lacks {name!r}: it takes {', '.join(self.fields)}")
        return Request(**options)

    def run(self, request: Request) -> Generator[Step, None, Output]:
        """Bring the index up to date (`index` steps), embed the question, and search."""
        found = [
            part for whole in passages(Path(request.documents)) for part in self._fitting(whole)
        ]
        folder = self._folder(Path(request.documents))
        known = _stored(folder)
        missing = [passage for passage in found if passage.id not in known]
        for start in range(0, len(missing), BATCH):
            batch = missing[start : start + BATCH]
            vectors, units = self._embed([passage.text for passage in batch])
            known |= {passage.id: vector for passage, vector in zip(batch, vectors, strict=True)}
            yield Step(kind="index", units=units)
        index = _index(np.stack([known[passage.id] for passage in found]))
        if missing:
            _store(folder, found, index)
        question, units = self._embed([request.question])
        nearest = index.search(question[0], min(request.count, len(found))).keys
        chosen = [found[int(key)] for key in nearest]
        sources = list(dict.fromkeys(passage.source for passage in chosen))
        yield Step(kind="search", units=units, text=f"(from {', '.join(sources)})")
        return Output(
            text="\n\n".join(passage.text for passage in chosen),
            extra={"sources": sources},
        )

    def _fitting(self, passage: Passage) -> list[Passage]:
        """The passage, in halves where it has more tokens than the model reads."""
        tokens = len(tokenizer(self.engine.session).encode(passage.text).ids)
        if tokens <= self.engine.bundle.config["context_length"] or len(passage.text) < 2:
            return [passage]
        pieces, between = passage.text.split(), " "
        if len(pieces) < 2:  # not every language puts spaces between words
            pieces, between = list(passage.text), ""
        middle = len(pieces) // 2
        return [
            part
            for half in (pieces[:middle], pieces[middle:])
            for part in self._fitting(Passage(passage.source, between.join(half)))
        ]

    def _embed(self, texts: Sequence[str]) -> tuple[Array, float]:
        """Vectors [n, d], and the tokens that were read for them."""
        steps = self.engine.family.run(self.engine.session, self.engine.request(list(texts)))
        units = 0.0
        while True:
            try:
                units += next(steps).units
            except StopIteration as stop:
                return np.asarray(stop.value.array, np.float32), units

    def _folder(self, documents: Path) -> Path:
        told = f"{documents.resolve()}\0{self.engine.bundle.digest}"
        return default_home() / "indexes" / hashlib.sha256(told.encode()).hexdigest()[:16]


def passages(folder: Path) -> list[Passage]:
    """The passages of every document in a folder; RequestError where there is none."""
    found = [
        Passage(path.relative_to(folder).as_posix(), text)
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in SUFFIXES and path.is_file()
        for text in _split(_text(path))
    ]
    if not found:
        raise RequestError(f"{folder} has no text in {', '.join(SUFFIXES)} files: expected some")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read document {path}: {error}") from None


def _split(text: str) -> Iterator[str]:
    """Paragraphs of up to WORDS words, short ones joined; a long one is cut between sentences."""
    held: list[str] = []
    for piece in re.split(r"\n\s*\n|(?<=[.!?])\s+", text):
        words = piece.split()
        for start in range(0, len(words), WORDS):
            part = words[start : start + WORDS]
            if len(held) + len(part) > WORDS:
                yield " ".join(held)
                held = []
            held += part
    if held:
        yield " ".join(held)


def _usearch() -> Any:
    with needs("usearch", message="retrieval needs the `rag` extra: pip install 'leangen[rag]'"):
        from usearch import index
    return index


def _index(vectors: Array) -> Any:
    """A cosine index whose keys are the rows of `vectors`."""
    index = _usearch().Index(ndim=vectors.shape[1], metric="cos", dtype="f32")
    index.add(np.arange(len(vectors)), vectors)
    return index


def _stored(folder: Path) -> dict[str, Array]:
    """The vectors that are kept, by passage id; none where nothing whole is."""
    try:
        kept = json.loads((folder / "passages.json").read_bytes())
        if kept["vectors"] != sha256_file(folder / "vectors.usearch"):
            return {}
        ids, index = kept["ids"], _usearch().Index.restore(folder / "vectors.usearch")
        vectors = index.get(np.arange(len(ids)))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, AttributeError):
        return {}
    return dict(zip(ids, vectors, strict=True))


def _store(folder: Path, found: Sequence[Passage], index: Any) -> None:
    with atomic_folder(folder, replace=True) as staging:
        index.save(staging / "vectors.usearch")
        kept = {
            "ids": [passage.id for passage in found],
            "vectors": sha256_file(staging / "vectors.usearch"),
        }
        (staging / "passages.json").write_text(json.dumps(kept))
