"""Quality of speech against its reference: the same noise, in the reference's rhythm.

With the reference's phoneme durations the waveforms line up sample for sample, so spectra can be
compared frame by frame. The word error rate, which needs a recogniser, is of each model's own
rhythm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leangen import audio
from leangen.families import finished, speech
from leangen.quality import words
from leangen.quality.measures import Array, Measure, Task, mean
from leangen.records import Output
from leangen.session import Session

CEPSTRA = 13
"""Mel-cepstral coefficients that count, without the zeroth (loudness)."""


@dataclass(frozen=True, slots=True)
class Spoken:
    """What one voice said."""

    outputs: list[Output]
    heard: list[tuple[int, int]]
    """Per sentence: words wrong, words said; empty without a recogniser."""


def observe(session: Session, task: Task, reference: Spoken | None) -> Spoken:
    """The example sentence once per seed, and with a recogniser the ten test sentences."""
    said = speech.EXAMPLE["phonemes"]
    outputs = [
        _speak(
            session,
            phonemes=said,
            seed=seed,
            durations=None if reference is None else reference.outputs[seed].extra["durations"],
        )
        for seed in range(task.seeds)
    ]
    return Spoken(outputs, [] if task.recogniser is None else _heard(session, task.recogniser))


def measure(reference: Spoken, candidate: Spoken) -> list[Measure]:
    """Log-mel distance first; mel-cepstral distortion; word error rates of both if heard."""
    pairs = [
        (a.array, b.array, int(a.sample_rate_hz or 0))
        for a, b in zip(reference.outputs, candidate.outputs, strict=True)
    ]
    return [
        mean("log-mel distance", [audio.log_mel_distance(*pair) for pair in pairs], "seeds", "dB"),
        mean("mel-cepstral distance", [cepstral_distance(*pair) for pair in pairs], "seeds", "dB"),
        *_word_error_rate("word error rate", candidate.heard),
        *_word_error_rate("reference word error rate", reference.heard),
    ]


def cepstral_distance(a: Array, b: Array, sample_rate_hz: int) -> float:
    """Mel-cepstral distortion in dB (Kubichek, 1993), of aligned sounds, mean over frames.

    Coefficients 1 to 13 of log|H| = sum c_m cos(m w) over the mel bands:
    10 / ln 10 sqrt(2 sum (difference of c_m)^2). Raises RequestError for sounds of two lengths.
    """
    audio.check_aligned(a, b)
    decibels = audio.log_mel(a, sample_rate_hz) - audio.log_mel(b, sample_rate_hz)
    bands = decibels.shape[1]
    m = np.arange(1, CEPSTRA + 1)
    cosines = np.cos(np.pi * m[:, None] * (np.arange(bands) + 0.5) / bands)
    difference = decibels * (np.log(10) / 20) @ cosines.T * (2 / bands)
    per_frame = 10 / np.log(10) * np.sqrt(2 * (difference**2).sum(axis=1))
    return float(per_frame.mean())


def _heard(session: Session, recogniser: Path) -> list[tuple[int, int]]:
    hear = words.recogniser(recogniser)
    counts = []
    for text, ipa in words.SENTENCES:
        output = _speak(session, phonemes=ipa, seed=0)
        heard = hear(np.asarray(output.array), int(output.sample_rate_hz or 0))
        said = words.words(text)
        counts.append((words.errors(said, words.words(heard)), len(said)))
    return counts


def _word_error_rate(name: str, heard: Sequence[tuple[int, int]]) -> list[Measure]:
    """Errors over words; the spread is that of the sentences (ratio of means)."""
    if not heard:
        return []
    wrong, said = np.array(heard, np.float64).T
    rate = wrong.sum() / said.sum()
    n = len(heard)
    u = 2 * np.sqrt(((wrong - rate * said) ** 2).sum() / (n - 1) / n) / said.mean()
    return [Measure(name, float(100 * rate), float(100 * u), n, "sentences", "%")]


def _speak(session: Session, **options: Any) -> Output:
    return finished(speech.run(session, speech.Request(**options)))
