"""Reading the small text files of /sys: a number, or the fault that names why there is none."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from leangen.meters.meter import MeterFault

_INTEGER = re.compile(rb"-?[0-9]+")


def text(path: Path) -> str | None:
    """The stripped text of a file; None when it cannot be read or is empty."""
    try:
        # Device-tree strings end with a NUL.
        return path.read_text(encoding="utf-8", errors="replace").strip("\0 \t\r\n") or None
    except OSError:
        return None


def integer(file: str) -> int:
    """The integer in `file`, opened anew: a vanished one must not go unseen. Raises MeterFault."""
    try:
        fd = os.open(file, os.O_RDONLY)
        try:
            raw = os.read(fd, 64).strip()
        finally:
            os.close(fd)
    except FileNotFoundError as error:
        raise MeterFault("vanished", error.strerror) from None
    except PermissionError as error:
        raise MeterFault("permission", error.strerror) from None
    except OSError as error:
        gone = error.errno in (errno.ENODEV, errno.ENXIO)
        raise MeterFault("vanished" if gone else "unreadable", error.strerror) from None
    if not _INTEGER.fullmatch(raw):
        raise MeterFault("garbage", f"{raw!r} is not a whole number")
    return int(raw)


def count(file: str) -> int:
    """An `integer` that is not negative."""
    value = integer(file)
    if value < 0:
        raise MeterFault("garbage", f"{value} is not a count")
    return value


def children(folder: Path) -> list[Path]:
    """What lies in a folder, `hwmon2` before `hwmon10`; nothing when it cannot be listed."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return [folder / name for name in sorted(names, key=_natural)]


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", name)]


def hwmon(root: Path) -> Iterator[tuple[Path, str]]:
    """Every hwmon device under `root`: its folder and its driver's name."""
    for folder in children(root / "sys/class/hwmon"):
        if name := text(folder / "name"):
            yield folder, name


def remedy(fault: MeterFault, file: Path, root: Path) -> str:
    """What would make `file` readable, where that is a matter of permission."""
    if fault.fault != "permission":
        return ""
    return f"`sudo chmod a+r /{file.relative_to(root)}` until the next boot, or a udev rule"
