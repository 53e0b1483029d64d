"""Sound on disk, at another rate, and how far apart two sounds are."""

from __future__ import annotations

import io
import math
import wave
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from leangen.errors import RequestError

Array = np.ndarray[Any, Any]

WINDOW = 1024
"""Samples per frame of the spectrogram, Hann-windowed: 46 ms at 22,050 Hz."""
HOP = 256
BANDS = 80
LOWEST_HZ, HIGHEST_HZ = 4000, 192_000
FLOOR = 1e-5
"""Smallest mel magnitude that counts, as in HiFi-GAN's spectrogram: silence is no -inf dB."""


def wav_bytes(samples: Array, sample_rate_hz: int, notes: Mapping[str, str] | None = None) -> bytes:
    """A WAV file of mono 16-bit PCM; samples are floats in [-1, 1], what lies outside is clipped.

    notes: texts of its LIST-INFO chunk by their four-letter names, such as ISFT (software), ICMT.
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
    if not notes:
        return buffer.getvalue()
    listed = b"INFO" + b"".join(
        _chunk(name.encode(), text.encode() + b"\0") for name, text in notes.items()
    )
    body = buffer.getvalue()[8:] + _chunk(b"LIST", listed)
    return _chunk(b"RIFF", body)


def _chunk(name: bytes, content: bytes) -> bytes:
    """A RIFF chunk, padded to an even length that its size does not count."""
    return name + len(content).to_bytes(4, "little") + content + b"\0" * (len(content) % 2)


def read_wav(path: Path | BinaryIO) -> tuple[Array, int]:
    """The samples of a WAV file, or of an open one, as mono float32 in [-1, 1], and its rate in Hz.

    PCM of 8 to 32 bits; several channels are averaged. Raises RequestError for anything else.
    """
    name = path if isinstance(path, Path) else "the file"
    try:
        with wave.open(str(path) if isinstance(path, Path) else path, "rb") as file:
            channels, width = file.getnchannels(), file.getsampwidth()
            rate_hz, data = file.getframerate(), file.readframes(file.getnframes())
        if width > 4 or rate_hz < 1:
            raise wave.Error(f"{8 * width} bits a sample, {rate_hz} samples a second")
    except FileNotFoundError:
        raise RequestError(f"there is no {path}: give the path of a WAV file") from None
    except (OSError, EOFError, RuntimeError, wave.Error) as error:  # RuntimeError: a chunk's length
        raise RequestError(
            f"cannot read {name} as PCM WAV ({str(error) or 'cut or damaged'}): convert it, for "
            "example with `ffmpeg -i FILE -ac 1 -ar 16000 -c:a pcm_s16le out.wav`"
        ) from error
    data = data[: len(data) // (channels * width) * channels * width]  # a cut file ends anywhere
    if width == 1:  # unsigned, by the format
        whole = np.frombuffer(data, np.uint8).astype(np.int32) - 128
    elif width == 3:
        parts = np.frombuffer(data, np.uint8).reshape(-1, 3)
        whole = np.pad(parts, ((0, 0), (1, 0))).view("<i4")[:, 0] >> 8
    else:
        whole = np.frombuffer(data, f"<i{width}")
    samples = whole.reshape(-1, channels).mean(axis=1) / 2.0 ** (8 * width - 1)
    return np.asarray(samples, np.float32), rate_hz


_ZEROS = 16  # of the filter's sinc to each side, at the lower of both rates
_BETA = 8.0  # of its Kaiser window: 80 dB
_BLOCK = 1 << 14  # outputs at once: bounds the memory


def resample(samples: Array, from_hz: int, to_hz: int) -> Array:
    """Sound at another rate, by a polyphase filter (a Kaiser-windowed sinc): float32.

    Each output is a sum over the samples near its time, weighted by the filter's phase there; what
    lies above half the lower rate is taken out. Raises RequestError for a rate that no sound has: a
    small file would become hours, or the filter fill the memory.
    """
    if not LOWEST_HZ <= from_hz <= HIGHEST_HZ:
        raise RequestError(
            f"the sound has {from_hz} samples a second, expected {LOWEST_HZ} to {HIGHEST_HZ}"
        )
    samples = np.asarray(samples, np.float32).reshape(-1)
    if from_hz == to_hz or not samples.size:
        return samples
    shared = math.gcd(from_hz, to_hz)
    up, down = to_hz // shared, from_hz // shared
    slower = max(up, down)
    half = -(-_ZEROS * slower // up)  # samples to each side that a filter reaches
    offsets = np.arange(-half, half + 2)
    times = np.arange(up)[:, None] / up - offsets  # of the output after a sample, by phase
    width = _ZEROS * slower / up
    window = np.i0(_BETA * np.sqrt(np.clip(1 - (times / width) ** 2, 0, None))) / np.i0(_BETA)
    taps = np.sinc(times * up / slower) * np.where(np.abs(times) <= width, window, 0)
    taps = (taps / taps.sum(axis=1, keepdims=True)).astype(np.float32)  # a constant stays so
    padded = np.pad(samples, (half, half + 1))
    near = np.lib.stride_tricks.sliding_window_view(padded, len(offsets))
    out = np.empty(-(-len(samples) * up // down), np.float32)
    for begin in range(0, len(out), _BLOCK):
        at = np.arange(begin, min(begin + _BLOCK, len(out)), dtype=np.int64) * down
        out[begin : begin + len(at)] = np.einsum("nt,nt->n", near[at // up], taps[at % up])
    return out


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
