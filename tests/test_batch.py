"""Continuous batching: a request's text does not depend on who runs beside it."""

from __future__ import annotations

import hashlib
import random

import gguf_fixtures
import numpy as np
import pytest
import tiny_bundles
from gguf_fixtures import Tiny

from leangen.errors import RequestError
from leangen.exporters import gguf
from leangen.families import language
from leangen.families.batch import CHUNK, Batch, Sequence
from leangen.session import Session

CAPACITY = 3 * CHUNK
SCHEDULES = 250  # of each of two models


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return Session(tiny_bundles.language(tmp_path_factory.mktemp("fp32")), threads=1)


@pytest.fixture(scope="module")
def four_bit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four-bit")
    path = gguf_fixtures.write(folder / "tiny.gguf", Tiny(default_type="Q4_1"))
    return Session(gguf.export(path, folder / "bundle", form="gguf"), threads=1)


def ask(tokens, **options):
    return language.Request(**{"tokens": tokens, "ignore_eos": True, "max_new_tokens": 8} | options)


@pytest.fixture
def seen(monkeypatch):
    """The logits that each sequence chose from, as digests: a bit that differs shows."""
    digests = {}
    take = Sequence.take

    def noted(sequence, logits):
        digests.setdefault(sequence, []).append(hashlib.sha256(logits.tobytes()).digest())
        return take(sequence, logits)

    monkeypatch.setattr(Sequence, "take", noted)
    return digests


def alone(session, wanted):
    """The output of a request with a batch to itself."""
    batch = Batch(session, rows=1, capacity=CAPACITY)
    sequence = Sequence(session, wanted, CAPACITY)
    batch.add(sequence)
    while sequence.output is None:
        batch.step()
    return sequence.output


def prompts(rng, vocab, context):
    """Prompts of all lengths, many of which begin alike."""
    system = [rng.randrange(3, vocab) for _ in range(CHUNK)]
    for _ in range(12):
        tail = [rng.randrange(3, vocab) for _ in range(rng.choice([1, 2, 5, CHUNK - 1, CHUNK]))]
        tokens = (system if rng.random() < 0.5 else []) + tail
        yield tokens[: context - 10]


@pytest.mark.parametrize("model", ["session", "four_bit"])
def test_text_and_logits_are_the_same_alone_and_in_any_schedule(model, request, seen):
    session = request.getfixturevalue(model)
    rng = random.Random(0)
    config = session.bundle.config
    requests = [
        ask(
            tokens,
            max_new_tokens=rng.randrange(1, 9),
            temperature=rng.choice([0.0, 0.0, 1.0]),
            seed=rng.randrange(9),
            repetition_penalty=rng.choice([1.0, 1.2]),
        )
        for tokens in prompts(rng, config["vocab_size"], config["context_length"])
    ]
    expected, bits = [], []
    for wanted in requests:
        seen.clear()
        expected.append(alone(session, wanted))
        bits += seen.values()
    batch = Batch(session, rows=4, capacity=CAPACITY)
    reused = largest = 0
    for _ in range(SCHEDULES):
        todo = rng.sample(range(len(requests)), rng.randrange(1, 9))
        running, texts, cancelled = {}, {}, set()
        while todo or running:
            while todo and batch.size < batch.rows and rng.random() < 0.5:
                index = todo.pop()
                sequence = Sequence(session, requests[index], CAPACITY)
                batch.add(sequence)
                running[sequence] = index
                texts[sequence] = ""
            if running and rng.random() < 0.05:
                victim = rng.choice(list(running))
                batch.remove(victim)
                cancelled.add(victim)
                del running[victim]
            largest = max(largest, batch.size)
            for progress in batch.step():
                sequence = progress.sequence
                assert sequence not in cancelled
                assert progress.busy_ns >= 0
                texts[sequence] += progress.step.text
                reused += sequence.reused
                if sequence.output is not None:
                    index = running.pop(sequence)
                    assert sequence.output == expected[index]
                    assert seen.pop(sequence) == bits[index]
                    assert texts[sequence] == sequence.output.text
        assert batch.size == batch.cached_tokens == 0
    assert reused > 0
    assert largest == batch.rows


def test_the_batch_says_what_the_single_sequence_says(session):
    rng = random.Random(1)
    config = session.bundle.config
    for tokens in prompts(rng, config["vocab_size"], config["context_length"]):
        wanted = ask(tokens)
        running = language.run(session, wanted)
        with pytest.raises(StopIteration) as end:
            while True:
                next(running)
        assert alone(session, wanted).tokens == end.value.value.tokens


def test_rows_compute_what_a_full_prefill_computes(session):
    """The logits behind a moved, shared and padded row are those of the whole text at once."""
    vocab = session.bundle.config["vocab_size"]
    rng = random.Random(2)
    batch = Batch(session, rows=3, capacity=CAPACITY)
    system = [rng.randrange(3, vocab) for _ in range(CHUNK)]
    sequences = [
        Sequence(session, ask([*system, 3 + n, 4, 5], max_new_tokens=4 + 3 * n), CAPACITY)
        for n in range(3)
    ]
    for sequence in sequences:
        batch.add(sequence)
    while batch.size:
        batch.step()
    assert [sequence.reused for sequence in sequences] == [0, CHUNK, CHUNK]
    for sequence in sequences:
        tokens = sequence.output.tokens
        logits = language.logits(session, [*sequence.prompt, *tokens])
        greedy = logits.argmax(axis=1)[len(sequence.prompt) - 1 : -1]
        np.testing.assert_array_equal(greedy, tokens)


def test_running_sequences_go_on_while_another_joins(session):
    batch = Batch(session, rows=2, capacity=CAPACITY)
    first = Sequence(session, ask([3, 4], max_new_tokens=20), CAPACITY)
    batch.add(first)
    batch.step()
    second = Sequence(session, ask([5] * (2 * CHUNK + 3)), CAPACITY)
    batch.add(second)
    for units in (0, 0, 1):
        mine, other = batch.step()
        assert (mine.sequence, mine.step.units) == (first, 1)
        assert (other.sequence, other.step.kind, other.step.units) == (second, "prefill", units)
    assert [progress.sequence for progress in batch.step()] == [first, second]


def test_what_does_not_fit_is_refused(session):
    with pytest.raises(RequestError, match=f"{CAPACITY} tokens and a sequence holds {CAPACITY}"):
        Sequence(session, ask([3] * CAPACITY), CAPACITY)
    for option in ({"n": 2}, {"beams": 2}, {"speculate": 3}):
        with pytest.raises(RequestError, match=f"takes no {next(iter(option))}"):
            Sequence(session, ask([3], **option), CAPACITY)
    batch = Batch(session, rows=1, capacity=CAPACITY)
    sequence = Sequence(session, ask([3] * (CAPACITY - 2)), CAPACITY)
    assert sequence.reply.limit == 2
    batch.add(sequence)
    with pytest.raises(RequestError, match="all 1 rows"):
        batch.add(Sequence(session, ask([3]), CAPACITY))
    while batch.size:
        batch.step()
    assert len(sequence.output.tokens) == 2
    batch.remove(sequence)
