"""Word error rate of speech through a Whisper model: is it still understood?

Ten fixed sentences with their phonemes, so that no text has to be pronounced first. The recogniser
is faster-whisper over a CTranslate2 folder, such as the catalog's data `whisper-tiny.en`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from leangen.errors import DependencyError, SourceError

Array = np.ndarray[Any, Any]
Hear = Callable[[Array], str]

SENTENCES = (
    (
        "The quick brown fox jumps over the lazy dog.",
        "ðə kwˈɪk bɹˈaʊn fˈɑːks dʒˈʌmps ˌoʊvɚ ðə lˈeɪzi dˈɑːɡ.",
    ),
    (
        "Speech is made one small step at a time.",
        "spˈiːtʃ ɪz mˌeɪd wˈʌn smˈɔːl stˈɛp æɾə tˈaɪm.",
    ),
    (
        "Every answer comes with the energy that it cost.",
        "ˈɛvɹi ˈænsɚ kˈʌmz wɪððɪ ˈɛnɚdʒi ðˌɐɾɪt kˈɔst.",
    ),
    (
        "The birch canoe slid on the smooth planks.",
        "ðə bˈɜːtʃ kənˈuː slˈɪd ɔnðə smˈuːð plˈæŋks.",
    ),
    (
        "Glue the sheet to the dark blue background.",
        "ɡlˈuː ðə ʃˈiːt tə ðə dˈɑːɹk blˈuː bˈækɡɹaʊnd.",
    ),
    (
        "It is easy to tell the depth of a well.",
        "ɪɾ ɪz ˈiːzi tə tˈɛl ðə dˈɛpθ əvə wˈɛl.",
    ),
    (
        "These days a chicken leg is a rare dish.",
        "ðiːz dˈeɪz ɐ tʃˈɪkɪn lˈɛɡ ɪz ɐ ɹˈɛɹ dˈɪʃ.",
    ),
    (
        "Rice is often served in round bowls.",
        "ɹˈaɪs ɪz ˈɔfən sˈɜːvd ɪn ɹˈaʊnd bˈoʊlz.",
    ),
    (
        "The box was thrown beside the parked truck.",
        "ðə bˈɑːks wʌz θɹˈoʊn bᵻsˌaɪd ðə pˈɑːɹkt tɹˈʌk.",
    ),
    (
        "Four hours of steady work faced us.",
        "fˈoːɹ ˈaʊɚz ʌv stˈɛdi wˈɜːk fˈeɪsd ˌʌs.",
    ),
)
"""Text and IPA; the last seven are from the Harvard sentences (IEEE, 1969)."""

WHISPER_RATE_HZ = 16_000


def words(text: str) -> list[str]:
    """Lower-case words without punctuation.

    >>> words("Don't panic, it's 4.")
    ["don't", 'panic', "it's", '4']
    """
    kept = "".join(c if c.isalnum() or c == "'" else " " for c in text.lower())
    return kept.split()


def errors(said: Sequence[str], heard: Sequence[str]) -> int:
    """Word edit distance (Levenshtein): substitutions, insertions and deletions.

    >>> errors("a rare dish".split(), "a red fish dish".split())
    2
    """
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            diagonal, row[j] = (
                row[j],
                min(row[j] + 1, row[j - 1] + 1, diagonal + (word != other)),
            )
    return row[-1]


def resample(samples: Array, rate_hz: int) -> Array:
    """To 16 kHz for Whisper, by cutting the spectrum off at 8 kHz."""
    count = round(len(samples) * WHISPER_RATE_HZ / rate_hz)
    spectrum = np.fft.rfft(samples)[: count // 2 + 1]
    return np.asarray(np.fft.irfft(spectrum, count) * (count / len(samples)), np.float32)


@cache
def whisper(folder: Path) -> Hear:
    """A function that transcribes 16 kHz samples with the CTranslate2 model in `folder`.

    Raises DependencyError without faster-whisper, SourceError for a folder without a model.
    """
    try:
        from faster_whisper import WhisperModel
    except ModuleNotFoundError as error:
        if error.name != "faster_whisper":
            raise
        raise DependencyError(
            "word error rates need a recogniser: pip install faster-whisper"
        ) from None
    if not (folder / "model.bin").is_file():
        raise SourceError(f"{folder} has no model.bin: expected a CTranslate2 Whisper model")
    model = WhisperModel(str(folder), device="cpu", compute_type="float32")

    def hear(samples: Array) -> str:
        segments, _ = model.transcribe(samples, language="en", beam_size=5, temperature=0.0)
        return " ".join(segment.text for segment in segments)

    return hear
