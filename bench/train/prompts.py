"""One voice's telephone prompts as mu-law levels, and what simple predictors make of them."""

from __future__ import annotations

import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from leangen.families.waveform import expand

PACKAGE = "asterisk-core-sounds-en-wav"
FOLDER = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
RATE_HZ, LEVELS = 8000, 256
CHIMES = (
    *("ascending-2tone", "descending-2tone", "beep", "beeperr"),
    *("confbridge-join", "confbridge-leave"),
)
HELD_OUT, UNJUDGED = 10, ("queue-seconds", "tt-monkeys")
"""Of the files by name, the last of every ten is held out. Nothing is judged by two of those: the
first is the recording of `seconds`, the second is monkeys."""
ORDER, BLOCK, WINDOW = 16, 64, 2048
"""Of the linear predictors; the samples for which one that adapts stands, and those it looks at."""
RESERVE = 1e-3
"""The share of probability that a predictor gives all levels alike: none is impossible."""

Array = np.ndarray[Any, Any]


def prompts(folder: Path) -> tuple[list[Array], list[Array]]:
    """Levels [n] of each file that has speech: to learn from, and held out (`HELD_OUT`)."""
    paths = [
        path
        for path in sorted(folder.rglob("*.wav"))
        if path.parent.name != "silence" and path.stem not in CHIMES
    ]
    if not paths:
        raise SystemExit(
            f"{folder} has no prompts: `apt-get install {PACKAGE}`, or unpack that package "
            "(`apt-get download`, `dpkg-deb -x`) and give its folder en_US_f_Allison with --data"
        )
    held_out = paths[HELD_OUT - 1 :: HELD_OUT]
    learnt = [path for path in paths if path not in held_out]
    judged = [path for path in held_out if path.stem not in UNJUDGED]
    return [_levels(path) for path in learnt], [_levels(path) for path in judged]


def _levels(path: Path) -> Array:
    with wave.open(str(path)) as file:
        form = (file.getframerate(), file.getnchannels(), file.getsampwidth())
        if form != (RATE_HZ, 1, 2):
            raise SystemExit(f"{path} has rate, channels, bytes {form}, expected (8000, 1, 2)")
        return compress(np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768)


def compress(sound: Array) -> Array:
    """Levels of samples in [-1, 1]: what `waveform.expand` undoes."""
    mu = LEVELS - 1
    companded = np.sign(sound) * np.log1p(mu * np.abs(sound)) / np.log1p(mu)
    return np.rint((companded + 1) / 2 * mu).astype(np.int64)


def per_sample(bits: Sequence[Array]) -> dict[str, float]:
    """The mean of all files' samples, and two standard errors of it, files being what is drawn."""
    sums = np.array([each.sum() for each in bits])
    counts = np.array([len(each) for each in bits])
    mean, files = sums.sum() / counts.sum(), len(bits)
    spread = np.sqrt(files / (files - 1) * np.square(sums - mean * counts).sum())
    return {"mean": round(float(mean), 4), "u": round(float(2 * spread / counts.sum()), 4)}


def histogram_bits(train: Sequence[Array], test: Sequence[Array]) -> list[Array]:
    """Bits of each sample, if levels are independent and as frequent as in `train`."""
    counts = 1 + np.bincount(np.concatenate(train), minlength=LEVELS)
    bits = -np.log2(counts / counts.sum())
    return [bits[levels] for levels in test]


def linear_bits(train: Sequence[Array], test: Sequence[Array]) -> list[Array]:
    """Bits under one linear predictor, whose residual has one Laplace distribution."""
    rows, targets = zip(*(_lags(expand(levels, LEVELS)) for levels in train), strict=True)
    rows, targets = np.concatenate(rows), np.concatenate(targets)
    weights = np.linalg.solve(rows.T @ rows, rows.T @ targets)
    scale = np.abs(targets - rows @ weights).mean()
    return [
        laplace_bits(levels, _lags(expand(levels, LEVELS))[0] @ weights, scale) for levels in test
    ]


def adaptive_bits(test: Sequence[Array], half_life: float) -> list[Array]:
    """Bits under a linear predictor that is fitted anew to the sound before every block.

    Autocorrelations of the last `WINDOW` samples, late ones weighing more; the Laplace scale is a
    mean of the residuals before, whose weights halve in `half_life` samples.
    """
    return [_adapted(levels, half_life) for levels in test]


def _adapted(levels: Array, half_life: float) -> Array:
    from scipy.linalg import solve_toeplitz

    rows, targets = _lags(expand(levels, LEVELS))
    means = np.zeros(len(targets))
    taper = np.sin(np.linspace(0, 0.9, WINDOW) * np.pi / 2) ** 2
    padded = np.concatenate([np.zeros(WINDOW), targets])
    for start in range(0, len(targets), BLOCK):
        seen = padded[start : start + WINDOW] * taper
        powers = np.array([seen[: WINDOW - lag] @ seen[lag:] for lag in range(ORDER + 1)])
        powers[0] = powers[0] * 1.0001 + 1e-7  # white noise, so that silence can be solved
        weights = solve_toeplitz(powers[:-1], powers[1:])
        means[start : start + BLOCK] = rows[start : start + BLOCK] @ weights
    scales, decay, scale = np.empty(len(targets)), 0.5 ** (1 / half_life), 1e-3
    for place, off in enumerate(np.abs(targets - means)):
        scales[place] = scale
        scale = decay * scale + (1 - decay) * off
    return laplace_bits(levels, means, scales + 1e-4)


def _lags(sound: Array) -> tuple[Array, Array]:
    """The `ORDER` samples before each, the last first [n, 16], and the samples [n]."""
    before = np.concatenate([np.zeros(ORDER), sound.astype(np.float64)])
    rows = np.lib.stride_tricks.sliding_window_view(before[:-1], ORDER)
    return rows[:, ::-1], before[ORDER:]


def laplace_bits(levels: Array, means: Array, scale: Array | float) -> Array:
    """Bits of levels, each an interval of a Laplace distribution about a predicted sample."""
    edges = expand(np.arange(LEVELS + 1) - 0.5, LEVELS).astype(np.float64)
    edges[0], edges[-1] = -np.inf, np.inf

    def below(edge: Array) -> Array:
        away = (edge - means) / scale
        return np.where(away < 0, np.exp(np.minimum(away, 0)), 2 - np.exp(-np.maximum(away, 0))) / 2

    chances = below(edges[levels + 1]) - below(edges[levels])
    return -np.log2(chances * (1 - RESERVE) + RESERVE / LEVELS)
