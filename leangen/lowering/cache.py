"""Where lowered models lie, and that they are whole.

    BUNDLE/.lowered/                    or $LEANGEN_HOME/lowered/DIGEST/ if the bundle is read-only
        lock                            held while one is made
        model-avx2-1f0c.../             role, variant, hash of all that it depends on
            lowered.json                how many nodes each rule put in place; every file's size
            model.onnx, model.fp32.onnx, model.onnx.data

An entry appears whole or not at all. One that is damaged is made again, and making one removes
those of the same role and variant that have become stale.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from leangen.bundle import Bundle, sha256_file
from leangen.errors import BundleError, StorageError
from leangen.files import atomic_folder, default_home

FOLDER = ".lowered"
MANIFEST = "lowered.json"
LOCK = "lock"


@dataclass(frozen=True, slots=True)
class Entry:
    """One lowered model on the disk."""

    path: Path
    nodes: Mapping[str, int]
    """Nodes that each rule put in place; none at all means that the graph stays as it is."""


def roots(bundle: Bundle) -> tuple[Path, Path]:
    """The folders that may hold a bundle's lowered models: beside it, else in the store."""
    digest = bundle.digest.removeprefix("sha256:")[:16]
    return bundle.path / FOLDER, default_home() / "lowered" / digest


def name_of(role: str, variant: str, depends_on: tuple[str, ...]) -> str:
    """An entry's folder: what it is for, and a hash of all that it depends on."""
    digest = hashlib.sha256("\0".join(depends_on).encode()).hexdigest()[:16]
    return f"{role}-{variant}-{digest}"


def find(bundle: Bundle, name: str) -> Entry | None:
    """The whole entry of that name, or None."""
    for root in roots(bundle):
        if (entry := _read(root / name)) is not None:
            return entry
    return None


def _read(path: Path) -> Entry | None:
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        whole = all(
            (path / name).stat().st_size == int(entry["bytes"])
            for name, entry in manifest["files"].items()
        )
        nodes = {str(rule): int(count) for rule, count in manifest["nodes"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Entry(path, nodes) if whole else None


def make(bundle: Bundle, name: str, write: Callable[[Path], Mapping[str, int]]) -> Entry:
    """Find or make the entry; `write` fills a folder and says how many nodes were put in place.

    A second process that wants the same waits for the first one's. Raises StorageError when
    neither place can be written or the disk is full.
    """
    from filelock import FileLock

    root = _writable_root(bundle)
    with FileLock(root / LOCK):
        if (entry := find(bundle, name)) is not None:
            return entry
        _remove_stale(root, name)
        with atomic_folder(root / name, replace=True) as folder:
            nodes = dict(write(folder))
            files = {
                path.name: {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
                for path in sorted(folder.iterdir())
            }
            manifest = {"bundle": bundle.digest, "nodes": nodes, "files": files}
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return Entry(root / name, nodes)


def _writable_root(bundle: Bundle) -> Path:
    places = roots(bundle)
    for root in places:
        try:
            root.mkdir(parents=True, exist_ok=True)
            (root / LOCK).touch()
        except OSError as error:
            why = error.strerror
        else:
            return root
    raise StorageError(
        f"cannot write the lowered model to {places[0]} or {places[1]}: {why}; "
        "set LEANGEN_HOME to a folder that can be written"
    )


def _remove_stale(root: Path, name: str) -> None:
    """What killed processes left, and entries for the same role and variant; the lock is held."""
    stem = name.rpartition("-")[0]
    for path in root.iterdir():
        if path.is_dir() and (path.name.startswith(".") or path.name.startswith(f"{stem}-")):
            shutil.rmtree(path, ignore_errors=True)


def discard(path: Path) -> None:
    """Remove an entry that does not load."""
    shutil.rmtree(path, ignore_errors=True)


def verify(bundle: Bundle) -> int:
    """Hash every file of the bundle's lowered models; how many there are.

    BundleError names the first that differs.
    """
    count = 0
    for root in roots(bundle):
        for manifest in sorted(root.glob(f"*/{MANIFEST}")):
            try:
                files = json.loads(manifest.read_bytes())["files"].items()
                differs = [n for n, e in files if sha256_file(manifest.parent / n) != e["sha256"]]
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                differs = [MANIFEST]
            if differs:
                raise BundleError(
                    f"lowered model {manifest.parent}: {differs[0]!r} is not what was written: "
                    "remove the folder, the next start makes it again"
                )
            count += len(files)
    return count
