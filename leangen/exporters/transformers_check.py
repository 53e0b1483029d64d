"""What an exported language model computes, beside what transformers computes with torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leangen.bundle import Bundle
from leangen.errors import needs
from leangen.exporters.difference import Difference
from leangen.families import language, text_to_text, transcription
from leangen.families.decoder import Decoder, Floats
from leangen.session import Session

TOKENS = 64
TEXT = "In 1843 Ada Lovelace wrote: the engine weaves algebraical patterns, just as the loom does."


@dataclass(frozen=True, slots=True)
class Logits(Difference):
    """Logits of the bundle against those of torch, both in fp32, on one input."""

    input: str
    """`random` tokens or noise, those of a `text`, or a `sound`."""
    tokens: int

    def __str__(self) -> str:
        return (
            f"{self.input}: logits of {self.tokens} tokens differ from torch by at most "
            f"{self.largest:.2g} (the largest is {self.scale:.3g})"
        )


def differences(path: Path, bundle: Bundle) -> list[Difference]:
    """Run the model in folder `path` with torch, and the bundle made of it, on the same tokens.

    Code that comes with a model is never run, pickles are not loaded. Holds both models in memory.
    Raises DependencyError without torch or transformers.
    """
    model, torch = _model(path, "AutoModelForCausalLM")
    session = Session(bundle)
    context, vocab = bundle.config["context_length"], bundle.config["vocab_size"]
    words = language.tokens_of(session, language.Request(prompt=TEXT))
    found: list[Difference] = []
    for name, tokens in (("random", _random(vocab, context)), ("text", words[:context])):
        expected = _logits(model, torch, tokens, context)
        found.append(_difference(name, language.logits(session, tokens), expected))
    return found


def seq2seq_differences(path: Path, bundle: Bundle) -> list[Difference]:
    """The same of an encoder-decoder: of text, or of sound (noise, and the family's example)."""
    config = bundle.config
    sound = config["task"] == "transcription"
    model, torch = _model(path, "AutoModelForSpeechSeq2Seq" if sound else "AutoModelForSeq2SeqLM")
    session = Session(bundle)
    tokens = _random(config["vocab_size"], config["context_length"])
    if sound:
        noise = np.random.default_rng(0).standard_normal(config["window_samples"]) / 10
        example = transcription.Request(**transcription.EXAMPLE).samples(config["sample_rate_hz"])
        inputs = {"random": noise.astype(np.float32), "sound": example}
    else:
        words = language.tokens_of(session, language.Request(prompt=TEXT))
        inputs = {"random": tokens, "text": words[: config["source_length"]]}
    found: list[Difference] = []
    for name, given in inputs.items():
        if sound:
            given = given[: config["window_samples"]]
            states = transcription.encoded(session, given)
            features = transcription.features(config, given)
            feeds = {"input_features": torch.from_numpy(features)}
        else:
            states = text_to_text.encoded(session, given)
            feeds = {"input_ids": torch.tensor([given])}
        with torch.no_grad():
            expected = model(**feeds, decoder_input_ids=torch.tensor([tokens])).logits[0].numpy()
        with Decoder(session, len(tokens), role="decoder", beside=states) as decoder:
            found.append(_difference(name, decoder.feed_all(tokens), expected))
    return found


def _model(path: Path, kind: str) -> tuple[Any, Any]:
    """The model in fp32, and torch."""
    message = "--check runs torch: `pip install 'leangen[export]'`"
    with needs("torch", "transformers", message=message):
        import torch
        import transformers
    model: Any = getattr(transformers, kind).from_pretrained(
        path, dtype=torch.float32, trust_remote_code=False
    )
    return model, torch


def _logits(model: Any, torch: Any, tokens: list[int], context: int) -> Floats:
    """What torch makes of tokens in a context whose end, too, is taken."""
    places, count = list(range(len(tokens))), len(tokens)
    rope = getattr(model.config, "rope_parameters", None) or {}
    special: dict[str, Any] = {}
    if rope.get("rope_type") == "longrope":
        # The last position decides on its factors for all; no token sees one that comes later.
        tokens, places = [*tokens, 0], [*places, context - 1]
        special["position_ids"] = torch.tensor([places])
    with torch.no_grad():
        logits: Floats = model(torch.tensor([tokens]), **special).logits[0, :count].numpy()
    return logits


def _random(vocab: int, context: int) -> list[int]:
    drawn: list[int] = np.random.default_rng(0).integers(0, vocab, min(TOKENS, context)).tolist()
    return drawn


def _difference(name: str, got: Floats, expected: Floats) -> Logits:
    scale, largest = float(np.abs(expected).max()), float(np.abs(got - expected).max())
    return Logits(name, len(expected), largest=largest, scale=scale)
