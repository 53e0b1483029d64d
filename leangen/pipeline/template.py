"""References inside a part's request: `{input.seed}`, `{ear.text}`, `{low.image|resize 28 28}`.

A string that is one reference is what it names; with other text around it, both become text.
`{{` and `}}` are braces. A filter after `|` changes a value, and what is known of it (its port), on
the way from one part to the next.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from leangen.errors import RequestError
from leangen.pipeline.ports import Port

INPUT = "input"
"""The part that stands for what the pipeline itself is given."""

Array = np.ndarray[Any, Any]

_TOKEN = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_REFERENCE = re.compile(r"\s*([\w-]+)\.([\w-]+)\s*((?:\|[^|]+)*)")


@dataclass(frozen=True, slots=True)
class Reference:
    """`{part.output|filter ...}`."""

    part: str
    output: str
    filters: tuple[tuple[str, tuple[float, ...]], ...] = ()
    """Each a name in FILTERS, and its numbers."""

    def __str__(self) -> str:
        filters = "".join(
            "|" + " ".join([name, *(f"{number:g}" for number in numbers)])
            for name, numbers in self.filters
        )
        return f"{{{self.part}.{self.output}{filters}}}"


def parse(text: str) -> list[str | Reference]:
    """A string as text and references, in order. RequestError for a lone brace or a bad filter."""
    pieces: list[str | Reference] = []
    end = 0
    for found in _TOKEN.finditer(text):
        pieces.append(text[end : found.start()])
        end = found.end()
        if found[0] in ("{{", "}}"):
            pieces.append(found[0][0])
        else:
            pieces.append(_reference(found[0], found[1] or ""))
    pieces.append(text[end:])
    return [piece for piece in pieces if piece != ""]


def _reference(whole: str, inner: str) -> Reference:
    match = _REFERENCE.fullmatch(inner)
    if match is None:
        raise RequestError(
            f"{whole!r} is not a reference: expected {{part.output}}, {{input.name}}, with filters "
            "{part.output|resize 28 28}, or {{ for a brace"
        )
    filters = []
    for part in match[3].split("|")[1:]:
        name, *numbers = part.split()
        if name not in FILTERS:
            raise RequestError(
                f"{whole!r} has no filter {name!r}: expected one of {', '.join(FILTERS)}"
            )
        try:
            values = tuple(map(float, numbers))
        except ValueError:
            values = ()
        if len(values) != 2:
            raise RequestError(f"{whole!r}: {name} takes two numbers, such as {name} 28 28")
        filters.append((name, values))
    return Reference(match[1], match[2], tuple(filters))


def references(value: Any) -> Iterator[tuple[Reference, bool]]:
    """Every reference in a request's value, and whether text surrounds it or it stands inside."""
    if isinstance(value, str):
        pieces = parse(value)
        yield from ((p, len(pieces) > 1) for p in pieces if isinstance(p, Reference))
    elif isinstance(value, Mapping | list):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from ((reference, True) for reference, _ in references(inner))


def fill(value: Any, lookup: Callable[[Reference], Any]) -> Any:
    """The value with each reference replaced by what `lookup` says that it is."""
    if isinstance(value, str):
        pieces = parse(value)
        if len(pieces) == 1 and isinstance(pieces[0], Reference):
            return lookup(pieces[0])
        return "".join(p if isinstance(p, str) else str(lookup(p)) for p in pieces)
    if isinstance(value, Mapping):
        return {name: fill(inner, lookup) for name, inner in value.items()}
    if isinstance(value, list):
        return [fill(inner, lookup) for inner in value]
    return value


def resize(value: Array, port: Port, height: float, width: float) -> tuple[Array, Port]:
    """Images [..., h, w, c] at another size, bicubic."""
    from PIL import Image

    size = int(width), int(height)
    images = value.reshape(-1, *value.shape[-3:])
    resized = [
        np.stack(
            [
                np.asarray(Image.fromarray(image[..., c]).resize(size, Image.Resampling.BICUBIC))
                for c in range(image.shape[-1])
            ],
            axis=-1,
        )
        for image in images.astype(np.float32)
    ]
    whole = np.stack(resized).reshape(*value.shape[:-3], size[1], size[0], value.shape[-1])
    if port.range is not None:  # bicubic overshoots at edges
        whole = np.clip(whole, *port.range)
    return whole, _resized(port, height, width)


def _resized(port: Port, height: float, width: float) -> Port:
    return replace(port, shape=(int(height), int(width), *(port.shape or (None,))[2:]))


def rescale(value: Array, port: Port, low: float, high: float) -> tuple[Array, Port]:
    """Values of the port's range as values of `low` to `high`, in proportion."""
    begin, end = port.range or (0.0, 1.0)
    scaled = low + (np.asarray(value, np.float32) - begin) / (end - begin) * (high - low)
    return scaled.astype(np.float32), replace(port, range=(low, high))


@dataclass(frozen=True, slots=True)
class Filter:
    """Changes a value on its way between two parts."""

    kind: str
    """Of the ports that it takes."""
    apply: Callable[[Array, Port, float, float], tuple[Array, Port]]
    port: Callable[[Port, float, float], Port]
    """What it makes of a port, without a value."""


FILTERS: Mapping[str, Filter] = {
    "resize": Filter("image", resize, _resized),
    "range": Filter("image", rescale, lambda port, low, high: replace(port, range=(low, high))),
}
"""By the name that is written after `|`."""


def through(filters: Sequence[tuple[str, tuple[float, ...]]], port: Port, where: str) -> Port:
    """The port that a value has after its filters; RequestError where one does not fit."""
    for name, numbers in filters:
        if port.kind != FILTERS[name].kind:
            raise RequestError(f"{where}: {name} takes an {FILTERS[name].kind}, got {port.kind}")
        if name == "range" and port.range is None:
            raise RequestError(f"{where}: its range is not known, so it cannot be changed")
        port = FILTERS[name].port(port, *numbers)
    return port


def apply(filters: Sequence[tuple[str, tuple[float, ...]]], value: Any, port: Port) -> Any:
    """The value after its filters, which `through` has accepted."""
    for name, numbers in filters:
        value, port = FILTERS[name].apply(np.asarray(value), port, *numbers)
    return value
