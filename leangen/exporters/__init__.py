"""The exporters: one module per kind of source, each making a bundle of it.

An exporter is one module with

    accepts(path) -> bool        whether file or folder looks like its kind: magic bytes, extension
    export(path, out, *, name=None, source=None, replace=False, **options) -> Bundle

`export` writes through `bundle.create`, so `out` appears whole or not at all. `source` says where
the file came from and goes into the manifest. Damaged files raise SourceError, well-formed ones
that leangen cannot run UnsupportedError.
"""

from __future__ import annotations

from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, cast

from leangen.bundle import Bundle
from leangen.errors import RequestError, SourceError

if TYPE_CHECKING:
    from leangen.exporters.difference import Difference

EXPORTERS = {
    "torch": "leangen.exporters.torch_module",
    "gguf": "leangen.exporters.gguf",
    "piper": "leangen.exporters.piper",
    "pzflow": "leangen.exporters.pzflow",
    "onnx": "leangen.exporters.onnx_file",
    "packed": "leangen.exporters.packed",
    "diffusers": "leangen.exporters.diffusers_folder",
    "annalog": "leangen.exporters.annalog",
    "onnx-lm": "leangen.exporters.onnx_lm",
    "ctranslate2": "leangen.exporters.ctranslate2",
    "seq2seq": "leangen.exporters.transformers_seq2seq",
    "embedding": "leangen.exporters.embedding",
    "imagegpt": "leangen.exporters.imagegpt",
    "wavenet": "leangen.exporters.wavenet",
    "transformers": "leangen.exporters.transformers_lm",
}
"""Modules by kind, the more particular first: a Piper voice is an ONNX file too."""


def find(path: Path) -> ModuleType:
    """The exporter of what is at `path`; SourceError when there is nothing, or none accepts it."""
    for kind, module_name in EXPORTERS.items():
        module = import_module(module_name)
        if (path.exists() or kind == "torch") and module.accepts(path):
            return module
    if str(path).startswith("hf:"):
        raise SourceError(f"{path} is no path: `leangen pull {path}` fetches and exports it")
    if not path.exists():
        raise SourceError(f"there is no {path}: give the path of a model to export")
    raise SourceError(
        f"{path} is none of the kinds that leangen exports ({', '.join(EXPORTERS)}): "
        "check that the file is complete"
    )


def export(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    replace: bool = False,
    **options: object,
) -> Bundle:
    """Export the file at `path` with the exporter that accepts it.

    Raises SourceError when none does, RequestError for an option that this exporter does not take.
    """
    module = find(path)
    taken = signature(module.export).parameters
    any_option = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in taken.values())
    for option in options:
        if option not in taken and not any_option:
            raise RequestError(f"--{option} does not apply to {path.name}: leave it out")
    return cast(Bundle, module.export(path, out, name=name, replace=replace, **options))


def must_check(path: Path) -> None:
    """RequestError where there is nothing of torch's to compare an export of `path` with."""
    if not hasattr(find(path), "check"):
        raise RequestError(
            f"--check compares with torch, which does not run {path.name}: leave it out"
        )


def check(path: Path, bundle: Bundle, **options: object) -> list[Difference]:
    """Compare `bundle` with torch's result for the source at `path` that it was exported from.

    `options` are those that it was exported with.
    Raises RequestError for sources that torch does not run.
    """
    module = find(path)
    must_check(path)
    taken = signature(module.check).parameters
    used = options if "options" in taken else {k: v for k, v in options.items() if k in taken}
    return cast("list[Difference]", module.check(path, bundle, **used))
