"""What a part gives and takes: of which kind, shape, range, tokenizer and sample rate.

It follows from the family and the manifest alone, so that two parts can be held against each other
before anything runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from leangen import families
from leangen.families import latents
from leangen.records import Output
from leangen.session import Session

Kind = Literal["text", "tokens", "audio", "image", "rows", "vectors"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Port:
    """What is known of a value; None leaves open."""

    kind: Kind
    dtype: str | None = None
    shape: tuple[int | None, ...] | None = None
    """An image's [height, width, channels], a mask's [height, width]; rows' [n, columns], or of
    rows that are latents [n, channels, height, width]; vectors' [n, dimensions]."""
    range: tuple[float, float] | None = None
    """The values of black and white, of the loudest sound."""
    rate_hz: int | None = None
    tokenizer: str | None = None
    """sha256 of the tokenizer's file: the same ids mean the same text."""


def misfit(given: Port, wanted: Port) -> str | None:
    """Why a value of port `given` cannot stand where `wanted` is taken; None where it can."""
    if given.kind != wanted.kind:
        return f"is {given.kind}, expected {wanted.kind}"
    if None not in (given.dtype, wanted.dtype) and given.dtype != wanted.dtype:
        return f"is of {given.dtype}, expected {wanted.dtype}"
    if wanted.shape is not None and given.shape is not None and not _same_shape(given, wanted):
        return f"has shape {_shape(given)}, expected {_shape(wanted)}"
    if wanted.range is not None and given.range != wanted.range:
        told = "does not say its range" if given.range is None else f"goes from {_ends(given)}"
        return f"{told}, expected {_ends(wanted)}"
    if None not in (given.rate_hz, wanted.rate_hz) and given.rate_hz != wanted.rate_hz:
        return f"has {given.rate_hz} samples a second, expected {wanted.rate_hz}"
    if wanted.tokenizer is not None and given.tokenizer != wanted.tokenizer:
        return (
            f"holds tokens of the tokenizer {str(given.tokenizer)[:12]}, expected those of "
            f"{wanted.tokenizer[:12]}: pass text"
        )
    return None


def _same_shape(given: Port, wanted: Port) -> bool:
    a, b = given.shape or (), wanted.shape or ()
    if given.kind == "rows" and 2 in (len(a), len(b)):
        a, b = _flat(a), _flat(b)
    return len(a) == len(b) and all(
        None in (one, other) or one == other for one, other in zip(a, b, strict=True)
    )


def _flat(shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """The shape of rows, each in one piece."""
    known = [size for size in shape[1:] if size is not None]
    return (shape[0], math.prod(known) if len(known) == len(shape) - 1 else None)


def _shape(port: Port) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in port.shape or ()) + "]"


def _ends(port: Port) -> str:
    low, high = port.range or (0.0, 0.0)
    return f"{low:g} to {high:g}"


@dataclass(frozen=True, slots=True)
class Ports:
    """The outputs that a part has, by name, and the fields of its request that take one."""

    gives: Mapping[str, Port]
    takes: Mapping[str, Port]


TEXT = Port(kind="text")


def _language(session: Session) -> Ports:
    files = session.bundle.files
    tokenizer = files.get("tokenizer.json", {}).get("sha256")
    tokens = Port(kind="tokens", tokenizer=tokenizer)
    return Ports(
        {"text": TEXT, "tokens": tokens}, {"prompt": TEXT, "messages": TEXT, "tokens": tokens}
    )


def _transcription(session: Session) -> Ports:
    rate_hz = int(session.bundle.config["sample_rate_hz"])
    audio = Port(kind="audio", dtype="float32", range=(-1.0, 1.0), rate_hz=rate_hz)
    return Ports(_language(session).gives, {"audio": audio})


def _embedding(session: Session) -> Ports:
    vectors = Port(kind="vectors", shape=(None, session.bundle.config["dimensions"]))
    return Ports({"vectors": vectors}, {"prompt": TEXT})


def _speech(session: Session) -> Ports:
    rate_hz = int(session.bundle.config["sample_rate_hz"])
    audio = Port(kind="audio", dtype="float32", range=(-1.0, 1.0), rate_hz=rate_hz)
    return Ports({"audio": audio}, {"text": TEXT, "phonemes": TEXT})


def _density(session: Session) -> Ports:
    columns = session.bundle.config.get("columns")
    rows = Port(kind="rows", shape=(None, None if columns is None else len(columns)))
    return Ports({"rows": rows}, {"data": rows})


def _diffusion(session: Session) -> Ports:
    config = session.bundle.config
    channels, height, width = latents.image_shape(config)
    image = _image(session, (height, width, channels))
    gives: dict[str, Port] = {"image": image}
    if config.get("latents"):
        gives = {"latent": Port(kind="rows", shape=(None, channels, height, width))}
    taken = image
    if "upscale" in config:
        channels, height, width = config["upscale"]["shape"]
        taken = _image(session, (height, width, channels))
    mask = Port(kind="image", shape=(height, width), range=(0.0, 1.0))
    takes = {"image": taken, "mask": mask, "prompt": TEXT}
    return Ports(gives, takes | _conditions(config))


def _conditions(config: Mapping[str, Any]) -> dict[str, Port]:
    """Those that another part may say: vectors, and values that have names."""
    found = {}
    for name, entry in config.get("conditions", {}).items():
        numbers = math.prod(entry["shape"])
        if numbers > 1:
            found[f"conditions.{name}"] = Port(kind="vectors", shape=(None, numbers))
        elif entry.get("names"):
            found[f"conditions.{name}"] = TEXT
    return found


def _pixels(session: Session) -> Ports:
    image = _image(session, tuple(session.bundle.config["size"]) + (None,))
    return Ports({"image": image}, {"image": image})


def _waveform(session: Session) -> Ports:
    rate_hz = int(session.bundle.config["sample_rate_hz"])
    return Ports({"audio": Port(kind="audio", range=(-1.0, 1.0), rate_hz=rate_hz)}, {})


def _oneshot(session: Session) -> Ports:
    config = session.bundle.config
    if "image" in config:  # an encoder
        channels, height, width = config["image"]["shape"]
        image = _image(session, (height, width, channels))
        return Ports({"latent": Port(kind="rows")}, {"image": image})
    latent = Port(kind="rows", shape=(None, *config["latent"]["shape"]))
    outputs = {value.name: value.shape for value in session.graph("model").get_outputs()}
    sizes = [size if isinstance(size, int) else None for size in outputs[config["output"]][1:]]
    channels, height, width = sizes if len(sizes) == 3 else (None, None, None)
    image = _image(session, (height, width, channels))
    return Ports({"image": image}, {"latent": latent} | _conditions(config))


def _image(session: Session, shape: tuple[int | None, ...]) -> Port:
    limits = session.bundle.config.get("range")
    return Port(
        kind="image",
        dtype="float32",
        shape=shape,
        range=None if limits is None else (float(limits[0]), float(limits[1])),
    )


PORTS: Mapping[str, Callable[[Session], Ports]] = {
    "language": _language,
    "seq2seq/text": _language,
    "seq2seq/transcription": _transcription,
    "embedding": _embedding,
    "flow/speech": _speech,
    "flow/density": _density,
    "autoregressive/image": _pixels,
    "autoregressive/rows": _pixels,
    "autoregressive/audio": _waveform,
    "diffusion": _diffusion,
    "oneshot": _oneshot,
}
"""By the key of `families.FAMILIES`."""


def of(session: Session) -> Ports:
    """The ports of a bundle; a family that says nothing of them has none."""
    ports = PORTS.get(families.key(session.bundle))
    return Ports({}, {}) if ports is None else ports(session)


def value(output: Output, name: str) -> Any:
    """The output of that name: text, tokens, or the array."""
    if name in output.extra:
        return output.extra[name]
    return getattr(output, name) if name in ("text", "tokens") else output.array
