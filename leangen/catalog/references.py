"""How models are named: what a user writes, read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from leangen.bundle import MANIFEST
from leangen.catalog.entries import CATALOG
from leangen.errors import UnknownModelError


@dataclass(frozen=True, slots=True)
class Ref:
    """A model as a user writes it: a name with or without scheme, or a bundle's path."""

    name: str
    """`smollm2-135m` or `hf:org/name`; empty for a path."""
    scheme: str | None = None
    path: Path | None = None

    def __str__(self) -> str:
        if self.path is not None:
            return str(self.path)
        return f"{self.name}:{self.scheme}" if self.scheme else self.name


_WORD = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_NAME = re.compile(rf"(?P<name>{_WORD})(?::(?P<scheme>{_WORD}))?")
_HUB = re.compile(
    rf"(?P<name>hf:{_WORD}/{_WORD}(?:/{_WORD})*(?:@{_WORD}(?:/{_WORD})*)?)(?::(?P<scheme>{_WORD}))?"
)


def parse_ref(text: str, catalog: Iterable[str] = CATALOG) -> Ref:
    """Read `NAME`, `NAME:SCHEME`, `hf:org/name[/file][@revision][:SCHEME]`, or a bundle's path.

    A path starts with `.`, `/` or `~`, holds a `/`, or is a folder with a manifest. A catalog
    name wins over a folder of that name: write `./terrain` for the folder. Raises
    UnknownModelError with the nearest names.

    >>> parse_ref("smollm2-135m:int4")
    Ref(name='smollm2-135m', scheme='int4', path=None)
    >>> parse_ref("hf:Qwen/Qwen3-0.6B-GGUF").name
    'hf:Qwen/Qwen3-0.6B-GGUF'
    """
    names = list(dict.fromkeys(catalog))
    if not text.isprintable() or "\\" in text:
        raise UnknownModelError(
            f"{text!r} is not a model's name: it holds a backslash or a control character; "
            "expected NAME, NAME:SCHEME, hf:org/name or a bundle's path"
        )
    if text.startswith("hf:"):
        if match := _HUB.fullmatch(text):
            return Ref(match["name"], match["scheme"])
        raise UnknownModelError(
            f"{text!r} does not name a Hugging Face model: "
            "expected hf:org/name[/file][@revision][:SCHEME]"
        )
    match = _NAME.fullmatch(text)
    if match and match["name"] in names:
        return Ref(match["name"], match["scheme"])
    if (name := text.partition(":")[0]) in names:
        raise UnknownModelError(f"{text!r} names no scheme: expected {name} or {name}:int4")
    if text.startswith((".", "/", "~")) or "/" in text or (text and _is_bundle(text)):
        return Ref("", path=_expand(text))
    if text and Path(text).is_file():
        raise UnknownModelError(
            f"{text!r} is a file: make a bundle of it with `leangen export {text} -o DIR`"
        )
    import difflib  # only to be told of a mistake

    wanted = text.split(":")[0].lower()
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.5)
    near += [name for name in names if wanted and wanted in name and name not in near]
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UnknownModelError(f"unknown model {text!r}: {hint}`leangen pull --list` shows all")


def _is_bundle(text: str) -> bool:
    return (Path(text) / MANIFEST).is_file()


def _expand(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # ~nobody-of-that-name
        raise UnknownModelError(f"{text!r}: there is no such home folder; write it out") from None
