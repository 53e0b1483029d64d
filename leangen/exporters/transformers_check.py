"""What an exported language model computes, beside what transformers computes with torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leangen.bundle import Bundle
from leangen.errors import DependencyError
from leangen.families import language
from leangen.session import Session

TOLERANCE = 1e-4
"""Largest difference of logits that passes, times the largest logit where that is above 1."""
TOKENS = 64
TEXT = "In 1843 Ada Lovelace wrote: the engine weaves algebraical patterns, just as the loom does."


@dataclass(frozen=True, slots=True)
class Difference:
    """Logits of the bundle against those of torch, both in fp32, on one input."""

    input: str
    """`random` tokens, or those of a `text`."""
    tokens: int
    largest: float
    """Of the absolute differences."""
    scale: float
    """The largest logit of torch."""

    @property
    def passed(self) -> bool:
        """Whether it is within `TOLERANCE`."""
        return self.largest <= TOLERANCE * max(1.0, self.scale)

    @property
    def text(self) -> str:
        """In words."""
        return (
            f"{self.input}: logits of {self.tokens} tokens differ from torch by at most "
            f"{self.largest:.2g} (the largest is {self.scale:.3g})"
        )


def differences(path: Path, bundle: Bundle) -> list[Difference]:
    """Run the model in folder `path` with torch, and the bundle made of it, on the same tokens.

    Code that comes with a model is never run, pickles are not loaded. Holds both models in memory.
    Raises DependencyError without torch or transformers.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise DependencyError("--check runs torch: `pip install 'leangen[export]'`") from None
    model: Any = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
    )
    session = Session(bundle)
    context, vocab = bundle.config["context_length"], bundle.config["vocab_size"]
    words = language.encode(session, language.Request(prompt=TEXT))
    inputs = {
        "random": np.random.default_rng(0).integers(0, vocab, min(TOKENS, context)).tolist(),
        "text": words[:context],
    }
    found = []
    for name, tokens in inputs.items():
        with torch.no_grad():
            expected = model(torch.tensor([tokens])).logits[0].numpy()
        got = language.logits(session, tokens)
        scale, largest = float(np.abs(expected).max()), float(np.abs(got - expected).max())
        found.append(Difference(name, len(tokens), largest, scale))
    return found
