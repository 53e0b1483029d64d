"""The families: how one generation of a kind of model proceeds.

A family is one module with

    UNIT: str                         its unit of work: `token`, `pixel`, `audio-second`, `sample`
    PROMPT: str | None                the field of Request that a positional prompt fills
    EXAMPLE: str | None               a prompt for when none is given: benchmarks, the demo
    Request                           a frozen dataclass that validates itself (RequestError)
    run(session, request)             a generator: yields a Step as each is done, returns an Output

`Request.describe()` gives the options that the receipt keeps, never the prompt's text. The
engine times every family the same way.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from importlib import import_module
from typing import Any, Protocol, cast

from leangen.errors import BundleError
from leangen.records import Output, Step
from leangen.session import Session


class Request(Protocol):
    """What one generation is asked for."""

    def describe(self) -> Mapping[str, Any]:
        """The options as plain JSON types, for the receipt."""
        ...


class Family(Protocol):
    """The attributes of a family's module."""

    UNIT: str
    PROMPT: str | None
    EXAMPLE: str | None

    @property
    def Request(self) -> type[Any]:
        """The family's request class."""
        ...

    def run(self, session: Session, request: Any) -> Generator[Step, None, Output]:
        """Generate: yield each step when it is done, return the output."""
        ...


FAMILIES = {
    "language": "leangen.families.language",
    "flow": "leangen.families.flow",
    "diffusion": "leangen.families.diffusion",
    "oneshot": "leangen.families.oneshot",
}
"""Modules by name, imported on use: a speech request never loads a tokenizer."""


def get(name: str) -> Family:
    """The family of a bundle's manifest; BundleError for one this leangen does not have."""
    if name not in FAMILIES:
        raise BundleError(
            f"family {name!r} is not one of {', '.join(FAMILIES)}: update leangen to run it"
        )
    return cast(Family, import_module(FAMILIES[name]))
