"""Writing files so that a crash, a full disk or Ctrl-C leaves the old state or the new one."""

from __future__ import annotations

import errno
import glob
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from leangen.errors import StorageError

_STAGING = "tmp-made-"
_BINARY: int = getattr(os, "O_BINARY", 0)  # Windows would change line ends


def default_home() -> Path:
    """The store's folder: `$LEANGEN_HOME`, else the platform's cache."""
    if home := os.environ.get("LEANGEN_HOME"):
        return Path(home)
    import platformdirs

    return platformdirs.user_cache_path("leangen")


def _explain(error: OSError, path: Path) -> StorageError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free
        return StorageError(
            f"disk full while writing {path} ({free / 1e6:.0f} MB free): "
            "free some space (`leangen gc`, `leangen rm`) and try again"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"cannot write {path}: {error.strerror}; choose a writable place")
    return StorageError(f"cannot write {path}: {error.strerror or error}")


def fsync_tree(folder: Path) -> None:
    """Flush every file under `folder`, and the folders, to the disk."""
    for path in [folder, *folder.rglob("*")]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def check_free(target: Path) -> None:
    """StorageError unless nothing is at `target`, or an empty folder."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StorageError(f"{target} exists already: choose another place or pass --force")


@contextmanager
def atomic_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A fresh sibling folder to write into, renamed to `target` when the block succeeds.

    On any exception, KeyboardInterrupt included, the temporary folder is removed and `target` is
    as it was; what a killed process left goes at the next try. Raises StorageError when `target`
    exists and `replace` is false, and for a full or read-only disk.
    """
    if not replace:
        check_free(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{glob.escape(target.name)}.{_STAGING}*"):
            if (held := _hold(left)) is not None:  # nobody else does, so nobody writes it any more
                shutil.rmtree(left, ignore_errors=True)
                os.close(held)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.{_STAGING}", dir=target.parent))
    except OSError as error:
        raise _explain(error, target) from error
    held = _hold(staging)
    try:
        os.chmod(staging, 0o755)
        yield staging
        fsync_tree(staging)
        if not replace:
            check_free(target)  # another process may have been quicker
        if target.exists():
            # rename(2) replaces only empty folders, so the old one steps aside first.
            aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
            os.rename(target, aside / "old")
            os.rename(staging, target)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(staging, target)
    except OSError as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise _explain(error, target) from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        if held is not None:
            os.close(held)


def _hold(folder: Path) -> int | None:
    """A descriptor that locks a folder until it is closed, or None where another process has it.

    None as well where folders cannot be locked: not on this system, or not on that disk.
    """
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return None
    descriptor: int | None = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into, a sibling of `path` that takes its name when the block succeeds.

    On any exception it is removed and `path` is as it was. A link stays one, and what it leads to
    is replaced; what is no file, such as /dev/stdout or a pipe, is written to as it stands. Raises
    StorageError for a full or read-only disk.
    """
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as file:
                yield file
            return
        target = path.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_name(f".{target.name}.tmp-{secrets.token_hex(4)}")
        fd = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666)
    except OSError as error:
        raise _explain(error, path) from error
    try:
        with os.fdopen(fd, "wb") as file:
            if target.exists():
                os.chmod(staging, stat.S_IMODE(target.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, target)
    except OSError as error:
        staging.unlink(missing_ok=True)
        raise _explain(error, path) from error
    except BaseException:
        staging.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` through a sibling temporary file and a rename."""
    with atomic_file(path) as file:
        file.write(data)


def size_of(path: Path) -> int:
    """Bytes of the files under `path`; links count nothing, files that vanish meanwhile neither."""
    if not path.is_dir() or path.is_symlink():
        return _size(path)
    return sum(_size(Path(folder, name)) for folder, _, names in os.walk(path) for name in names)


def _size(path: Path) -> int:
    try:
        return 0 if path.is_symlink() else path.stat().st_size
    except FileNotFoundError:
        return 0
