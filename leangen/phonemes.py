"""Text to IPA, and IPA to the ids of a Piper voice.

Piper's English voices were trained on espeak-ng's phonemes. gruut (MIT, the `speech` extra) brings
a lexicon and a model for unknown words in that same notation, without espeak-ng's GPL code.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from leangen.errors import RequestError, needs

PAD, START, END = "_^$"
"""Piper's marks: between phonemes, and around an utterance."""

PAUSES = tuple(",;:.!?")
"""Punctuation that the voices were trained on."""

DEMO_IPA = "ˈɛvɹi ˈænsɚ kˈʌmz wɪððɪ ˈɛnɚdʒi ðˌɐɾɪt kˈɔst."
"""Every answer comes with the energy that it cost.

As espeak-ng 1.51 says it (en-us): the demo speaks it without any extra.
"""


def from_text(text: str, voice: str) -> str:
    """IPA of `text` as a voice such as `en-us` says it, one sentence a line.

    Raises DependencyError without the `speech` extra, RequestError for a language that gruut has
    no data for and for text that has nothing to say.
    """
    message = (
        "speaking text needs the `speech` extra: pip install 'leangen[speech]'; "
        "`phonemes` (IPA) and `phoneme_ids` work without it"
    )
    with needs("gruut", message=message):
        import gruut
    language = next(
        (name for name in (voice, voice.split("-")[0]) if gruut.is_language_supported(name)), None
    )
    if language is None:
        raise RequestError(
            f"no pronunciation data for the voice's language {voice!r} (there is "
            f"{', '.join(sorted(gruut.get_supported_languages()))}): give `phonemes` instead"
        )
    lines = [_line(sentence) for sentence in gruut.sentences(text, lang=language, espeak=True)]
    spoken = [line for line in lines if line.strip("".join(PAUSES))]
    if not spoken:
        raise RequestError("the text has nothing that can be spoken: expected words")
    return "\n".join(spoken)


def _line(sentence: Iterable[Any]) -> str:
    """IPA words with spaces between, each pause mark right after its word."""
    line = ""
    for word in sentence:
        if word.is_spoken:
            if not word.phonemes:
                raise RequestError(
                    f"no pronunciation for {word.text!r}: spell it in the voice's language, or "
                    "give `phonemes`"
                )
            line += " " * bool(line) + "".join(word.phonemes)
        elif word.text in PAUSES:
            line += word.text
    return line


def to_ids(ipa: str, id_map: Mapping[str, Sequence[int]]) -> list[list[int]]:
    """Phoneme ids for each line of `ipa`, as Piper lays them out: ^ _ p _ p _ ... $.

    Raises RequestError for a character that the voice does not know.
    """
    return [_utterance(line, id_map) for line in ipa.splitlines() if line.strip()]


def _utterance(line: str, id_map: Mapping[str, Sequence[int]]) -> list[int]:
    # Piper trains on decomposed code points: a nasal vowel is the vowel, then the tilde.
    symbols = unicodedata.normalize("NFD", line.strip())
    unknown = sorted({s for s in symbols if s not in id_map or s in (PAD, START, END)})
    if unknown:
        raise RequestError(
            f"the voice has no phoneme {' '.join(map(repr, unknown))}: expected espeak's IPA, "
            "one character of " + "".join(s for s in id_map if s not in (PAD, START, END))
        )
    ids = [*id_map[START], *id_map[PAD]]
    for symbol in symbols:
        ids += [*id_map[symbol], *id_map[PAD]]
    return [*ids, *id_map[END]]
