"""Word error rate of speech through a model that transcribes: is it still understood?

Ten fixed sentences with their phonemes, so that no text has to be pronounced first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from leangen.bundle import open_bundle
from leangen.errors import RequestError
from leangen.families import key, transcription
from leangen.session import Session

Array = np.ndarray[Any, Any]
BEAMS = 5
"""As faster-whisper and OpenAI's own transcribe by default."""
Hear = Callable[[Array, int], str]
"""What was said in samples at a rate in Hz."""

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


@cache
def recogniser(path: Path) -> Hear:
    """A function that transcribes English with the bundle at `path`, searching with `BEAMS`.

    Raises RequestError for a bundle that does not transcribe.
    """
    session = Session(open_bundle(path))
    if key(session.bundle) != "seq2seq/transcription":
        raise RequestError(
            f"{session.bundle.name} is {key(session.bundle)}, expected a model that transcribes, "
            "such as whisper-tiny-en"
        )

    def hear(samples: Array, rate_hz: int) -> str:
        request = transcription.Request(
            audio=samples, sample_rate_hz=rate_hz, language="en", beams=BEAMS
        )
        return "".join(step.text for step in transcription.run(session, request))

    return hear
