"""The speech task: same seed same sound, durations and noise under the caller's control."""

import sys

import numpy as np
import pytest
from flow_models import HOP, RATE_HZ, SYMBOLS, drain, write_voice
from hypothesis import given
from hypothesis import strategies as st

from leangen import phonemes
from leangen.errors import DependencyError, RequestError
from leangen.exporters import piper
from leangen.families import speech
from leangen.session import Session

ID_MAP = {symbol: [i] for i, symbol in enumerate(SYMBOLS)}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voice")
    return Session(piper.export(write_voice(folder), folder / "bundle"), threads=1)


@pytest.fixture(scope="module")
def duet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("duet")
    return Session(piper.export(write_voice(folder, speakers=2), folder / "bundle"), threads=1)


def say(session, **options):
    return drain(speech.run(session, speech.Request(**options)))


def test_steps_units_and_extra(session):
    steps, output = say(session, phonemes="abc\nfˈg.", seed=3)
    assert [s.kind for s in steps] == ["encode", "flow", "decode"] * 2
    assert sum(s.units for s in steps) == pytest.approx(output.array.size / RATE_HZ)
    assert output.array.dtype == np.float32
    assert output.array.size == sum(output.extra["durations"]) * HOP
    assert len(output.extra["durations"]) == len(output.extra["phoneme_ids"])
    assert output.prompt_units == len(output.extra["phoneme_ids"])
    assert (output.media, output.sample_rate_hz) == ("audio", RATE_HZ)


def test_the_seed_decides(session):
    a, b, c = (say(session, phonemes="abcd", seed=seed)[1].array for seed in (5, 5, 6))
    np.testing.assert_array_equal(a, b)
    assert a.size != c.size or np.abs(a - c).max() > 1e-3


def test_ids_and_durations_of_an_output_say_it_again(session):
    _, first = say(session, phonemes="abc\nde", seed=2)
    again = {k: first.extra[k] for k in ("phoneme_ids", "durations")}
    _, second = say(session, **again, seed=2)
    np.testing.assert_array_equal(first.array, second.array)
    # another rhythm's spread changes the predicted durations, not the forced ones
    _, third = say(session, **again, seed=2, noise_w=3.0)
    np.testing.assert_array_equal(third.extra["durations"], first.extra["durations"])


def test_scales(session):
    def frames(**options):
        return sum(say(session, phonemes="abcdefg", **options)[1].extra["durations"])

    assert frames(length_scale=4.0) > frames(length_scale=1.0) >= frames(length_scale=0.25)
    still = [say(session, phonemes="abc", noise_scale=0, noise_w=0, seed=s)[1] for s in (0, 1)]
    np.testing.assert_array_equal(still[0].array, still[1].array)
    default = say(session, phonemes="abc")[1]
    stated = say(session, phonemes="abc", noise_scale=0.5, noise_w=0.4, length_scale=1.0)[1]
    np.testing.assert_array_equal(default.array, stated.array)


def test_speakers(duet):
    first, number, name = (say(duet, phonemes="ab", speaker=s)[1] for s in (None, 1, "bob"))
    np.testing.assert_array_equal(number.array, name.array)
    assert first.array.size != name.array.size or np.abs(first.array - name.array).max() > 1e-3
    for speaker in (2, -1, "eve"):
        with pytest.raises(RequestError, match="0 to 1 or one of ann, bob"):
            say(duet, phonemes="ab", speaker=speaker)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "exactly one of text, phonemes and phoneme_ids"),
        ({"text": "a", "phonemes": "a"}, "text and phonemes given"),
        ({"phonemes": "a", "noise_scale": -1}, "noise_scale is -1"),
        ({"phonemes": "a", "noise_w": float("nan")}, "noise_w is nan"),
        ({"phonemes": "a", "noise_scale": 1e20}, "noise_scale is 1e.20, expected 0 to 100"),
        ({"phonemes": "a", "length_scale": 0}, "length_scale is 0"),
        ({"phonemes": "a", "seed": -1}, "seed is -1"),
        ({"phonemes": ""}, "nothing to say"),
        ({"phonemes": " \n "}, "nothing to say"),
        ({"phoneme_ids": []}, "nothing to say"),
        ({"phonemes": "a" * 3000}, "an utterance has .* at most 4000: split the text"),
        ({"phoneme_ids": [1, 99, 2]}, "id 99 is unknown: expected 0 to 14"),
        ({"phoneme_ids": [1, -3]}, "phoneme_ids hold -3"),
        ({"phoneme_ids": [1, 2.5]}, r"phoneme_ids hold 2\.5"),
        ({"phonemes": "ax"}, "no phoneme 'x'"),
        ({"phonemes": "a^b"}, "no phoneme '\\^'"),
        ({"phoneme_ids": [1, 2], "durations": [1]}, "1 durations given for 2 phoneme ids"),
        ({"phoneme_ids": [1, 2], "durations": [1, -1]}, "durations hold -1"),
        ({"phoneme_ids": [1, 2], "durations": [0, 0]}, "would last 0 frames"),
        ({"phoneme_ids": [1, 2], "durations": [10**9, 1]}, "split the text"),
        ({"phonemes": "a", "speaker": 1}, "speaker 1 is unknown: expected 0 to 0"),
    ],
)
def test_requests_that_cannot_be_met(session, options, text):
    with pytest.raises(RequestError, match=text):
        say(session, **options)


def test_describe_holds_no_text():
    request = speech.Request(text="a secret", seed=4)
    assert request.describe()["seed"] == 4
    assert "secret" not in str(request.describe())


def test_calibration_requests_run(session):
    requests = speech.calibration_requests(session)
    assert len(requests) == 4
    assert requests == speech.calibration_requests(session)
    for request in requests:
        assert drain(speech.run(session, request))[1].array.size


def test_layout_of_ids():
    assert phonemes.to_ids("ab", ID_MAP) == [[1, 0, 4, 0, 5, 0, 2]]
    assert phonemes.to_ids("a\n\nb ", ID_MAP) == [[1, 0, 4, 0, 2], [1, 0, 5, 0, 2]]
    # a composed letter is its parts, as in Piper's training
    assert phonemes.to_ids("ã", ID_MAP) == [[1, 0, 4, 0, 14, 0, 2]]


@given(st.lists(st.text("abcdefg ,.", min_size=1).filter(str.strip), min_size=1, max_size=4))
def test_joined_ids_split_into_the_same_utterances(lines):
    utterances = phonemes.to_ids("\n".join(lines), ID_MAP)
    assert len(utterances) == len(lines)
    assert speech._split([i for ids in utterances for i in ids], end=2) == utterances


def test_text_without_the_extra_names_it(session, monkeypatch):
    monkeypatch.setitem(sys.modules, "gruut", None)
    with pytest.raises(DependencyError, match=r"pip install 'leangen\[speech\]'"):
        say(session, text="hello")


def test_text_is_pronounced_as_espeak_does():
    pytest.importorskip("gruut", reason="needs the `speech` extra")
    # what espeak-ng 1.51 prints for the same text, but for the words that it runs together
    assert phonemes.from_text("Rice is often served in round bowls.", "en-us") == (
        "ɹˈaɪs ɪz ˈɔfən sˈɜːvd ɪn ɹˈaʊnd bˈoʊlz."
    )
    two = phonemes.from_text("Hello, world! It is 3.", "en-us")
    assert two == "həlˈoʊ, wˈɜːld!\nɪɾ ɪz θɹˈiː."


@pytest.mark.parametrize(
    ("text", "voice", "message"),
    [("  ", "en-us", "nothing that can be spoken"), ("...", "en-us", "nothing that can be spoken"),
     ("Привет", "en-us", "no pronunciation for 'Привет'"), ("hello", "xx", "language 'xx'")],
)  # fmt: skip
def test_text_that_cannot_be_spoken(text, voice, message):
    pytest.importorskip("gruut", reason="needs the `speech` extra")
    with pytest.raises(RequestError, match=message):
        phonemes.from_text(text, voice)
