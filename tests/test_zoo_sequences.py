"""The zoo's models that draw pixel by pixel or sample by sample: is it what they learnt?"""

from pathlib import Path

import numpy as np
import pytest

from leangen import families, verification
from leangen.engine import Engine
from leangen.families import waveform
from leangen.families.pixel_request import Request
from leangen.quantize import quantize
from leangen.session import Session
from leangen.store import Store

PIXELS = ("fashion-gpt", "fashion-pixelcnn")


@pytest.fixture(scope="module", params=PIXELS)
def session(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "bench" / "zoo")
        bundle = Store(tmp_path_factory.mktemp("home")).resolve(request.param)
    return Session(bundle, threads=1)


@pytest.fixture(scope="module")
def voice(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "bench" / "zoo")
        bundle = Store(tmp_path_factory.mktemp("home")).resolve("prompts-wavenet")
    return Session(bundle, threads=1)


def bits(session, tokens, label):
    """Bits per dimension of a picture, given a label."""
    family = families.of(session.bundle)
    asked = Request(conditions={"label": label})
    return bits_of(family.logits(session, tokens, request=asked).astype(np.float64), tokens)


def bits_of(logits, tokens):
    """Mean bits of tokens under logits [n, levels] before each."""
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    return -np.log2(chances[np.arange(len(tokens)), tokens]).mean()


def test_what_is_exported_is_what_was_trained(session):
    assert "graph model: 0 off its fp32 reference" in list(verification.verify(session.bundle))[-1]


def test_what_was_drawn_for_a_label_is_likeliest_given_it(session, tmp_path):
    """And for a low-bit model nearly as likely."""
    engine = Engine(session, baseline_s=0)
    results = [
        engine.stream(seed=5, conditions={"label": label}) for label in ("trouser", "ankle boot")
    ]
    trouser, boot = ([token for step in steps for token in step.tokens] for steps in results)
    assert bits(session, trouser, "trouser") < bits(session, trouser, "ankle boot")
    assert bits(session, boot, "ankle boot") < bits(session, boot, "trouser")
    low = Session(quantize(session.bundle, "int8", tmp_path / "int8"), threads=1)
    assert abs(bits(low, boot, "ankle boot") - bits(session, boot, "ankle boot")) < 0.02


def test_speech_is_likelier_than_its_samples_in_another_order(voice, tmp_path):
    """Of the model's own speech, as only that is here; and for a low-bit model nearly as likely."""
    assert "graph model: 0 off its fp32 reference" in list(verification.verify(voice.bundle))[-1]
    tokens = waveform.draw(voice, seed=1)
    mixed = np.random.default_rng(0).permutation(tokens)
    own = bits_of(waveform.logits(voice, tokens), tokens)
    assert own < bits_of(waveform.logits(voice, mixed), mixed) - 2
    low = Session(quantize(voice.bundle, "int8", tmp_path / "int8"), threads=1)
    assert abs(bits_of(waveform.logits(low, tokens), tokens) - own) < 0.05
