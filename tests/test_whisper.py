"""Whisper: its sound against transformers' and SciPy's, its file format, long sound, bad input."""

from __future__ import annotations

import json
import wave

import draws
import numpy as np
import pytest
import real_models
import seq2seq_fixtures
from seq2seq_fixtures import VOCAB

from leangen import audio
from leangen.cli import main
from leangen.errors import RequestError, SourceError, UnsupportedError
from leangen.exporters import ctranslate2
from leangen.families import transcription, whisper_mel
from leangen.quality import speech, words
from leangen.session import Session


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    path = seq2seq_fixtures.ctranslate2(folder / "saved")
    return Session(ctranslate2.export(path.parent, folder / "bundle"), threads=1)


def noise(seconds, seed=0):
    return (np.random.default_rng(seed).standard_normal(int(16_000 * seconds)) / 10).astype("f4")


def run(session, **options):
    steps, generator = [], transcription.run(session, transcription.Request(**options))
    while True:
        try:
            steps.append(next(generator))
        except StopIteration as stop:
            return steps, stop.value


@pytest.mark.parametrize("bands", [80, 128])
def test_the_picture_of_sound_is_transformers(bands):
    transformers = pytest.importorskip("transformers", reason="the export extra is not installed")
    theirs = transformers.WhisperFeatureExtractor(feature_size=bands)
    np.testing.assert_allclose(whisper_mel.mel_filters(bands).T, theirs.mel_filters, atol=1e-9)
    sound = noise(30) * np.linspace(0, 3, 480_000, dtype=np.float32) ** 4
    expected = theirs._np_extract_fbank_features(sound[None], "cpu")[0]
    np.testing.assert_allclose(whisper_mel.log_mel(sound, bands), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("from_hz", "to_hz"), [(22_050, 16_000), (44_100, 16_000), (8_000, 16_000), (48_000, 44_100)]
)
def test_resampling_keeps_tones_and_takes_out_what_does_not_fit(from_hz, to_hz):
    times = np.arange(from_hz // 2) / from_hz
    wanted = np.arange(-(-len(times) * to_hz // from_hz)) / to_hz
    for hz in (100.0, 0.35 * min(from_hz, to_hz)):
        got = audio.resample(np.sin(2 * np.pi * hz * times), from_hz, to_hz)
        assert got.shape == wanted.shape
        middle = slice(len(got) // 8, -len(got) // 8)  # before and after the sound is silence
        np.testing.assert_allclose(got[middle], np.sin(2 * np.pi * hz * wanted)[middle], atol=3e-4)
    if to_hz < 0.8 * from_hz:
        high = np.sin(2 * np.pi * 0.62 * to_hz * times)
        assert np.abs(audio.resample(high, from_hz, to_hz)[200:-200]).max() < 1e-3


def test_resampling_is_close_to_scipys():
    signal = pytest.importorskip("scipy.signal")
    rng = draws.rng()
    sound = np.convolve(rng.standard_normal(6000), np.hanning(24), "same").astype(np.float32) / 8
    expected = signal.resample_poly(sound, 320, 441)
    got = audio.resample(sound, 22_050, 16_000)
    assert got.shape == expected.shape
    assert np.abs(got - expected)[100:-100].max() < 2e-3 * np.abs(expected).max()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_wav_of_every_width_is_read(tmp_path, width, channels):
    values = np.random.default_rng(0).uniform(-0.9, 0.9, (50, channels))
    codes = np.round(values * 2 ** (8 * width - 1)).astype(np.int64)
    stored = codes + 128 if width == 1 else codes  # 8-bit WAV is unsigned
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(8_000)
        bytes_of = [int(v).to_bytes(width, "little", signed=width > 1) for v in stored.ravel()]
        file.writeframes(b"".join(bytes_of))
    samples, rate_hz = audio.read_wav(path)
    assert rate_hz == 8_000
    np.testing.assert_allclose(samples, codes.mean(axis=1) / 2 ** (8 * width - 1), atol=1e-7)


def test_what_is_no_wav_is_refused(tmp_path, session):
    path = tmp_path / "a.wav"
    with pytest.raises(RequestError, match="there is no"):
        audio.read_wav(path)
    path.write_bytes(b"ID3 not a wav at all")
    with pytest.raises(RequestError, match="cannot read .* as PCM WAV .*ffmpeg"):
        run(session, audio=path)


@pytest.mark.parametrize("at", range(44))
def test_a_wav_with_any_byte_of_its_head_changed_is_read_or_refused(tmp_path, at):
    whole = audio.wav_bytes(np.linspace(-1, 1, 50), 8_000)
    for byte in (0, 1, 12, 127, 255):
        (tmp_path / "a.wav").write_bytes(whole[:at] + bytes([byte]) + whole[at + 1 :])
        try:
            samples, rate_hz = audio.read_wav(tmp_path / "a.wav")
        except RequestError:
            continue
        assert rate_hz > 0 and np.abs(samples).max(initial=0) <= 1


def test_long_sound_is_cut_where_it_is_quiet_and_all_of_it_is_heard(session):
    window = session.bundle.config["window_samples"]
    sound, quiet = noise(5), window - window // 12
    sound[quiet : quiet + 640] = 0
    pieces = list(transcription.cut(sound, window))
    assert quiet <= len(pieces[0]) <= quiet + 640
    assert all(len(piece) <= window for piece in pieces)
    np.testing.assert_array_equal(np.concatenate(pieces), sound)
    steps, output = run(session, audio=sound, max_new_tokens=5)
    assert sum(step.units for step in steps) == pytest.approx(5.0)
    assert sum(step.kind == "encode" for step in steps) == len(pieces)
    assert "".join(step.text for step in steps) == output.text
    begins = np.cumsum([0, *(len(piece) for piece in pieces[:-1])]) / 16_000
    assert [begin for begin, _ in output.extra["windows"]] == pytest.approx(begins)


def test_no_times_and_no_suppressed_tokens(session):
    for seed in range(3):
        options = {"max_new_tokens": 30, "temperature": 3.0, "seed": seed}
        _, output = run(session, audio=noise(1, seed), **options)
        assert not set(output.tokens) & {7, 9, *range(81, VOCAB)}
        assert output.tokens[0] not in (2, 11)
    alike = [run(session, audio=noise(1), temperature=1.0, seed=5)[1].tokens for _ in range(2)]
    assert alike[0] == alike[1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"language": "de"}, "language is 'de', expected one that"),
        ({"task": "translate"}, "does not translate: expected task transcribe"),
        ({"task": "sing"}, "task is 'sing', expected transcribe or translate"),
        ({"audio": []}, "the audio has shape"),
        ({"audio": [[0.1, 0.2]]}, "the audio has shape"),
        ({"audio": [float("nan")]}, "finite samples"),
        ({"sample_rate_hz": 0}, "sample_rate_hz is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"temperature": -1}, "temperature is -1"),
        ({"beams": 0}, "beams is 0"),
        ({"beams": 3, "temperature": 1.0}, "beam search takes no temperature"),
    ],
)
def test_bad_requests(session, options, told):
    with pytest.raises(RequestError, match=told):
        run(session, **{"audio": [0.1] * 100, **options})


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda t: t.pop("decoder/layer_1/ffn/linear_1/weight"), SourceError, "is missing"),
        (lambda t: t.pop("encoder/conv1/weight"), UnsupportedError, "takes Whisper"),
        (
            lambda t: t.update({"encoder/conv2/weight": np.ones((64, 64, 3), np.int8)}),
            UnsupportedError,
            "int8 weights .*float16 or float32",
        ),
        (
            lambda t: t.update({"decoder/layer_norm/gamma": np.ones(65)}),
            SourceError,
            r"is \[65\], expected \[64\]",
        ),
    ],
)
def test_files_that_do_not_fit(tmp_path, change, error, told):
    path = seq2seq_fixtures.ctranslate2(tmp_path / "saved", change)
    with pytest.raises(error, match=told):
        ctranslate2.export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_cut_files_and_other_tokenizers(tmp_path):
    path = seq2seq_fixtures.ctranslate2(tmp_path / "saved")
    assert ctranslate2.accepts(path)
    assert ctranslate2.accepts(path.parent)
    whole = path.read_bytes()
    for length in (3, 40, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(SourceError, match="not a whole CTranslate2 model"):
            ctranslate2.export(path, tmp_path / "out")
    path.write_bytes(whole)
    tokenizer = path.with_name("tokenizer.json")
    known = json.loads(tokenizer.read_text())
    known["model"]["vocab"]["other"] = known["model"]["vocab"].pop("<|notimestamps|>")
    tokenizer.write_text(json.dumps(known))
    with pytest.raises(SourceError, match=r"lacks <\|notimestamps\|>"):
        ctranslate2.export(path, tmp_path / "out")
    tokenizer.unlink()
    with pytest.raises(SourceError, match=r"no tokenizer\.json"):
        ctranslate2.export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_published_model_understands_the_example(capsys):
    real_models.source("whisper-tiny-en")
    said = "the quick brown fox jumps over the lazy dog".split()
    for scheme in ("fp32", "int8", "int4"):
        bundle = real_models.store().resolve(f"whisper-tiny-en:{scheme}")
        example = transcription.EXAMPLE["audio"]
        assert main(["generate", str(bundle.path), "--audio", example]) == 0
        assert words.words(capsys.readouterr().out) == said


@pytest.mark.slow
def test_a_voice_is_understood():
    for name in ("whisper-tiny-en", "piper-joe"):
        real_models.source(name)
    voice = Session(real_models.store().resolve("piper-joe"), kernels="ort")
    wrong, said = np.sum(
        speech._heard(voice, real_models.store().resolve("whisper-tiny-en").path), axis=0
    )
    assert said == 84
    assert wrong <= 12  # greedy 13, as transformers; faster-whisper with five beams 8
