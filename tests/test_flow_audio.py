"""Sound files, and the log-mel distance against SciPy's STFT and a textbook filterbank."""

import wave

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leangen import audio
from leangen.errors import RequestError

RATE_HZ = 22_050


def tone(hz, seconds=0.5):
    return np.sin(2 * np.pi * hz * np.arange(int(seconds * RATE_HZ)) / RATE_HZ)


def reference_log_mel(x):
    """The same definition by SciPy's STFT and filters drawn one bin at a time."""
    signal = pytest.importorskip("scipy.signal")
    _, _, z = signal.stft(
        x, RATE_HZ, "hann", nperseg=1024, noverlap=768, boundary=None, padded=False,
        scaling="spectrum",
    )  # fmt: skip
    magnitude = np.abs(z) * 512  # SciPy divides by the window's sum

    def mel(hz):
        return 2595 * np.log10(1 + hz / 700)

    edges = np.linspace(0, mel(RATE_HZ / 2), 82)
    out = np.zeros((80, z.shape[1]))
    for band in range(80):
        low, peak, high = (700 * (10 ** (e / 2595) - 1) for e in edges[band : band + 3])
        for k in range(513):
            hz = k * RATE_HZ / 1024
            if low < hz <= peak:
                out[band] += magnitude[k] * (hz - low) / (peak - low)
            elif peak < hz < high:
                out[band] += magnitude[k] * (high - hz) / (high - peak)
    return 20 * np.log10(np.maximum(out, 1e-5)).T


def test_log_mel_is_that_of_scipy():
    x = tone(440) + 0.3 * np.random.default_rng(0).standard_normal(RATE_HZ // 2)
    np.testing.assert_allclose(audio.log_mel(x, RATE_HZ), reference_log_mel(x), atol=1e-6)


def test_filters_peak_at_their_band():
    loudest = [audio.log_mel(tone(hz), RATE_HZ).mean(axis=0).argmax() for hz in (200, 800, 3200)]
    assert loudest == sorted(loudest)
    assert len(set(loudest)) == 3


@given(st.floats(0.01, 50))
def test_gain_is_its_decibels(gain):
    x = np.random.default_rng(1).standard_normal(4096)
    distance = audio.log_mel_distance(x, gain * x, RATE_HZ)
    assert distance == pytest.approx(abs(20 * np.log10(gain)), abs=1e-6)


def test_distance_is_zero_symmetric_and_finite():
    x, y = tone(300), tone(310)
    assert audio.log_mel_distance(x, x, RATE_HZ) == 0
    assert audio.log_mel_distance(x, y, RATE_HZ) == audio.log_mel_distance(y, x, RATE_HZ) > 0
    assert np.isfinite(audio.log_mel_distance(np.zeros(2000), x[:2000], RATE_HZ))
    assert np.isfinite(audio.log_mel_distance(np.zeros(3), np.ones(3), RATE_HZ))
    with pytest.raises(RequestError, match="2 and 3 samples: generate both with the same"):
        audio.log_mel_distance(x[:2], x[:3], RATE_HZ)


def test_wav_round_trip_and_clipping(tmp_path):
    path = tmp_path / "a.wav"
    x = np.array([0, 0.5, -0.5, 1, -1, 7, -7], np.float32)
    path.write_bytes(audio.wav_bytes(x, 16_000))
    with wave.open(str(path)) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 16_000)
        pcm = np.frombuffer(file.readframes(99), "<i2")
    np.testing.assert_allclose(pcm / 32767, np.clip(x, -1, 1), atol=1 / 32767)


def test_a_broken_sound_is_refused():
    with pytest.raises(RequestError, match="not finite"):
        audio.wav_bytes(np.array([0.0, np.nan]), 16_000)
