"""References inside a part's request: `{input.seed}`, `{ear.text}`, `{low.image|resize 28 28}`.

A string that is one reference is what it names; with other text around it, both become text.
`{{` and `}}` are braces. A filter after `|` changes a value, and what is known of it (its port), on
the way from one part to the next.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from leangen import audio
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
        name, *numbers = part.split() or [""]
        if name not in FILTERS:
            raise RequestError(
                f"{whole!r} has no filter {name!r}: expected one of {', '.join(FILTERS)}"
            )
        try:
            values = tuple(map(float, numbers))
        except ValueError:
            values = ()
        takes = FILTERS[name].numbers
        if len(values) != len(takes) or not FILTERS[name].fits(values):
            raise RequestError(
                f"{whole!r}: expected {' '.join([name, *takes])}, {FILTERS[name].expected}"
            )
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


def resize(value: Array, port: Port, height: float, width: float) -> Array:
    """Images [..., h, w, c] at another size, bicubic."""
    from PIL import Image

    size = int(width), int(height)
    channels = [
        np.asarray(Image.fromarray(channel).resize(size, Image.Resampling.BICUBIC))
        for image in value.astype(np.float32).reshape(-1, *value.shape[-3:])
        for channel in np.moveaxis(image, -1, 0)
    ]
    resized = np.moveaxis(np.reshape(channels, (-1, value.shape[-1], *size[::-1])), 1, -1)
    resized = resized.reshape(*value.shape[:-3], *resized.shape[1:])
    return resized if port.range is None else np.clip(resized, *port.range)  # it overshoots


def rescale(value: Array, port: Port, low: float, high: float) -> Array:
    """Values of the port's range as values of `low` to `high`, in proportion."""
    begin, end = port.range or (0.0, 1.0)
    return np.asarray(low + (value - begin) / (end - begin) * (high - low), np.float32)


def resample(value: Array, port: Port, rate_hz: float) -> Array:
    """Sound at another rate."""
    return audio.resample(value, port.rate_hz or int(rate_hz), int(rate_hz))


@dataclass(frozen=True, slots=True)
class Filter:
    """Changes a value on its way between two parts."""

    kind: str
    """Of the ports that it takes."""
    numbers: tuple[str, ...]
    """What follows its name."""
    expected: str
    """Which numbers."""
    fits: Callable[[tuple[float, ...]], bool]
    """Whether these are such."""
    apply: Callable[..., Array]
    """The value, its port and the numbers to the new value."""
    port: Callable[..., Port]
    """The same without a value: what it makes of the port."""


FILTERS: Mapping[str, Filter] = {
    "resize": Filter(
        "image",
        ("HEIGHT", "WIDTH"),
        "pixels, 1 to 8192",
        lambda size: all(1 <= pixels <= 8192 and pixels.is_integer() for pixels in size),
        resize,
        lambda port, *size: replace(
            port, shape=(*map(int, size), *(port.shape or (None,) * 3)[2:])
        ),
    ),
    "range": Filter(
        "image",
        ("LOW", "HIGH"),
        "low below high",
        lambda ends: -math.inf < ends[0] < ends[1] < math.inf,
        rescale,
        lambda port, *ends: replace(port, range=ends),
    ),
    "rate": Filter(
        "audio",
        ("HZ",),
        "samples a second, 1 or more",
        lambda rate: 1 <= rate[0] <= 1e6 and rate[0].is_integer(),
        resample,
        lambda port, rate_hz: replace(port, rate_hz=int(rate_hz)),
    ),
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
        value = FILTERS[name].apply(np.asarray(value), port, *numbers)
        port = FILTERS[name].port(port, *numbers)
    return value
