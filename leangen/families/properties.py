"""What a language model says of a text beside its likelihood: numbers, once the text has ended.

The bundle's config has them as

    properties    name to `token`, whose logit after the end token is the value, less `mean` and by
                  `scale`; and `error`, its mean absolute error on held-out texts

The tokens are never drawn: their logits are far below all others wherever a text goes on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from leangen.errors import SourceError
from leangen.families.decoder import Decoder
from leangen.session import Session

KEY = "leangen.properties"
"""The key of a GGUF that has them as JSON."""
FIELDS = ("token", "mean", "scale", "error")

Floats = np.ndarray[Any, np.dtype[np.float32]]


def from_metadata(metadata: Mapping[str, Any], vocab: int) -> dict[str, Any]:
    """The config key of a GGUF's metadata, if it has any; SourceError for what makes no sense."""
    if KEY not in metadata:
        return {}
    try:
        found = {
            str(name): {field: float(entry[field]) for field in FIELDS} | {"token": entry["token"]}
            for name, entry in json.loads(metadata[KEY]).items()
        }
        fits = all(0 <= entry["token"] < vocab for entry in found.values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise SourceError(f"{KEY} of the GGUF file cannot be read ({error!r})") from None
    if not fits:
        raise SourceError(f"{KEY} of the GGUF file names a token that is not among its {vocab}")
    return {"properties": found}


@dataclass(frozen=True, slots=True)
class Property:
    """What is said of one text."""

    value: float
    error: float
    """The mean absolute error on held-out texts."""


def values(config: Mapping[str, Any], logits: Floats) -> dict[str, Property]:
    """The properties by name, from the logits [vocab] after the end token."""
    return {
        name: Property(
            float(entry["mean"] + entry["scale"] * logits[entry["token"]]), entry["error"]
        )
        for name, entry in config["properties"].items()
    }


def of_tokens(session: Session, tokens: Sequence[int]) -> dict[str, Property]:
    """The properties of a whole text: its start token, itself, its end token."""
    with Decoder(session, len(tokens)) as decoder:
        return values(session.bundle.config, decoder.feed(tokens))


def told(found: Mapping[str, Property]) -> str:
    """The properties as one line, each with its error."""
    each = ", ".join(f"{name} {said.value:.2f} ± {said.error:.2f}" for name, said in found.items())
    return f"{each} (mean absolute error on held-out texts)"
