"""Sound on disk, and how far apart two sounds are."""

from __future__ import annotations

import io
import wave
from pathlib import Path
from typing import Any

import numpy as np

from leangen.errors import RequestError
from leangen.files import write_atomic

Array = np.ndarray[Any, Any]

WINDOW = 1024
"""Samples per frame of the spectrogram, Hann-windowed: 46 ms at 22,050 Hz."""
HOP = 256
BANDS = 80
FLOOR = 1e-5
"""Smallest mel magnitude that counts, as in HiFi-GAN's spectrogram: silence is no -inf dB."""


def write_wav(path: Path, samples: Array, sample_rate_hz: int) -> None:
    """Write `wav_bytes` to a file; raises what it raises, and StorageError for the disk."""
    write_atomic(path, wav_bytes(samples, sample_rate_hz))


def wav_bytes(samples: Array, sample_rate_hz: int) -> bytes:
    """A WAV file of mono 16-bit PCM; samples are floats in [-1, 1], what lies outside is clipped.

    Raises RequestError for samples that are not finite.
    """
    samples = np.asarray(samples, np.float32).reshape(-1)
    if not np.isfinite(samples).all():
        raise RequestError(
            "the audio holds values that are not finite: "
            "generate it again in fp32 to see whether the scheme is at fault"
        )
    pcm = np.round(np.clip(samples, -1, 1) * 32767).astype("<i2")
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate_hz)
        file.writeframes(pcm.tobytes())
    return buffer.getvalue()


def mel_filters(sample_rate_hz: int, window: int = WINDOW, bands: int = BANDS) -> Array:
    """Triangular filters [bands, window // 2 + 1], evenly spaced in mel from 0 Hz to Nyquist.

    mel = 2595 log10(1 + f / 700) (O'Shaughnessy); peaks are 1.
    """
    top_mel = 2595 * np.log10(1 + sample_rate_hz / 2 / 700)
    edges_hz = 700 * (10 ** (np.linspace(0, top_mel, bands + 2) / 2595) - 1)
    bins_hz = np.fft.rfftfreq(window, 1 / sample_rate_hz)
    low, peak, high = edges_hz[:-2, None], edges_hz[1:-1, None], edges_hz[2:, None]
    rising = (bins_hz - low) / (peak - low)
    falling = (high - bins_hz) / (high - peak)
    return np.maximum(0, np.minimum(rising, falling))


def log_mel(samples: Array, sample_rate_hz: int) -> Array:
    """Mel spectrogram in dB, [frames, BANDS]: Hann frames every HOP samples, magnitude, filters.

    Sound shorter than one frame is padded with silence.
    """
    samples = np.asarray(samples, np.float64).reshape(-1)
    samples = np.pad(samples, (0, max(0, WINDOW - samples.size)))
    frames = np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    spectrum = np.abs(np.fft.rfft(frames * hann, axis=1))
    mel = spectrum @ mel_filters(sample_rate_hz).T
    decibels: Array = 20 * np.log10(np.maximum(mel, FLOOR))
    return decibels


def log_mel_distance(a: Array, b: Array, sample_rate_hz: int) -> float:
    """Root mean square difference of two log-mel spectrograms in dB, over all frames and bands.

    The sounds must be aligned, sample for sample: the same durations and the same noise. Raises
    RequestError when their lengths differ.
    """
    check_aligned(a, b)
    difference = log_mel(a, sample_rate_hz) - log_mel(b, sample_rate_hz)
    return float(np.sqrt(np.mean(difference**2)))


def check_aligned(a: Array, b: Array) -> None:
    """RequestError unless two sounds have the same number of samples."""
    if np.size(a) != np.size(b):
        raise RequestError(
            f"cannot compare sounds of {np.size(a)} and {np.size(b)} samples: "
            "generate both with the same `durations`"
        )
