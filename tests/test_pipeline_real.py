"""The ready-made pipelines on their real models."""

import pytest
import real_models

import leangen
from leangen import pipeline

pytestmark = pytest.mark.slow


@pytest.fixture
def home(monkeypatch):
    store = real_models.store()
    monkeypatch.setenv("LEANGEN_HOME", str(store.home))
    return store


def adds_up(result):
    parts = [part.receipt.energy.gross_uj for part in result.parts.values()]
    return sum(parts) == result.receipt.energy.gross_uj


def test_a_spoken_question_is_answered_aloud(home, tmp_path):
    pytest.importorskip("gruut", reason="the speech extra is not installed")
    for name in ("whisper-tiny-en", "smollm2-135m", "piper-joe"):
        real_models.source(name)
    question = tmp_path / "question.wav"
    voice = leangen.load("piper-joe:int8", ledger=False)
    voice.generate("What is the capital of France?").save(question)
    result = leangen.load("talk", ledger=False).generate(question)
    assert "capital of France" in result.parts["ear"].text
    assert "Paris" in result.parts["mind"].text
    assert result.array.size > 22_050 / 2 and adds_up(result)


def test_a_question_is_answered_from_documents(home, tmp_path):
    pytest.importorskip("usearch", reason="the rag extra is not installed")
    for name in ("minilm-l6", "smollm2-135m"):
        real_models.source(name)
    (tmp_path / "bridge.md").write_text("The bridge was built in 1787 by the mason Thomas Arden.")
    (tmp_path / "bakery.txt").write_text("The bakery opens at five. Its rye bread has honey in it.")
    result = leangen.load("ask", ledger=False).generate(
        "Who built the bridge?", documents=str(tmp_path)
    )
    assert result.parts["memory"].output.extra["sources"] == ["bridge.md"]
    assert "Arden" in result.text and adds_up(result)


def test_every_ready_made_one_is_tried_here_or_beside():
    """`repaint` and `cascade` are in test_zoo.py, `draw` of tiny parts in test_text_to_image.py."""
    assert set(pipeline.shipped()) == {"talk", "ask", "repaint", "cascade", "draw"}
