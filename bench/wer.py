"""Word error rate of speech bundles through a model that transcribes: are they still understood?

    python bench/wer.py piper-joe piper-joe:int8 --recogniser whisper-tiny-en

Speaks ten fixed sentences (IPA from espeak-ng 1.51, so no `speech` extra is needed), transcribes
them and counts word substitutions, insertions and deletions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from leangen.bundle import Bundle
from leangen.console import say
from leangen.errors import LeangenError
from leangen.families import speech
from leangen.quality.words import SENTENCES, Hear, errors, recogniser, words
from leangen.session import Session
from leangen.store import Store


def speak(session: Session, ipa: str, seed: int) -> np.ndarray[Any, Any]:
    """The waveform of one sentence, [samples]."""
    steps = speech.run(session, speech.Request(phonemes=ipa, seed=seed))
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return np.asarray(stop.value.array)


def measure(bundle: Bundle, hear: Hear, seeds: int) -> dict[str, Any]:
    """Errors and words over all sentences and seeds, with each transcript that differs."""
    session = Session(bundle)
    rate_hz = int(bundle.config["sample_rate_hz"])
    wrong, total, misheard = 0, 0, []
    for text, ipa in SENTENCES:
        for seed in range(seeds):
            heard = hear(speak(session, ipa, seed), rate_hz)
            count = errors(words(text), words(heard))
            wrong, total = wrong + count, total + len(words(text))
            if count:
                misheard.append({"said": text, "heard": heard, "errors": count})
    return {
        "bundle": f"{bundle.name}:{bundle.scheme}",
        "errors": wrong,
        "words": total,
        "word_error_rate": wrong / total,
        "misheard": misheard,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line per bundle, or one JSON list with --json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--recogniser", default="whisper-tiny-en", metavar="MODEL")
    parser.add_argument("--seeds", type=int, default=1, help="how often each sentence is spoken")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    store = Store()
    try:
        hear = recogniser(store.resolve(options.recogniser, notify=say).path)
        bundles = [store.resolve(name, notify=say) for name in options.models]
        results = [measure(bundle, hear, options.seeds) for bundle in bundles]
    except LeangenError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(results, indent=1))
        return 0
    for result in results:
        print(
            f"{result['bundle']}: {result['errors']} of {result['words']} words wrong, "
            f"{result['word_error_rate']:.1%}"
        )
        for case in result["misheard"]:
            print(f"  said  {case['said']}\n  heard {case['heard']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
