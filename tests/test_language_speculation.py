"""Guessed tokens and kept prefixes change what a generation costs, never what it says."""

import numpy as np
import pytest
from gguf_fixtures import Tiny
from hypothesis import given
from hypothesis import strategies as st
from test_language import generate, make

from leangen.errors import RequestError
from leangen.families import language, speculation
from leangen.families.decoder import Decoder
from leangen.families.language import Request
from leangen.families.speculation import PromptLookup

TIE = 1e-4  # runs of another length round otherwise: logits of these models differ by 1e-5


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return make(tmp_path_factory.mktemp("speculation"), Tiny(tied=False, context=512))


def prompts(n, seed=0):
    """Random prompts; every second one repeats itself."""
    rng = np.random.default_rng(seed)
    for i in range(n):
        words = rng.integers(3, 268, rng.integers(1, 30)).tolist()
        yield words * 3 if i % 2 else words


def same_but_for_ties(session, prompt, tokens, others):
    """Whether two greedy replies are equal, or first differ where two logits tie."""
    for place, (a, b) in enumerate(zip(tokens, others, strict=True)):
        if a != b:
            logits = language.logits(session, [*prompt, *tokens[:place]])[-1]
            return abs(logits[a] - logits[b]) < TIE
    return True


def total(steps, name):
    return sum(step.counts.get(name, 0) for step in steps)


@pytest.mark.parametrize("most", [1, 4, 16])
def test_speculation_says_what_greedy_says(session, most):
    accepted = 0
    for prompt in prompts(20, seed=most):
        options = {"tokens": prompt, "max_new_tokens": 60, "ignore_eos": True}
        _, plain = generate(session, **options)
        steps, output = generate(session, speculate=most, **options)
        assert same_but_for_ties(session, prompt, plain.tokens, output.tokens)
        assert [token for step in steps for token in step.tokens] == output.tokens
        assert all(step.units == len(step.tokens) >= 1 for step in steps)
        assert sum(step.units for step in steps) == 60
        assert len(steps) == 60 - total(steps, "accepted")
        assert total(steps, "accepted") <= total(steps, "guessed")
        accepted += total(steps, "accepted")
    assert accepted > 20 * 5  # random models soon repeat themselves


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"repetition_penalty": 1.3}])
def test_speculation_draws_the_same_tokens(session, options):
    for prompt in prompts(10):
        request = {"tokens": prompt, "max_new_tokens": 40, "ignore_eos": True, **options}
        plain = generate(session, **request)[1]
        assert generate(session, speculate=6, **request)[1].tokens == plain.tokens


def test_a_stop_string_within_guesses_ends_the_reply(session):
    options = {"tokens": [5, 6, 7] * 4, "max_new_tokens": 80, "ignore_eos": True}
    _, free = generate(session, **options)
    for at in range(20, 60, 7):
        stop = free.text[at : at + 3]
        _, plain = generate(session, stop=[stop], **options)
        steps, output = generate(session, stop=[stop], speculate=8, **options)
        assert (output.text, output.tokens) == (plain.text, plain.tokens)
        assert output.stop_reason == plain.stop_reason == "stop"
        assert "".join(step.text for step in steps) == output.text


def test_guesses_stay_within_the_context(session):
    steps, output = generate(
        session, tokens=[5, 6] * 250, max_new_tokens=500, ignore_eos=True, speculate=63
    )
    assert (len(output.tokens), output.stop_reason) == (12, "length")


def naive(tokens, room):
    """The continuation of the last place where the longest end of 4 to 2 tokens stands earlier."""
    for n in (4, 3, 2):
        for at in range(len(tokens) - n - 1, -1, -1):
            if len(tokens) > n and tokens[at : at + n] == tokens[-n:]:
                grown = list(tokens)
                for i in range(room):
                    grown.append(grown[at + n + i])
                return grown[len(tokens) :]
    return []


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(0, 12), st.integers(1, 20))
def test_a_guess_is_what_followed_last_time(tokens, room, cut):
    lookup = PromptLookup(tokens[:cut], most=12)
    lookup.extend(tokens[cut:])
    lookup.learn(500, 500)  # trusts its guesses
    assert lookup.guess(room) == naive(tokens, room)


def test_guessing_pauses_while_it_is_wrong_and_begins_again():
    lookup = PromptLookup([1, 2] * 20, most=8)
    guessed = []
    for _ in range(200):
        guess = lookup.guess(100)
        guessed.append(len(guess))
        lookup.learn(len(guess), 0)
    assert max(guessed) == 1
    assert 5 <= sum(guessed[100:]) <= 15  # a probe now and then, at ROW_COST each
    for _ in range(50):
        guess = lookup.guess(100)
        lookup.learn(len(guess), len(guess))
    assert len(guess) == 8


def test_a_lookup_that_is_always_right_beats_its_cost():
    lookup = PromptLookup([1, 2] * 20, most=8)
    tokens = cost = 0
    for _ in range(50):
        guess = lookup.guess(100)
        lookup.learn(len(guess), len(guess))
        tokens += 1 + len(guess)
        cost += 1 + speculation.ROW_COST * len(guess)
    assert tokens > 2 * cost


def turns(session, **options):
    """Three turns of a conversation and a fresh start after the first two, as token ids."""
    rng = np.random.default_rng(5)
    talk = rng.integers(3, 268, 40).tolist()
    for grow in range(3):
        steps, output = generate(
            session, tokens=talk, max_new_tokens=30, ignore_eos=True, **options
        )
        yield talk, steps, output
        talk = [*talk, *output.tokens, *rng.integers(3, 268, 150 + grow).tolist()]
    yield (
        talk[:40],
        *generate(session, tokens=talk[:40], max_new_tokens=30, ignore_eos=True, **options),
    )


@pytest.mark.parametrize("speculate", [0, 8])
def test_a_kept_prefix_gives_the_same_text(tmp_path, speculate):
    plain = list(turns(make(tmp_path / "a", Tiny(context=1000)), speculate=speculate))
    session = make(tmp_path / "b", Tiny(context=1000))
    kept = list(turns(session, speculate=speculate, prefix_cache=True))
    for (talk, _, expected), (_, steps, output) in zip(plain, kept, strict=True):
        assert same_but_for_ties(session, talk, expected.tokens, output.tokens)
        assert output.prompt_units == len(talk)
        assert all("reused" not in step.counts for step in steps[1:])
    # The reply's last token was chosen but never fed; a prompt's last token is always fed.
    reused = [steps[0].counts["reused"] for _, steps, _ in kept]
    assert reused == [0, 69, 70 + 150 + 29, 39]
    (cache,) = session.keep("language.spare_caches", list)  # one is kept, however many turns
    assert cache.capacity == 512


def test_without_the_option_nothing_is_reused(session):
    for _ in range(2):
        steps, _ = generate(session, tokens=[5] * 40, max_new_tokens=4)
        assert steps[0].counts == {}


def test_a_prefix_survives_an_abandoned_generation(session):
    prompt = [7, 8, 9] * 10
    expected = generate(session, tokens=prompt, max_new_tokens=20, ignore_eos=True)[1].tokens
    run = language.run(session, Request(tokens=prompt, max_new_tokens=50, speculate=8))
    for _ in range(5):
        next(run)
    run.close()
    steps, output = generate(
        session, tokens=prompt, max_new_tokens=20, ignore_eos=True, prefix_cache=True
    )
    assert steps[0].counts == {"reused": 29}
    assert output.tokens == expected


def test_a_rewound_sequence_goes_on_as_if_nothing_had_been(session):
    tokens = next(prompts(1))
    expected = language.logits(session, [*tokens, 20, 21])
    with Decoder(session, 60) as sequence:
        sequence.feed([*tokens, 11, 12, 13])
        sequence.rewind(len(tokens))
        np.testing.assert_allclose(sequence.feed([20, 21]), expected[-1], atol=1e-4)


def test_sequences_fork(session):
    tokens = next(prompts(1))
    expected = [language.logits(session, [*tokens, last])[-1] for last in (20, 30)]
    with Decoder(session, 60) as sequence:
        sequence.feed(tokens)
        with sequence.fork(session) as other:
            np.testing.assert_allclose(sequence.feed([20]), expected[0], atol=1e-4)
            np.testing.assert_allclose(other.feed([30]), expected[1], atol=1e-4)


def test_samples_have_the_seeds_that_follow(session):
    options = {"temperature": 1.0, "max_new_tokens": 20, "ignore_eos": True}
    alone = [generate(session, "hello", seed=seed, **options)[1] for seed in (4, 5, 6)]
    for speculate in (0, 4):
        steps, output = generate(session, "hello", seed=4, n=3, speculate=speculate, **options)
        replies = output.extra["samples"]
        assert [reply.tokens for reply in replies] == [one.tokens for one in alone]
        assert [reply.text for reply in replies] == [one.text for one in alone]
        assert output.text == alone[0].text
        assert [step.kind for step in steps].count("prefill") == 1
        for number, reply in enumerate(replies):
            mine = [step for step in steps if step.sample == number]
            assert "".join(step.text for step in mine) == reply.text
            assert sum(step.units for step in mine) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n is 0, expected a whole number, 1 or more"),
        ({"speculate": -1}, "speculate is -1, expected a whole number, 0"),
        ({"speculate": True}, "speculate is True"),
        ({"speculate": 64}, "speculate is 64.*63"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        Request("a", **options)
