"""The families: how one generation of a kind of model proceeds.

A family is one module with

    UNIT: str                         its unit of work: `token`, `pixel`, `audio-second`, `sample`
    Request                           a frozen dataclass that validates itself (RequestError)
    run(session, request)             a generator: yields a Step as each is done, returns an Output

`Request` takes the prompt as its first field where the family has one, and keeps only plain JSON
types or NumPy arrays; `describe()` gives what the receipt keeps of it (never the prompt's text).
The engine times every family the same way. The flow family has a module per task, each with its own
unit: `of(bundle)` finds the right one.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from importlib import import_module
from typing import Any, Protocol, cast

from leangen.bundle import Bundle
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

    @property
    def Request(self) -> type[Any]:
        """The family's request class."""
        ...

    def run(self, session: Session, request: Any) -> Generator[Step, None, Output]:
        """Generate: yield each step when it is done, return the output."""
        ...


FAMILIES = {
    "language": "leangen.families.language",
    "flow/speech": "leangen.families.speech",
    "flow/density": "leangen.families.density",
    "diffusion": "leangen.families.diffusion",
    "oneshot": "leangen.families.oneshot",
}
"""Modules by name or name/task, imported on use: a speech request never loads a tokenizer."""


def of(bundle: Bundle) -> Family:
    """The family that runs a bundle: its manifest's family, and its config's `task` if it has one.

    Raises BundleError for one this leangen does not have.
    """
    task = bundle.config.get("task")
    return get(bundle.family if task is None else f"{bundle.family}/{task}")


def get(name: str) -> Family:
    """The family by its key in FAMILIES; BundleError for one this leangen does not have."""
    if name not in FAMILIES:
        raise BundleError(
            f"family {name!r} is not one of {', '.join(FAMILIES)}: update leangen to run it"
        )
    return cast(Family, import_module(FAMILIES[name]))
