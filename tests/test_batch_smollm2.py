"""Batches of the published SmolLM2 at 4 bits: the same text alone, among others, and by itself."""

from __future__ import annotations

import pytest
import real_models

from leangen.exporters import gguf
from leangen.families import language
from leangen.families.batch import Batch, Sequence
from leangen.session import Session

pytestmark = pytest.mark.slow

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was a small robot who",
    "The old bridge over the river was built",
    "Water boils at a temperature of",
    "In the year 1969 the first human",
    "The three primary colours are",
    "To bake a loaf of bread you need",
    "A triangle has three sides and",
)
CAPACITY = 256


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    path = real_models.source("smollm2-135m")
    return Session(gguf.export(path, folder / "bundle", form="gguf"))


def texts(session, requests, rows):
    batch = Batch(session, rows=rows, capacity=CAPACITY)
    sequences = [Sequence(session, wanted, CAPACITY) for wanted in requests]
    waiting = list(sequences)
    while waiting or batch.size:
        while waiting and batch.size < rows:
            batch.add(waiting.pop(0))
        batch.step()
    return [sequence.output.text for sequence in sequences]


def test_the_text_does_not_depend_on_the_company(session):
    requests = [
        language.Request(prompt=text * (1 + index % 3), max_new_tokens=40)
        for index, text in enumerate(PROMPTS)
    ]
    alone = [texts(session, [wanted], rows=1)[0] for wanted in requests]
    assert all(alone)
    for rows in (3, 8):
        assert texts(session, requests, rows) == alone
