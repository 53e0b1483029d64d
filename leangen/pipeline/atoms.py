"""An atomic part: a loaded bundle with what it keeps, what it takes and gives, how it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator, Mapping
from typing import Any, Protocol

from leangen.engine import Engine
from leangen.pipeline import ports
from leangen.pipeline.ports import Ports
from leangen.records import Media, Output, Step


class Runner(Protocol):
    """What a pipeline knows of a part."""

    @property
    def engine(self) -> Engine:
        """Its model, which accounts for what it spends."""
        ...

    @property
    def ports(self) -> Ports:
        """What it takes and gives."""
        ...

    @property
    def media(self) -> Media:
        """What it makes."""
        ...

    @property
    def fields(self) -> tuple[str, ...]:
        """The options of its request."""
        ...

    def request(self, options: Mapping[str, Any]) -> Any:
        """Its validated request; RequestError for one that cannot be met."""
        ...

    def run(self, request: Any) -> Generator[Step, None, Output]:
        """Carry a request out."""
        ...


class Atom:
    """A part that generates as its model does alone."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.ports = ports.of(engine.session)

    @property
    def media(self) -> Media:
        """What it makes."""
        return self.engine.media

    @property
    def fields(self) -> tuple[str, ...]:
        """The options of its request."""
        return tuple(field.name for field in dataclasses.fields(self.engine.family.Request))

    def request(self, options: Mapping[str, Any]) -> Any:
        """Its validated request; RequestError for one that cannot be met."""
        return self.engine.request(**options)

    def run(self, request: Any) -> Generator[Step, None, Output]:
        """Carry a request out."""
        return self.engine.family.run(self.engine.session, request)
