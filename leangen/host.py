"""The machine and the process: what a receipt says of where it was made."""

from __future__ import annotations

import ctypes
import hashlib
import platform
import resource
import secrets
import sys
from functools import lru_cache
from pathlib import Path

from leangen.errors import StorageError
from leangen.files import write_atomic
from leangen.records import Host

ID_FILE = "machine-id"


def host(*, root: Path = Path("/"), home: Path | None = None, device: str = "cpu") -> Host:
    """This machine and this boot, told apart from others without naming them.

    The id is a hash of /etc/machine-id, which must not leave the machine itself (machine-id(5));
    where there is none, a random id kept in `home`, or else one that holds for this boot.
    `boot_id` is `unknown` where the kernel gives none.
    """
    boot_id = _text(root / "proc/sys/kernel/random/boot_id") or "unknown"
    machine = _text(root / "etc/machine-id") or _kept_id(home) or f"boot:{boot_id}"
    return Host(id=_hash(machine), boot_id=boot_id, device=device)


def _hash(secret: str) -> str:
    return hashlib.sha256(f"leangen:{secret}".encode()).hexdigest()[:16]


def _kept_id(home: Path | None) -> str | None:
    if home is None:
        return None
    if not (kept := _text(home / ID_FILE)):
        try:
            write_atomic(home / ID_FILE, secrets.token_hex(16).encode())
        except StorageError:  # a read-only home: the id then lasts for this boot
            return None
        kept = _text(home / ID_FILE)
    return kept


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident, in bytes.

    From VmHWM: `ru_maxrss` also counts the parent's size before exec, so a small process that a
    large one started would look large.
    """
    for line in (_text(Path("/proc/self/status")) or "").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@lru_cache(maxsize=1)
def _versions() -> tuple[tuple[str, str], ...]:
    packages = {
        "leangen": ("leangen",),
        "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
        "numpy": ("numpy",),
    }
    found = []
    for name, distributions in packages.items():
        # What is imported says it itself: importlib.metadata takes 10 ms of a first token.
        version = getattr(sys.modules.get(name), "__version__", None)
        if version := version or next(filter(None, map(_version, distributions)), None):
            found.append((name, version))
    return (*found, ("python", platform.python_version()))


def _version(distribution: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str]:
    """Versions of leangen, onnxruntime, numpy and Python, without importing them.

    A package that is not there is left out.
    """
    return dict(_versions())


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or None
    except OSError:
        return None


def trim_memory() -> None:
    """Give memory that was freed back to the system, where the C library is glibc.

    It keeps what threads have freed for their like: a process that loads and unloads models grows
    with each of them otherwise.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
