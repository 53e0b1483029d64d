"""The families: how one generation of a kind of model proceeds.

A family is one module with

    UNIT: str                its unit of work: `token`, `audio-second`, `sample`
    MEDIA: str               what its outputs are: `text`, `audio`, `image` or `table`
    INPUTS: tuple[str, ...]  the fields of Request one of which says what to generate from; a
                             positional prompt fills the first; empty where nothing is needed
    EXAMPLE: Mapping         options of a request for when no input is given: benchmarks, the demo
    Request                  a frozen dataclass that validates itself (RequestError)
    prepare(session)         opens what a first generation would otherwise have to wait for
    run(session, request)    a generator: yields a Step as each is done, returns an Output

and, where bundles of it can be calibrated without data, `calibration_requests(session)`; where what
comes out depends on the bundle, `media(config)`; where an option may ask for what has to be
measured first, `settle(engine, options) -> options`.
`Request.describe()` gives the options that the receipt keeps, never the prompt's text. The engine
times every family the same way. The flow family has a module per task, each with its own unit.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from importlib import import_module
from typing import Any, Protocol, cast

from leangen.bundle import Bundle
from leangen.errors import BundleError
from leangen.records import Media, Output, Step
from leangen.session import Session


class Request(Protocol):
    """What one generation is asked for."""

    def describe(self) -> Mapping[str, Any]:
        """The options as plain JSON types, for the receipt."""
        ...


class Family(Protocol):
    """The attributes of a family's module."""

    UNIT: str
    MEDIA: Media
    INPUTS: tuple[str, ...]
    EXAMPLE: Mapping[str, Any]

    @property
    def Request(self) -> type[Any]:
        """The family's request class."""
        ...

    def prepare(self, session: Session) -> None:
        """Open graphs and assets, so that the first generation costs what the later ones do."""
        ...

    def run(self, session: Session, request: Any) -> Generator[Step, None, Output]:
        """Generate: yield each step when it is done, return the output."""
        ...


FAMILIES = {
    "language": "leangen.families.language",
    "seq2seq/text": "leangen.families.text_to_text",
    "seq2seq/transcription": "leangen.families.transcription",
    "embedding": "leangen.families.embedding",
    "flow/speech": "leangen.families.speech",
    "flow/density": "leangen.families.density",
    "autoregressive/image": "leangen.families.image_tokens",
    "autoregressive/rows": "leangen.families.pixel_rows",
    "autoregressive/audio": "leangen.families.waveform",
    "diffusion": "leangen.families.diffusion",
    "oneshot": "leangen.families.oneshot",
}
"""Modules by name or name/task, imported on use: a speech request never loads a tokenizer."""


def key(bundle: Bundle) -> str:
    """The key in FAMILIES: the manifest's family, and the config's `task` if it has one."""
    task = bundle.config.get("task")
    return bundle.family if task is None else f"{bundle.family}/{task}"


def of(bundle: Bundle) -> Family:
    """The family that runs a bundle; BundleError for one this leangen does not have."""
    name = key(bundle)
    if name not in FAMILIES:
        raise BundleError(
            f"family {name!r} is not one of {', '.join(FAMILIES)}: update leangen to run it"
        )
    return cast(Family, import_module(FAMILIES[name]))


def finished(steps: Generator[Step, None, Output]) -> Output:
    """The output of a generation whose steps nobody looks at."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            output: Output = stop.value
            return output


def media(bundle: Bundle) -> Media:
    """What a bundle's generations put out."""
    family = of(bundle)
    if hasattr(family, "media"):
        return cast(Media, family.media(bundle.config))
    return family.MEDIA
