"""The store's folder: where things lie, who works on them, what is there, and removing it.

    $LEANGEN_HOME/
        models/NAME/SCHEME/     bundles, each with what leangen.lowering made of it
        lowered/                what it made of bundles elsewhere that are read-only
        steps/, tune/           what `--steps auto` and `leangen tune` measured once
        sources/NAME/           what was downloaded; garbage as soon as the bundles are made
        locks/NAME.lock         who works on a model; empty, and never removed: on Unix that would
                                let two processes hold the "same" lock
        ledger.sqlite           receipts, kept by leangen.ledger
        budgets.json            limits, kept by leangen.budget

One file lock per model. The kernel frees the lock of a killed process, so whatever is half-written
while nobody holds the lock is a leftover.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from leangen.bundle import MANIFEST
from leangen.errors import StorageError
from leangen.files import default_home, size_of

Notify = Callable[[str], None]


class BusyError(StorageError):
    """Another process holds the model's lock."""


class Home:
    """The folder `path`, else `$LEANGEN_HOME`, else the platform's cache; made on first use."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = (path or default_home()).expanduser().absolute()

    def models(self, name: str) -> Path:
        """The folder of a model's bundles, one per scheme."""
        return self.path / "models" / _key(name)

    def sources(self, name: str) -> Path:
        """The folder of what was downloaded for a model."""
        return self.path / "sources" / _key(name)

    def names(self, kind: str) -> list[str]:
        """The names under `models` or `sources`."""
        return [unquote(path.name) for path in _folders(self.path / kind)]

    def bundles(self, name: str) -> dict[str, Path]:
        """Scheme to folder of a model's bundles, whole or damaged."""
        folders = _folders(self.models(name))
        return {path.name: path for path in folders if (path / MANIFEST).is_file()}

    def leftovers(self, name: str) -> list[Path]:
        """Staging folders of killed processes; to be trusted only under the model's lock."""
        return [
            path
            for folder in (self.models(name), self.sources(name))
            for mark in ("tmp", "old")
            for path in sorted(folder.glob(f".*.{mark}-*"))
        ]

    def lowered(self) -> list[dict[str, Any]]:
        """A row for each folder of lowered models, which can be made again."""
        rows = [
            row(f"{name}:{scheme} (lowered)", folder, name=name)
            for name in self.names("models")
            for scheme, path in self.bundles(name).items()
            for folder in sorted(path.glob(".*lowered*"))  # and what a killed `gc` left of one
        ]
        elsewhere = self.path / "lowered"
        return (
            [*rows, row("lowered, of bundles elsewhere", elsewhere)] if elsewhere.is_dir() else rows
        )

    def measured(self) -> list[dict[str, Any]]:
        """A row for each folder of measurements, which can be made again."""
        told = {"steps": "measured for --steps auto", "tune": "measured by leangen tune"}
        found = {name: self.path / name for name in told}
        return [row(told[name], path) for name, path in found.items() if path.is_dir()]

    def downloads(self, name: str) -> list[Path]:
        """All that lies in the model's sources."""
        folder = self.sources(name)
        return sorted(folder.iterdir()) if folder.is_dir() else []

    def delete(self, paths: Sequence[Path]) -> None:
        """Remove files or folders; a kill half-way leaves a leftover, never half a bundle."""
        for path in paths:
            try:
                aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
                os.rename(path, aside / path.name)
                shutil.rmtree(aside, ignore_errors=True)  # what resists is a leftover for the next
                with suppress(OSError):  # not empty: something else is there
                    path.parent.rmdir()
            except OSError as error:
                raise StorageError(f"cannot remove {path}: {error.strerror}") from error

    def usage(self) -> list[dict[str, Any]]:
        """Bytes on disk: each bundle and its lowered models, each model's downloads, the rest."""
        lowered = self.lowered()
        rows = [
            row(f"{name}:{scheme}", path, name=name, scheme=scheme)
            for name in self.names("models")
            for scheme, path in self.bundles(name).items()
        ]
        for bundle in rows:
            inside = (r["bytes"] for r in lowered if str(Path(r["path"]).parent) == bundle["path"])
            bundle["bytes"] -= sum(inside)
        rows += [*lowered, *self.measured()]
        rows += [
            row(f"{name} (source)", self.sources(name), name=name) for name in self.names("sources")
        ]
        rest = row("other", self.path)
        rest["bytes"] -= sum(entry["bytes"] for entry in rows)
        return [*rows, rest] if rest["bytes"] > 0 else rows

    @contextmanager
    def lock(self, name: str, say: Notify | None = None) -> Iterator[None]:
        """Hold a model's lock. When it is taken, wait and say so; BusyError without `say`."""
        from filelock import FileLock, Timeout

        path = self.path / "locks" / f"{_key(name)}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                if say is None:
                    raise BusyError(
                        f"another process is working on {name}: try again when it is done"
                    ) from None
                say(f"{name}: another process is preparing it, waiting")
                lock.acquire()
        except OSError as error:
            raise StorageError(
                f"cannot use the store {self.path}: {error.strerror}; "
                "set LEANGEN_HOME to a folder that can be written"
            ) from error
        try:
            yield
        finally:
            lock.release()


def row(
    what: str, path: Path, *, name: str | None = None, scheme: str | None = None
) -> dict[str, Any]:
    """One line of `leangen du` and `leangen gc`, plain types."""
    return {
        "what": what,
        "name": name,
        "scheme": scheme,
        "bytes": size_of(path),
        "path": str(path),
    }


def _key(name: str) -> str:
    """A model's name as one folder name, `unquote` gives it back: `hf:a/b` is `hf%3Aa%2Fb`."""
    return quote(name, safe="@")


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    return sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
