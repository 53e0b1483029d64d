"""The exporters: one module per kind of source file, each making a bundle of it.

An exporter is one module with

    accepts(path) -> bool        whether the file looks like its kind: magic bytes, extension
    export(path, out, *, name=None, source=None, replace=False, **options) -> Bundle

`export` writes through `bundle.create`, so `out` appears whole or not at all. `source` says where
the file came from and goes into the manifest. Damaged files raise SourceError, well-formed ones
that leangen cannot run UnsupportedError.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType

from leangen.errors import SourceError

EXPORTERS = {
    "gguf": "leangen.exporters.gguf",
    "piper": "leangen.exporters.piper",
    "pzflow": "leangen.exporters.pzflow",
    "onnx": "leangen.exporters.onnx_file",
}
"""Modules by kind, the more particular first: a Piper voice is an ONNX file too."""


def find(path: Path) -> ModuleType:
    """The exporter of the file at `path`; SourceError when there is no file, or none accepts it."""
    if not path.is_file():
        raise SourceError(f"{path} is not a file: give the path of a model file to export")
    for module_name in EXPORTERS.values():
        module = import_module(module_name)
        if module.accepts(path):
            return module
    raise SourceError(
        f"{path} is none of the kinds that leangen exports ({', '.join(EXPORTERS)}): "
        "check that the file is complete"
    )
