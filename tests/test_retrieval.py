"""Retrieval: the nearest passages of a folder, from an index that is kept up to date."""

import numpy as np
import pytest
from test_cli import fails
from tiny_bundles import embedding, language

from leangen.engine import Engine
from leangen.errors import RequestError
from leangen.families.embedding import embed
from leangen.pipeline.retrieval import WORDS, Retriever, passages
from leangen.session import Session

pytest.importorskip("usearch", reason="the rag extra is not installed")

TEXTS = {"a.txt": "w1 w2. w3", "b.md": "w4 w4 w4", "deep/c.rst": "w5 w6 w7 w8"}


@pytest.fixture
def retriever(tmp_path):
    return Retriever(Engine(Session(embedding(tmp_path / "model"), threads=1)))


@pytest.fixture
def documents(tmp_path):
    for name, text in TEXTS.items():
        path = tmp_path / "documents" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "documents" / "picture.png").write_bytes(b"\xff\xfe")
    return tmp_path / "documents"


def run(retriever, **options):
    """The steps' kinds, and the output."""
    steps = retriever.run(retriever.request(options))
    kinds = []
    while True:
        try:
            kinds.append(next(steps).kind)
        except StopIteration as stop:
            return kinds, stop.value


@pytest.mark.parametrize("question", ["w3 w1", "w4", "w5 w8"])
def test_the_passages_nearest_by_cosine_come_first(retriever, documents, question):
    _, output = run(retriever, question=question, documents=documents, count=2)
    found = passages(documents)
    vectors = embed(retriever.engine.session, [passage.text for passage in found])
    asked = embed(retriever.engine.session, [question])[0]
    cosine = vectors @ asked / np.linalg.norm(vectors, axis=1) / np.linalg.norm(asked)
    order = np.argsort(-cosine, kind="stable")[:2]
    assert output.text == "\n\n".join(found[i].text for i in order)
    assert output.extra["sources"] == [found[i].source for i in order]


def test_only_what_is_new_is_embedded(retriever, documents):
    first, before = run(retriever, question="w3 w1", documents=documents)
    again, after = run(retriever, question="w3 w1", documents=documents)
    assert (first, again) == (["index", "search"], ["search"]) and before.text == after.text
    (documents / "a.txt").write_text("w3 w1")
    assert run(retriever, question="w3 w1", documents=documents, count=1)[1].text == "w3 w1"
    (documents / "b.md").unlink()
    kinds, output = run(retriever, question="w3 w1", documents=documents, count=9)
    assert kinds == ["search"] and len(output.text.split("\n\n")) == 2


def test_a_damaged_index_is_made_again(retriever, documents, home):
    right = run(retriever, question="w3 w1", documents=documents)[1]
    for path in (home / "indexes").rglob("*.*"):
        whole = path.read_bytes()
        for damaged in (b"\x00" * 9, b"5", whole[:-1] + b"\xff", whole[: len(whole) // 2]):
            path.write_bytes(damaged)
            kinds, output = run(retriever, question="w3 w1", documents=documents)
            assert (kinds, output.text) == (["index", "search"], right.text)


def test_a_passage_longer_than_the_model_reads_is_halved(retriever, tmp_path):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "long.txt").write_text(" ".join(f"w{i % 31}" for i in range(90)))
    _, output = run(retriever, question="w1", documents=tmp_path / "dense", count=9)
    lengths = [len(text.split()) for text in output.text.split("\n\n")]
    assert sum(lengths) == 90 and max(lengths) <= 48


def test_a_text_without_spaces_is_halved_too(retriever, tmp_path):
    (tmp_path / "dense").mkdir()
    text = "-".join(f"w{i % 31}" for i in range(90))
    (tmp_path / "dense" / "long.txt").write_text(text)
    _, output = run(retriever, question="w1", documents=tmp_path / "dense", count=99)
    assert sorted(output.text.replace("\n\n", "")) == sorted(text)


def test_no_passage_is_too_long_and_no_word_is_lost(tmp_path):
    text = "One two three. " * 90 + "word " * 250 + "\n\nAnd a last\nline."
    (tmp_path / "long.txt").write_text(text)
    found = [passage.text.split() for passage in passages(tmp_path)]
    assert all(0 < len(words) <= WORDS for words in found)
    assert [word for words in found for word in words] == text.split()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"question": " "}, "question is ' ', expected text"),
        ({"question": "a", "count": 0}, "count is 0"),
        ({"question": "a", "count": "three"}, "count is 'three', expected a whole number"),
        ({"question": "a", "documents": 5}, "documents is '5', expected a folder"),
        ({"question": "a", "documents": "nowhere"}, "documents is 'nowhere', expected a folder"),
        ({}, "retrieve lacks 'question'"),
    ],
)
def test_requests_that_cannot_be_met(retriever, documents, options, reason):
    with pytest.raises(RequestError, match=reason):
        run(retriever, **{"documents": documents} | options)


def test_documents_that_cannot_be_read(retriever, documents, tmp_path):
    (documents / "bad.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(RequestError, match="cannot read document .*bad.txt"):
        run(retriever, question="a", documents=documents)
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match="has no text in .txt, .md, .rst files"):
        run(retriever, question="a", documents=tmp_path / "empty")


def test_it_takes_an_embedding_model(tmp_path, capsys):
    language(tmp_path / "language")
    path = tmp_path / "ask.toml"
    path.write_text(
        '[parts.memory]\nmodel = "./language/bundle"\n'
        'retrieve = { question = "a", documents = "." }'
    )
    assert "retrieve needs an embedding model" in fails(capsys, "generate", str(path))


def test_a_question_goes_through_a_pipeline(documents, tmp_path):
    import leangen

    embedding(tmp_path / "memory")
    language(tmp_path / "mind")
    path = tmp_path / "ask.toml"
    path.write_text(
        '[inputs.question]\n[parts.memory]\nmodel = "./memory/bundle"\n'
        f'retrieve = {{ question = "{{input.question}}", documents = "{documents}" }}\n'
        '[parts.mind]\nmodel = "./mind/bundle"\n'
        'request = { prompt = "{memory.text}", max_new_tokens = 2, ignore_eos = true }'
    )
    result = leangen.load(path).generate("w3 w1")
    memory, mind = result.receipt.parts
    assert (memory.family, memory.units.kind, mind.units.count) == ("embedding", "token", 2)
    assert [step.kind for step in memory.energy.steps] == ["index", "search"]
    assert memory.energy.gross_uj + mind.energy.gross_uj == result.receipt.energy.gross_uj
