"""The artefact on disk: a folder with `leangen.json`, ONNX graphs and assets.

    smollm2-135m/int4/
        leangen.json        the manifest: family, graphs, config, files with size and sha256
        model.onnx          standard ONNX and com.microsoft ops only: any ORT runs it
        model.onnx.data     weights as external data, memory-mapped
        tokenizer.json
        leangen.sha256      the manifest's own sha256, as `sha256sum -c` reads it

A bundle that opens has every file that its manifest names, at its stated size; `verify` also
hashes them. File names are plain relative paths that stay inside the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from leangen.errors import BundleError, StorageError
from leangen.files import atomic_folder, check_free, write_atomic

MANIFEST = "leangen.json"
CHECKSUM = "leangen.sha256"
SCHEMA = "leangen.bundle/1"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A validated bundle. Paths are resolved inside the folder and nowhere else."""

    path: Path
    name: str
    """The model's name, without scheme: `smollm2-135m`."""
    family: str
    """`language`, `seq2seq`, `autoregressive`, `embedding`, `flow`, `diffusion` or `oneshot`."""
    scheme: str
    """`fp32`, `gguf`, `int8`, `int4`, ..."""
    graphs: Mapping[str, str]
    """Role to file: `{"model": "model.onnx"}`."""
    config: Mapping[str, Any]
    """What the family needs to run the graphs; its keys are documented in the family."""
    source: Mapping[str, Any]
    """Where the weights came from: kind, package, version, sha256, licence."""
    quantization: Mapping[str, Any]
    """Which scheme each node got and why, bits per weight, calibration; empty for fp32."""
    files: Mapping[str, Mapping[str, Any]]
    """Every file with `bytes` and `sha256`."""
    digest: str
    """`sha256:` of the manifest, which holds the hashes of all files."""

    def graph(self, role: str) -> Path:
        """The ONNX file of a role such as `model`; BundleError when there is none."""
        if role not in self.graphs:
            raise BundleError(
                f"bundle {self.path} has no graph {role!r} (it has {', '.join(self.graphs)}): "
                "export the model again"
            )
        return self.path / self.graphs[role]

    def asset(self, name: str) -> Path:
        """A file of the bundle by name; BundleError when the manifest does not list it."""
        if name not in self.files:
            raise BundleError(f"bundle {self.path} has no file {name!r}: export the model again")
        return self.path / name

    @property
    def reasons(self) -> list[str]:
        """A line for each thing that is not, or need not be, as the source has it, and why."""
        lines = []
        for name, why in self.config.get("reasons", {}).items():
            value = self.config.get(name)
            shown = f" {value}" if isinstance(value, str | int | float) else ""
            lines.append(f"{name}{shown}: {why}")
        return lines

    @property
    def size_bytes(self) -> int:
        """Bytes of all files that the manifest lists."""
        return sum(int(entry["bytes"]) for entry in self.files.values())


@dataclass(slots=True)
class Draft:
    """A bundle being written: fill `folder` with files and set the fields."""

    folder: Path
    name: str = ""
    family: str = ""
    scheme: str = "fp32"
    graphs: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_place(target: Path, *, replace: bool = False) -> None:
    """StorageError unless nothing is at `target`, or an empty folder, or with `replace` a bundle.

    What is no bundle is never replaced: `-o ~ --force` would remove a home.
    """
    if not replace:
        check_free(target)
        return
    empty = not target.exists() or target.is_dir() and not any(target.iterdir())
    if not empty and not (target / MANIFEST).is_file():
        raise StorageError(
            f"{target} is not a bundle, and --force replaces nothing else: choose another place, "
            "or remove it yourself"
        )


@contextmanager
def create(target: Path, *, replace: bool = False) -> Iterator[Draft]:
    """Write a bundle atomically: the target appears whole, or not at all.

    Raises StorageError as `check_place` does, and for a full or read-only disk.
    """
    check_place(target, replace=replace)
    with atomic_folder(target, replace=replace) as folder:
        draft = Draft(folder)
        yield draft
        for path in folder.rglob("*"):
            if path.is_file():
                path.chmod(0o644)  # onnx makes its weight files private to the user
        files = {
            path.relative_to(folder).as_posix(): {
                "bytes": path.stat().st_size,
                "sha256": sha256_file(path),
            }
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        manifest = {
            "schema": SCHEMA,
            "name": draft.name,
            "family": draft.family,
            "scheme": draft.scheme,
            "graphs": draft.graphs,
            "config": draft.config,
            "source": draft.source,
            "quantization": draft.quantization,
            "files": files,
        }
        for name, content in _manifest_files(manifest).items():
            (folder / name).write_bytes(content)
        open_bundle(folder)  # what was written must open, or it is not put in place


def _manifest_files(manifest: Mapping[str, Any]) -> dict[str, bytes]:
    """The manifest and its checksum, by name."""
    text = (json.dumps(manifest, indent=1, ensure_ascii=False) + "\n").encode()
    checksum = f"{hashlib.sha256(text).hexdigest()}  {MANIFEST}\n".encode()
    return {MANIFEST: text, CHECKSUM: checksum}


def add_file(bundle: Bundle, name: str, content: bytes) -> Bundle:
    """Put one more file into a bundle that is in place already; its digest changes.

    A crash on the way leaves a bundle that opens.
    """
    write_atomic(bundle.path / name, content)
    manifest = json.loads((bundle.path / MANIFEST).read_bytes())
    manifest["files"][name] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    for file, text in _manifest_files(manifest).items():
        write_atomic(bundle.path / file, text)
    return open_bundle(bundle.path)


def open_bundle(path: Path) -> Bundle:
    """Read and validate the bundle in folder `path`; sizes are checked, hashes are not.

    Raises BundleError naming the file and the remedy.
    """
    manifest_path = path / MANIFEST
    try:
        raw = manifest_path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"{path} is not a bundle: it has no {MANIFEST}; "
            "give a catalog name (`leangen pull --list`) or a folder made by `leangen export`"
        ) from None
    except OSError as error:
        raise BundleError(f"cannot read {manifest_path}: {error.strerror}") from error
    try:
        manifest = json.loads(raw)
        if manifest["schema"] != SCHEMA:
            raise BundleError(
                f"{manifest_path} has schema {manifest['schema']!r}, this leangen reads {SCHEMA!r}:"
                " update leangen or export the model again"
            )
        entries = {key: _entry(manifest, key, str) for key in ("name", "family", "scheme")}
        for key in ("graphs", "config", "source", "quantization", "files"):
            entries[key] = _entry(manifest, key, dict)
        entries["config"] = _Config(entries["config"], manifest_path)
        bundle = Bundle(path=path, digest="sha256:" + hashlib.sha256(raw).hexdigest(), **entries)
        for name, entry in bundle.files.items():
            _check_file(path, name, int(entry["bytes"]))
        for role, name in bundle.graphs.items():
            if name not in bundle.files:
                raise BundleError(f"{manifest_path}: graph {role!r} names {name!r}, no such file")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            f"{manifest_path} is damaged ({type(error).__name__}: {error}): export the model again"
        ) from error
    return bundle


def _entry(manifest: Any, key: str, kind: type) -> Any:
    value = manifest[key]
    if not isinstance(value, kind):
        raise TypeError(
            f"{key} is {value!r}, expected a JSON {'text' if kind is str else 'object'}"
        )
    return value


class _Config(dict[str, Any]):
    """What a family reads of a manifest; what it misses there is the bundle's fault."""

    def __init__(self, values: Mapping[str, Any], manifest: Path) -> None:
        super().__init__(values)
        self._manifest = manifest

    def __missing__(self, key: str) -> Any:
        raise BundleError(f"{self._manifest} lacks {key!r} in its config: export the model again")


def _check_file(folder: Path, name: str, size_bytes: int) -> None:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name:
        raise BundleError(f"{folder / MANIFEST}: file name {name!r} leaves the bundle; refused")
    path = folder / name
    if not path.is_file():
        raise BundleError(
            f"bundle {folder} lacks {name!r}: copy it whole, or pull or export the model again"
        )
    if path.resolve().parent != (folder.resolve() / parts).parent:
        raise BundleError(f"bundle {folder}: {name!r} is a link out of the bundle; refused")
    actual = path.stat().st_size
    if actual != size_bytes:
        raise BundleError(
            f"bundle {folder}: {name!r} has {actual} bytes, its manifest says {size_bytes}: "
            "pull or export the model again"
        )


def verify(bundle: Bundle) -> None:
    """Hash every file and the manifest; BundleError names the first that differs."""
    checksum = bundle.path / CHECKSUM
    if checksum.exists():  # bundles of older versions have none
        told = checksum.read_bytes().decode(errors="replace")
        if told != f"{bundle.digest.removeprefix('sha256:')}  {MANIFEST}\n":
            raise BundleError(
                f"bundle {bundle.path}: {MANIFEST} is not what {CHECKSUM} says: one of them was "
                "changed; pull or export the model again"
            )
    for name, entry in bundle.files.items():
        actual = sha256_file(bundle.path / name)
        if actual != entry["sha256"]:
            raise BundleError(
                f"bundle {bundle.path}: {name!r} has sha256 {actual[:12]}..., its manifest says "
                f"{str(entry['sha256'])[:12]}...: pull or export the model again"
            )
