"""The TOML file of a pipeline: its inputs, and its parts in the order in which they run."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leangen.errors import RequestError
from leangen.pipeline import template
from leangen.pipeline.template import INPUT

_NAME = re.compile(r"[A-Za-z][\w-]*")
_KEYS = {"summary", "inputs", "parts"}
_PART_KEYS = {"model", "bundle", "request", "retrieve"}
_INPUT_KEYS = {"about", "default"}


@dataclass(frozen=True, slots=True)
class Input:
    """Something that a pipeline is given."""

    about: str
    default: Any = None
    """None where it must be given."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part as it is written."""

    name: str
    model: str
    """NAME, NAME:SCHEME, or a bundle's folder."""
    request: Mapping[str, Any]
    """Options of its family's request; strings may hold references to earlier parts."""
    bundle: str | None = None
    """The digest that the bundle must have, as `leangen verify` prints it; None takes any."""
    retrieve: bool = False
    """Whether it looks passages up with its model's embeddings (`retrieval`)."""


@dataclass(frozen=True, slots=True)
class Spec:
    """A pipeline as it is written."""

    name: str
    summary: str
    inputs: Mapping[str, Input]
    parts: tuple[Part, ...]


def read(path: Path) -> Spec:
    """The pipeline in a file; RequestError names the key that is wrong. Nothing is loaded."""
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{path} is not TOML: {error}") from error
    _only(path, content, _KEYS, "")
    inputs = {
        name: _input(path, name, entry) for name, entry in _table(path, content, "inputs").items()
    }
    parts = tuple(
        _part(path, name, entry) for name, entry in _table(path, content, "parts").items()
    )
    if not parts:
        raise RequestError(f"{path} has no parts: expected at least one [parts.NAME] with a model")
    spec = Spec(path.stem, str(content.get("summary", "")), inputs, parts)
    _check_references(path, spec)
    return spec


def _input(path: Path, name: str, entry: Any) -> Input:
    if not isinstance(entry, dict):
        raise RequestError(f"{path}: inputs.{name} is {entry!r}, expected {{ about = '...' }}")
    _only(path, entry, _INPUT_KEYS, f"inputs.{name}.")
    default = entry.get("default")
    return Input(str(entry.get("about", "")), _beside(path, default))


def _beside(path: Path, value: Any) -> Any:
    """A path that begins with ./ lies beside the file, wherever that is run from."""
    relative = isinstance(value, str) and value.startswith("./")
    return str(path.parent / value) if relative else value


def _part(path: Path, name: str, entry: Any) -> Part:
    if name == INPUT or not _NAME.fullmatch(name):
        raise RequestError(f"{path}: a part cannot be called {name!r}: expected a word, not input")
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
        raise RequestError(f"{path}: parts.{name} has no model: expected model = 'NAME:SCHEME'")
    _only(path, entry, _PART_KEYS, f"parts.{name}.")
    if "request" in entry and "retrieve" in entry:
        raise RequestError(f"{path}: parts.{name} has request and retrieve: expected one of them")
    model = _beside(path, entry["model"])
    request = entry.get("retrieve", entry.get("request", {}))
    if not isinstance(request, dict):
        raise RequestError(f"{path}: parts.{name}.request is {request!r}, expected a table")
    digest = entry.get("bundle")
    if not isinstance(digest, str | None):
        raise RequestError(f"{path}: parts.{name}.bundle is {digest!r}, expected 'sha256:...'")
    return Part(name, model, request, digest, "retrieve" in entry)


def _check_references(path: Path, spec: Spec) -> None:
    """Every reference names an input or an earlier part."""
    earlier: list[str] = []
    for part in spec.parts:
        for field, value in part.request.items():
            for reference, _ in template.references(value):
                where = f"{path}: parts.{part.name}.{field}: {reference}"
                if reference.part == INPUT and reference.output not in spec.inputs:
                    raise RequestError(
                        f"{where} names no input: expected one of "
                        f"{', '.join(spec.inputs) or 'none, as [inputs] is empty'}"
                    )
                if reference.part == INPUT and reference.filters:
                    raise RequestError(f"{where} has a filter: they are for what a part gives")
                if reference.part != INPUT and reference.part not in earlier:
                    raise RequestError(
                        f"{where} names no earlier part: expected one of "
                        f"{', '.join([INPUT, *earlier])}"
                    )
        earlier.append(part.name)


def _table(path: Path, content: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    table = content.get(key, {})
    if not isinstance(table, dict):
        raise RequestError(f"{path}: {key} is {table!r}, expected a table")
    return table


def _only(path: Path, table: Mapping[str, Any], keys: set[str], where: str) -> None:
    for key in table:
        if key not in keys:
            raise RequestError(
                f"{path} has {where}{key}: expected {' or '.join(sorted(keys))}; options of a "
                "part's model go into its request"
            )
