"""Choosing tokens as transformers does, on the same weights and the same logits."""

from types import SimpleNamespace

import numpy as np
import pytest
from gguf_fixtures import Tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from test_language import generate, make
from test_language_speculation import same_but_for_ties
from test_llm_graph import transformers_model

from leangen.errors import RequestError
from leangen.families.language import Request
from leangen.families.sampling import log_softmax, penalize, sample

torch = pytest.importorskip("torch", reason="the export extra is not installed")
processors = pytest.importorskip(
    "transformers.generation.logits_process", reason="the export extra is not installed"
)

PROMPTS = [np.random.default_rng(i).integers(3, 268, 5 + 7 * i).tolist() for i in range(4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("transformers")


@pytest.fixture(scope="module")
def session(folder):
    return make(folder, Tiny(tied=False, context=256))


@pytest.fixture(scope="module")
def theirs(session, folder):
    model = transformers_model(folder / "tiny.gguf")

    def generated(prompt, new_tokens, ends, **options):
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=list(ends) or None,
            pad_token_id=0,
            **options,
        )
        return out[0, len(prompt) :].tolist()

    return generated


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_is_theirs(session, theirs, prompt):
    _, output = generate(session, tokens=prompt, max_new_tokens=64, ignore_eos=True)
    assert same_but_for_ties(session, prompt, output.tokens, theirs(prompt, 64, ()))


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_with_a_repetition_penalty_is_theirs(session, theirs, prompt):
    _, output = generate(
        session, tokens=prompt, max_new_tokens=40, ignore_eos=True, repetition_penalty=1.4
    )
    assert output.tokens == theirs(prompt, 40, (), repetition_penalty=1.4)


@pytest.mark.parametrize("beams", [2, 3, 5])
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_beam_search_is_theirs(session, theirs, prompt, beams):
    steps, output = generate(
        session, tokens=prompt, max_new_tokens=24, ignore_eos=True, beams=beams
    )
    assert output.tokens == theirs(prompt, 24, (), num_beams=beams)
    assert [step.units for step in steps] == [0] * 23 + [24]
    assert "".join(step.text for step in steps) == output.text


@pytest.mark.parametrize("beams", [2, 4])
def test_beams_end_as_theirs_do(session, theirs, beams):
    reasons = set()
    ends = tuple(range(0, 268, 6))  # many, so that beams end early
    for prompt in PROMPTS * 2:
        session.bundle.config["eos_ids"][:] = ends
        try:
            _, output = generate(session, tokens=prompt, max_new_tokens=20, beams=beams)
        finally:
            session.bundle.config["eos_ids"][:] = [2, 0]
        expected = theirs(prompt, 20, ends, num_beams=beams)
        assert output.tokens == expected
        reasons.add(output.stop_reason)
    assert "eos" in reasons


def test_beams_find_a_likelier_reply_than_greedy(session):
    def logprob(tokens, prompt):
        from leangen.families import language

        rows = language.logits(session, [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        return sum(log_softmax(row)[token] for row, token in zip(rows, tokens, strict=True))

    for prompt in PROMPTS:
        options = {"tokens": prompt, "max_new_tokens": 12, "ignore_eos": True}
        greedy = generate(session, **options)[1].tokens
        found = generate(session, beams=8, **options)[1].tokens
        assert logprob(found, prompt) >= logprob(greedy, prompt) - 1e-4


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"temperature": 0.5}, "temperature"),
        ({"n": 2}, "n"),
        ({"stop": ["a"]}, "stop"),
        ({"speculate": 3}, "speculate"),
        ({"logit_bias": {3: 1.0}}, "logit_bias"),
        ({"regex": "a"}, "regex"),
        ({"logprobs": 2}, "logprobs"),
    ],
)
def test_beam_search_refuses_what_it_does_not_do(options, name):
    with pytest.raises(RequestError, match=f"beam search takes no {name}: drop it"):
        Request("a", beams=2, **options)
    Request("a", beams=2, stop=[], prefix_cache=True)


def distribution(logits, prompt, **options):
    """Probabilities of the next token by transformers' processors, in their order."""
    scores = torch.from_numpy(logits.copy())[None]
    ids = torch.tensor([prompt])
    if options.get("repetition_penalty", 1) != 1:
        scores = processors.RepetitionPenaltyLogitsProcessor(options["repetition_penalty"])(
            ids, scores
        )
    scores = processors.TemperatureLogitsWarper(options["temperature"])(ids, scores)
    if options.get("top_k"):
        scores = processors.TopKLogitsWarper(options["top_k"])(ids, scores)
    if options.get("top_p", 1) < 1:
        scores = processors.TopPLogitsWarper(options["top_p"])(ids, scores)
    if options.get("min_p"):
        scores = processors.MinPLogitsWarper(options["min_p"])(ids, scores)
    return torch.softmax(scores, -1)[0].numpy()


@given(
    seed=st.integers(0, 2**32),
    temperature=st.floats(0.3, 3),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.2, 1),
    min_p=st.sampled_from([0.0, 0.02, 0.1, 0.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
)
@settings(max_examples=40)
def test_draws_follow_their_distribution(seed, **options):
    """Over evenly spread draws, each token comes up as often as its probability says."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=15).astype(np.float32) * 2
    prompt = rng.integers(0, 15, 4).tolist()
    expected = distribution(logits, prompt, **options)
    logits = penalize(logits, set(prompt), options.pop("repetition_penalty"))
    n = 400
    counts = np.zeros(15)
    for draw in range(n):
        even = SimpleNamespace(random=lambda at=draw: (at + 0.5) / n)
        counts[sample(logits, even, **options)] += 1
    np.testing.assert_allclose(counts / n, expected, atol=1.01 / n)
