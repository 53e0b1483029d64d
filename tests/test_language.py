"""What a generation promises, on tiny random models."""

import dataclasses
import json

import numpy as np
import pytest
from gguf_fixtures import Tiny, write
from hypothesis import given, settings
from hypothesis import strategies as st

from leangen.errors import BundleError, RequestError
from leangen.exporters import gguf
from leangen.families import language
from leangen.families.language import Request
from leangen.families.text_stream import TextStream
from leangen.session import Session

# GPT-2's bytes: printable ones stand for themselves, the others for what follows U+00FF.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_CHARS = {byte: chr(byte) for byte in PRINTABLE} | {
    byte: chr(256 + place) for place, byte in enumerate(OTHERS)
}


def make(tmp_path, tiny=None):
    path = write(tmp_path / "tiny.gguf", tiny or Tiny(tied=False))
    return Session(gguf.export(path, tmp_path / "bundle"), threads=1)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return make(tmp_path_factory.mktemp("language"))


def generate(session, *args, **options):
    """(steps, output) of one generation."""
    run = language.run(session, Request(*args, **options))
    steps = []
    while True:
        try:
            steps.append(next(run))
        except StopIteration as end:
            return steps, end.value


def ids(session, text):
    return language.encode(session, Request(text))


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "top_k": 50, "top_p": 0.9}])
@pytest.mark.parametrize("seed", [0, 1])
def test_steps_add_up_to_the_output(session, options, seed):
    steps, output = generate(
        session, "hello world", max_new_tokens=30, seed=seed, ignore_eos=True, **options
    )
    assert "".join(step.text for step in steps) == output.text
    assert [token for step in steps for token in step.tokens] == output.tokens
    assert [step.kind for step in steps] == ["prefill"] + ["decode"] * 29
    assert all(step.units == 1 for step in steps)
    assert output.stop_reason == "length"
    assert output.prompt_units == len(ids(session, "hello world"))
    tokenizer = language.tokenizer(session)
    assert output.text == tokenizer.decode(output.tokens)


def test_greedy_takes_the_likeliest_token_each_time(session):
    prompt = ids(session, "hello")
    _, output = generate(session, tokens=prompt, max_new_tokens=20, ignore_eos=True)
    logits = language.logits(session, [*prompt, *output.tokens[:-1]])
    assert output.tokens == logits[len(prompt) - 1 :].argmax(axis=1).tolist()


def test_same_seed_same_output_and_another_seed_another(session):
    def sampled(seed):
        return generate(session, "12", max_new_tokens=40, temperature=1.0, seed=seed)[1].tokens

    assert sampled(3) == sampled(3)
    assert sampled(3) != sampled(4)


def test_generations_side_by_side_do_not_disturb_each_other(session):
    alone = [generate(session, text, max_new_tokens=20)[0] for text in ("hello", "world 12")]
    runs = [language.run(session, Request(t, max_new_tokens=20)) for t in ("hello", "world 12")]
    together = [[next(run)] for run in runs]
    for place in range(1, 20):
        for steps, run, expected in zip(together, runs, alone, strict=True):
            if place < len(expected):
                steps.append(next(run))
    assert together == alone


def test_caches_are_reused_and_an_abandoned_run_gives_its_back(session):
    spare = session.keep("language.spare_caches", list)
    generate(session, "hello", max_new_tokens=5)
    (cache,) = spare
    run = language.run(session, Request("hello", max_new_tokens=5))
    next(run)
    assert spare == []
    run.close()
    assert spare == [cache]


def test_a_small_cache_gives_way_to_a_larger(tmp_path):
    session = make(tmp_path, Tiny(context=1000))
    for new_tokens, capacity in ((10, 256), (300, 512), (10, 512)):
        generate(session, "hello", max_new_tokens=new_tokens, ignore_eos=True)
        (cache,) = session.keep("language.spare_caches", list)
        assert cache.capacity == capacity


def test_it_ends_before_a_stop_string(session):
    _, free = generate(session, "hello", max_new_tokens=40, temperature=1.0, ignore_eos=True)
    middle = len(free.text) // 2
    stop = free.text[middle : middle + 2]
    assert stop
    steps, output = generate(
        session,
        "hello",
        max_new_tokens=40,
        temperature=1.0,
        ignore_eos=True,
        stop=["never to be seen", stop],
    )
    assert output.stop_reason == "stop"
    assert output.text == free.text[: free.text.index(stop)]
    assert "".join(step.text for step in steps) == output.text
    assert output.tokens == free.tokens[: len(output.tokens)]


def test_it_ends_with_the_end_token(session):
    for seed in range(50):
        options = {"max_new_tokens": 60, "temperature": 2.0, "seed": seed}
        _, free = generate(session, "hello", ignore_eos=True, **options)
        ends = [i for i, token in enumerate(free.tokens) if token in (0, 2)]
        if not ends:
            continue
        steps, output = generate(session, "hello", **options)
        assert output.stop_reason == "eos"
        assert output.tokens == free.tokens[: ends[0] + 1]
        assert "".join(step.text for step in steps) == output.text
        return
    pytest.fail("no seed drew an end token")


def test_the_context_bounds_prompt_and_reply(session):
    _, output = generate(session, tokens=[5] * 120, max_new_tokens=50, ignore_eos=True)
    assert (len(output.tokens), output.stop_reason) == (8, "length")
    with pytest.raises(RequestError, match="200 tokens and the model's context 128"):
        generate(session, tokens=[5] * 200)


def test_repetition_penalty_avoids_what_was_seen(session):
    _, output = generate(
        session, "hello", max_new_tokens=60, repetition_penalty=1e6, ignore_eos=True
    )
    # Only tokens with negative logits repeat less; the likeliest ones are positive.
    assert len(set(output.tokens)) == len(output.tokens)
    assert not set(output.tokens) & set(ids(session, "hello"))


def test_messages_go_through_the_chat_template(session):
    talk = [{"role": "user", "content": "hello"}]
    got = language.encode(session, Request(messages=talk))
    text = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert got == ids(session, text)
    assert got.count(1) == 2 and got.count(2) == 1


def test_without_a_template_messages_are_refused(tmp_path):
    session = make(tmp_path, Tiny(template=None))
    with pytest.raises(RequestError, match="no chat template"):
        generate(session, messages=[{"role": "user", "content": "hello"}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no prompt, expected exactly one"),
        ({"prompt": "a", "tokens": [1]}, "prompt and tokens, expected exactly one"),
        ({"prompt": "a", "max_new_tokens": -3}, "max_new_tokens is -3"),
        ({"prompt": "a", "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt": "a", "max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"prompt": "a", "temperature": -0.1}, "temperature is -0.1"),
        ({"prompt": "a", "temperature": float("nan")}, "temperature is nan"),
        ({"prompt": "a", "top_p": 0}, "top_p is 0"),
        ({"prompt": "a", "top_p": 1.2}, "top_p is 1.2"),
        ({"prompt": "a", "top_k": -1}, "top_k is -1"),
        ({"prompt": "a", "repetition_penalty": 0}, "repetition_penalty is 0"),
        ({"prompt": "a", "seed": -1}, "seed is -1"),
        ({"prompt": "a", "stop": "end"}, "stop is 'end'"),
        ({"prompt": "a", "stop": [""]}, "stop is"),
        ({"prompt": "a", "temperature": "hot"}, "temperature is 'hot'"),
        ({"prompt": b"a"}, "prompt is of type bytes"),
        ({"messages": []}, "messages is empty"),
        ({"messages": [{"role": "wizard", "content": "a"}]}, "role is 'wizard'.*system, user"),
        ({"messages": [{"role": "user"}]}, "lacks role or content"),
        ({"messages": [{"role": "user", "content": 3}]}, "not text"),
        ({"messages": [{"role": "assistant", "content": None}]}, "not text"),
        ({"prompt": "a", "tools": [{}]}, "tools is .* to go with messages"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": ["x"]}, "tools is"),
    ],
)
def test_requests_that_make_no_sense_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        Request(**options)


def test_prompts_that_cannot_run_are_refused(session):
    with pytest.raises(RequestError, match="prompt is empty"):
        generate(session, "")
    with pytest.raises(RequestError, match="token 9999 is not in the vocabulary"):
        generate(session, tokens=[1, 9999])
    with pytest.raises(RequestError, match="token 'a' is not in the vocabulary"):
        generate(session, tokens=["a"])
    with pytest.raises(RequestError, match="token 9999 is not in the vocabulary"):
        generate(session, "a", logit_bias={9999: 1.0})
    with pytest.raises(RequestError, match="got 0 tokens"):
        language.logits(session, [])


def test_a_bundle_without_its_config_is_refused(session):
    damaged = Session(dataclasses.replace(session.bundle, config={"layers": 2}))
    with pytest.raises(BundleError, match="lacks context_length.* export the model again"):
        generate(damaged, "hello")


def test_the_description_has_the_options_and_not_the_prompt():
    secret = "a very private prompt"
    for request in (
        Request(secret, stop=("x",)),
        Request(messages=[{"role": "user", "content": secret}]),
    ):
        text = json.dumps(request.describe())
        assert secret not in text
        assert json.loads(text)["max_new_tokens"] == 128


@given(
    text=st.text(alphabet="abe é🦆\n", min_size=1, max_size=30),
    stop=st.lists(st.text(alphabet="abé🦆", min_size=1, max_size=3), max_size=2),
)
@settings(max_examples=200)
def test_streamed_text_is_the_text_up_to_the_first_stop(session, text, stop):
    tokenizer = language.tokenizer(session)
    stream = TextStream(tokenizer, ids(session, "hello"), stop)
    shown = ""
    for token in tokenizer.encode(text).ids:
        piece = stream.push(token)
        assert "\ufffd" not in piece
        shown += piece
        assert not any(s in shown for s in stop)
        if stream.stopped:
            break
    shown += stream.flush()
    places = [text.index(s) for s in stop if s in text]
    assert stream.stopped == bool(places)
    # Of two stop strings the one that is whole first ends the text, so it may begin later.
    assert text.startswith(shown)
    assert shown in ([text[:place] for place in places] if places else [text])


WORDS = [word.encode() for word in ("é", "🦆", "ab", "hello", "\ufffd", "漢")]


@given(
    pieces=st.lists(st.binary(min_size=1, max_size=3) | st.sampled_from(WORDS), max_size=12),
    stop=st.lists(st.text(alphabet="abé🦆\ufffd", min_size=1, max_size=3), max_size=2),
)
@settings(max_examples=300)
def test_any_bytes_stream_as_they_decode(session, pieces, stop):
    """Tokens of single bytes, of which many are no UTF-8: half characters wait, none is lost."""
    tokenizer = language.tokenizer(session)
    tokens = [tokenizer.token_to_id(BYTE_CHARS[byte]) for byte in b"".join(pieces)]
    stream = TextStream(tokenizer, ids(session, "hello"), stop)
    shown = ""
    for token in tokens:
        shown += stream.push(token)
        assert not any(s in shown for s in stop)
        if not stream.stopped:
            assert tokenizer.decode(tokens).startswith(shown)
    shown += stream.flush()
    if not stream.stopped:
        assert shown == tokenizer.decode(tokens)
    assert tokenizer.decode(tokens).startswith(shown)


def test_half_a_character_at_the_end_is_shown_as_such(session):
    tokenizer = language.tokenizer(session)
    first, *_ = tokenizer.encode("🦆").ids
    stream = TextStream(tokenizer, [5], ())
    assert stream.push(first) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""
    assert np.isfinite(first)
