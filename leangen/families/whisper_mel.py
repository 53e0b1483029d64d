"""Whisper's picture of sound: log-mel energies of 10 ms frames (Radford et al., 2212.04356)."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

RATE_HZ = 16_000
WINDOW = 400
"""Samples of a frame, Hann-windowed."""
HOP = 160
_FLOOR = 1e-10
_RANGE = 8.0  # decades below the loudest that still show


def log_mel(samples: Array, bands: int) -> Array:
    """Sound at 16 kHz as float32 [bands, samples / 160], about -1 to 1.

    What the loudest energy leaves more than 8 decades below is cut off, so silence at the end of a
    window is not the same for every window.
    """
    half = WINDOW // 2
    padded = np.pad(np.asarray(samples, np.float64), half, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[:-1:HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    power = np.abs(np.fft.rfft(frames * hann, axis=1)) ** 2
    decades = np.log10(np.maximum(power @ mel_filters(bands).T, _FLOOR))
    decades = np.maximum(decades, decades.max() - _RANGE)
    return np.ascontiguousarray((decades.T + 4) / 4, np.float32)


@cache
def mel_filters(bands: int) -> Array:
    """Triangles [bands, WINDOW // 2 + 1] on Slaney's mel scale, each of area 1 in Hz.

    Linear below 1 kHz (200 / 3 Hz a mel), logarithmic above (27 mels to a factor of 6.4), as in
    Slaney's Auditory Toolbox (1998).
    """
    top = _mel(RATE_HZ / 2)
    edges = _hertz(np.linspace(0, top, bands + 2))
    bins = np.fft.rfftfreq(WINDOW, 1 / RATE_HZ)
    low, peak, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    triangles = np.minimum((bins - low) / (peak - low), (high - bins) / (high - peak))
    filters: Array = np.maximum(0, triangles) * (2 / (high - low))
    return filters


_BREAK_HZ, _BREAK_MEL, _STEP = 1000.0, 15.0, np.log(6.4) / 27


def _mel(hertz: float) -> float:
    """Of a frequency above 1 kHz."""
    return float(_BREAK_MEL + np.log(hertz / _BREAK_HZ) / _STEP)


def _hertz(mel: Array) -> Array:
    return np.where(mel < _BREAK_MEL, mel * 200 / 3, _BREAK_HZ * np.exp(_STEP * (mel - _BREAK_MEL)))
