"""SmolLM2-135M on leangen's kernels: the same text as the NumPy twin, no more loss than ORT's."""

import re

import leangen_kernels
import numpy as np
import pytest
from decoder_twin import Twin
from real_models import source, store

from leangen.families import language
from leangen.families.decoder import Decoder
from leangen.session import Session

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        leangen_kernels.library() is None, reason="no kernels: " + leangen_kernels.status()[1]
    ),
]
NEW_TOKENS, TIE, WINDOW = 200, 1e-3, 500
PROMPTS = [
    "The capital of France is", "Once upon a time", "def fibonacci(n):", "The recipe needs two",
    "In 1969 the first", "Water boils when", "Dear Sir or Madam,", "The theory of evolution says",
    "A haiku about rain:", "List three kinds of trees:", "The stock market fell because",
    "She opened the door and", "To install the program,", "The largest planet is",
    "My favourite book is", "Q: What is 12 times 7? A:", "The patient complained of",
    "Under the old oak tree", "import numpy as np", "The treaty was signed in",
]  # fmt: skip


@pytest.fixture(scope="module")
def path():
    return source("smollm2-135m")


@pytest.fixture(scope="module")
def bundles(path):
    return {scheme: store().resolve(f"smollm2-135m:{scheme}") for scheme in ("fp32", "gguf")}


@pytest.fixture(scope="module")
def tokens(bundles):
    """The first 4,000 tokens of wiki.utf8 without its <doc> tags."""
    text = source("wiki-text").read_text(encoding="utf-8")
    tokenizer = language.tokenizer(Session(bundles["fp32"]))
    return tokenizer.encode(re.sub("</?doc[^>]*>", "", text)[:40000]).ids[:4000]


def greedy(session, prompt):
    """The prompt's tokens, and the likeliest ones after them."""
    start = language.tokenizer(session).encode(prompt).ids
    found = []
    with Decoder(session, len(start) + NEW_TOKENS) as sequence:
        logits = sequence.feed(start)
        for _ in range(NEW_TOKENS):
            found.append(int(logits.argmax()))
            logits = sequence.feed([found[-1]])
    return start, found


def first_difference(start, found, logits):
    """How far the first token that is not the likeliest is behind it, in logits; 0 if all are."""
    rows = logits[len(start) - 1 : len(start) + len(found) - 1]
    behind = rows.max(axis=1) - rows[np.arange(len(found)), found]
    wrong = np.flatnonzero(behind)
    return 0.0 if len(wrong) == 0 else float(behind[wrong[0]])


def test_greedy_text_with_fp32_activations_is_that_of_the_numpy_twin(path, bundles):
    session = Session(bundles["gguf"], activations="fp32")
    twin = Twin(path, activations="fp32")
    for prompt in PROMPTS:
        start, found = greedy(session, prompt)
        assert first_difference(start, found, twin.logits(start + found[:-1])) <= TIE
    assert session.kernels != "ort"


def test_rounded_activations_part_from_the_twin_no_more_than_it_does_from_itself(
    path, bundles, tokens
):
    """Where an activation falls between two codes, fp32 and float64 may round apart.

    All that follows then differs, as it does in the twin alone once its input is off by an fp32
    rounding error.
    """
    twin, window = Twin(path), tokens[:200]
    expected = twin.logits(window)
    apart, of_itself = (
        float(np.sqrt(((logits - expected) ** 2).mean()))
        for logits in (
            language.logits(Session(bundles["gguf"]), window),
            twin.logits(window, nudge=np.finfo(np.float32).eps),
        )
    )
    print(f"rms of logits apart: {apart:.4f}, the twin from itself {of_itself:.4f}")
    assert apart <= 1.2 * of_itself


def test_greedy_text_with_fp32_activations_is_that_of_ort(bundles):
    ours, stock = (
        Session(bundles["gguf"], activations="fp32", kernels=kernels) for kernels in ("auto", "ort")
    )
    for prompt in PROMPTS:
        start, found = greedy(ours, prompt)
        logits = language.logits(stock, start + found[:-1])
        assert first_difference(start, found, logits) <= TIE


def divergence(reference, session, tokens):
    """Mean KL divergence to the reference in nats."""
    sums = 0.0
    for begin in range(0, len(tokens), WINDOW):
        window = tokens[begin : begin + WINDOW]
        p, q = (
            logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
            for logits in (
                language.logits(s, window).astype(np.float64) for s in (reference, session)
            )
        )
        sums += float((np.exp(p) * (p - q)).sum())
    return sums / len(tokens)


def test_rounded_activations_lose_no_more_than_with_ort(bundles, tokens):
    fp32 = Session(bundles["fp32"], kernels="ort")
    ours, stock = (
        divergence(fp32, Session(bundles["gguf"], kernels=kernels), tokens)
        for kernels in ("auto", "ort")
    )
    print(f"KL to fp32: {ours:.5f} on leangen's kernels, {stock:.5f} on ORT's")
    assert ours <= 1.1 * stock
