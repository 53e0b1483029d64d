"""The real SmolLM2-135M: exact where it must be exact, close where it rounds, quick to start."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from real_models import source
from test_llm_graph import transformers_logits

from leangen.exporters import gguf
from leangen.families import language
from leangen.families.language import Request
from leangen.session import Session

pytestmark = pytest.mark.slow

WINDOW = 500


@pytest.fixture(scope="module")
def path():
    return source("smollm2-135m")


@pytest.fixture(scope="module")
def bundles(path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    return {form: gguf.export(path, folder / form, form=form) for form in ("fp32", "gguf")}


@pytest.fixture(scope="module")
def fp32(bundles):
    return Session(bundles["fp32"])


@pytest.fixture(scope="module")
def tokens(fp32):
    """The first 4,000 tokens of wiki.utf8 without its <doc> tags."""
    text = source("wiki-text").read_text(encoding="utf-8")
    return language.tokenizer(fp32).encode(re.sub("</?doc[^>]*>", "", text)[:40000]).ids[:4000]


def test_fp32_logits_agree_with_transformers(path, fp32, tokens):
    expected = transformers_logits(path, tokens[:64])
    np.testing.assert_allclose(language.logits(fp32, tokens[:64]), expected, rtol=0, atol=1e-3)


def test_the_lossless_form_is_the_same_weights(exact, fp32, tokens):
    expected = language.logits(fp32, tokens[:64])
    np.testing.assert_allclose(language.logits(exact, tokens[:64]), expected, rtol=0, atol=1e-3)


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def test_int8_activations_stay_close(bundles, fp32, tokens):
    rounded = Session(bundles["gguf"])
    divergence, agreement = [], []
    for start in range(0, len(tokens), WINDOW):
        window = tokens[start : start + WINDOW]
        p = log_softmax(language.logits(fp32, window))
        q = log_softmax(language.logits(rounded, window))
        divergence.append((np.exp(p) * (p - q)).sum(axis=1))
        agreement.append(p.argmax(axis=1) == q.argmax(axis=1))
    assert len(np.concatenate(agreement)) == 4000
    assert np.mean(divergence) <= 0.01
    assert np.mean(agreement) >= 0.96


@pytest.mark.parametrize("form", ["fp32", "gguf"])
def test_it_knows_the_capital_of_france(bundles, form):
    run = language.run(
        Session(bundles[form]), Request("The capital of France is", max_new_tokens=8)
    )
    assert "Paris" in "".join(step.text for step in run)


FERRY = (
    "The ferry leaves Hull at 9 in the morning and at 4 in the afternoon. A ticket costs 12 pounds "
    "for adults and 7 pounds for children. Bicycles go for free."
)
ASKED = [
    {"prompt": "The capital of France is"},
    {"prompt": '{"name": "Ann", "age": 3}\n{"name": "Bob", "age": 4}\n'},
    {"messages": [{"role": "user", "content": f"Repeat this text three times: {FERRY}"}]},
    {"messages": [{"role": "user", "content": "Why is the sky blue?"}]},
]


def drain(session, **options):
    run = language.run(session, Request(**options))
    steps = []
    while True:
        try:
            steps.append(next(run))
        except StopIteration as end:
            return steps, end.value


@pytest.fixture(scope="module")
def exact(bundles):
    """The lossless form without rounded activations, in which one row computes as several do."""
    return Session(bundles["gguf"], activations="fp32")


@pytest.mark.parametrize("asked", ASKED)
def test_speculation_is_lossless(exact, asked):
    options = {**asked, "max_new_tokens": 100, "ignore_eos": True}
    _, plain = drain(exact, **options)
    steps, output = drain(exact, speculate=10, **options)
    prompt = language.encode(exact, Request(**options))
    for place, (a, b) in enumerate(zip(plain.tokens, output.tokens, strict=True)):
        if a != b:
            logits = language.logits(exact, [*prompt, *plain.tokens[:place]])[-1]
            assert abs(logits[a] - logits[b]) < 1e-3
            break
    assert len(steps) < 100


def test_a_conversation_reuses_its_turns(exact):
    talk, told = [], []
    for question in ("Name a town in England.", "And one in France?", "Which is larger?"):
        talk.append({"role": "user", "content": question})
        options = {"messages": list(talk), "max_new_tokens": 30}
        steps, output = drain(exact, prefix_cache=True, **options)
        told.append((options, output, steps[0].counts["reused"]))
        talk.append({"role": "assistant", "content": output.text})
    for options, output, _ in told:
        assert drain(exact, **options)[1].tokens == output.tokens
    (_, first, _), (_, second, reused), (_, third, more) = told
    assert reused >= first.prompt_units
    assert more >= second.prompt_units
    assert third.prompt_units - more < 60


def test_a_schema_is_obeyed(exact):
    pytest.importorskip("llguidance", reason="the grammar extra is not installed")
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "capital": {"type": "boolean"}},
        "required": ["city", "capital"],
        "additionalProperties": False,
    }
    asked = [{"role": "user", "content": "The capital of France, as JSON."}]
    _, output = drain(exact, messages=asked, json_schema=schema, max_new_tokens=100)
    said = json.loads(output.text)
    assert isinstance(said["city"], str) and isinstance(said["capital"], bool)


START = r"""
import json, re, sys, time
from pathlib import Path
from leangen.bundle import open_bundle
from leangen.families import language
from leangen.session import Session
session = Session(open_bundle(Path(sys.argv[1])), threads=2)
run = language.run(session, language.Request("The capital of France is", max_new_tokens=8))
step = next(run)
first = time.clock_gettime(time.CLOCK_BOOTTIME)
list(run)
born = int(open("/proc/self/stat").read().rsplit(")", 1)[1].split()[19]) / 100
peak = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps({"ttft_s": first - born, "peak": peak, "onnx": "onnx" in sys.modules}))
"""


def test_a_warm_start_is_quick_and_small(bundles):
    starts = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", START, str(bundles["gguf"].path)],
                check=True,
                capture_output=True,
                text=True,
            ).stdout
        )
        for _ in range(5)
    ]
    assert min(start["ttft_s"] for start in starts) < 1.5
    assert max(start["peak"] for start in starts) < 450e6
    assert not any(start["onnx"] for start in starts)
