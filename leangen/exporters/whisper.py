"""What a Whisper bundle's config says of its tokens, from its tokenizer and its own lists."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from leangen.errors import SourceError
from leangen.exporters.checkpoint import Layout
from leangen.families.whisper_mel import HOP, RATE_HZ

MULTILINGUAL_VOCAB = 51_865
"""English-only models have a token less (the tokenizer of both is spelled alike)."""
_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")
_TASKS = ("transcribe", "translate")


def speech_config(
    folder: Path, layout: Layout, mels: int, said: Mapping[str, Any]
) -> dict[str, Any]:
    """The keys that `families.transcription` reads, beside those of every language model.

    `folder` has `tokenizer.json`; `said` are the checkpoint's own words about generation
    (`suppress_tokens`, `begin_suppress_tokens`, `is_multilingual`). Raises SourceError for a
    tokenizer without the tokens that Whisper speaks in.
    """
    path = folder / "tokenizer.json"
    tokens = Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True)
    needed = ("<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>")
    if missing := [token for token in needed if token not in tokens]:
        raise SourceError(
            f"{path.name} lacks {', '.join(missing)}: expected the tokenizer of a Whisper model"
        )
    start, plain, end = (tokens[token] for token in needed)
    vocab = layout.config.vocab
    multilingual = said.get("is_multilingual", vocab >= MULTILINGUAL_VOCAB)
    languages, tasks = {}, {}
    if multilingual:
        languages = {m[1]: i for token, i in tokens.items() if (m := _LANGUAGE.fullmatch(token))}
        tasks = {task: tokens[f"<|{task}|>"] for task in _TASKS if f"<|{task}|>" in tokens}
    # After the token that says that there are none, all tokens are times.
    times = range(plain + 1, vocab)
    assert layout.encoder is not None
    return {
        "task": "transcription",
        "bos_id": start,
        "eos_ids": [end],
        "sample_rate_hz": RATE_HZ,
        "window_samples": 2 * layout.encoder.context * HOP,
        "mels": mels,
        "start": start,
        "no_timestamps": plain,
        "languages": dict(sorted(languages.items(), key=lambda item: item[1])),
        "tasks": tasks,
        "suppress": sorted({*(said.get("suppress_tokens") or ()), *times} - {end}),
        "suppress_first": sorted(said.get("begin_suppress_tokens") or ()),
    }
