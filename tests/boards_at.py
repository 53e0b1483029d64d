"""The fake trees of tests/boards, and a copy of one that a test may write to."""

from __future__ import annotations

import shutil
from pathlib import Path

BOARDS = Path(__file__).parent / "boards"
NAMES = sorted(path.name for path in BOARDS.iterdir() if path.is_dir())


def copy(name: str, folder: Path) -> Path:
    """A copy of a board under `folder`."""
    return Path(shutil.copytree(BOARDS / name, folder / name, symlinks=True))


def write(root: Path, **files: object) -> None:
    """Write files under `root`; `__` stands for `/` in their names."""
    for name, content in files.items():
        put(root, name.replace("__", "/"), content)


def put(root: Path, path: str, content: object) -> None:
    """Write one file of a tree."""
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{content}\n")
