"""A whole bundle in one file: a tar archive of its folder, as leangen-zoo keeps models of several
graphs.

What comes out has the archive's graphs, settings and numeric probe; its name and its source are
the caller's.
"""

from __future__ import annotations

import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leangen import bundle as bundles
from leangen.bundle import Bundle, create, open_bundle
from leangen.errors import BundleError, SourceError


def accepts(path: Path) -> bool:
    """Whether it is named like an archive that is not compressed: `*.tar`."""
    return path.suffix == ".tar"


def export(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    source: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Bundle:
    """Unpack the bundle in `path`, an archive or the folder of one; every hash is checked.

    Raises SourceError for what is no archive of a bundle, and for a damaged one.
    """
    with tempfile.TemporaryDirectory(prefix="leangen-") as scratch:
        folder = path if path.is_dir() else Path(scratch)
        try:
            if not path.is_dir():
                with tarfile.open(path, "r:") as archive:
                    archive.extractall(folder, filter="data")
            packed = open_bundle(folder)
            bundles.verify(packed)
        except (tarfile.TarError, OSError, BundleError) as error:
            raise SourceError(
                f"{path} is not a whole bundle ({error}): expected a tar archive of the folder "
                "that `leangen export` writes"
            ) from None
        with create(out, replace=replace) as draft:
            for file in packed.files:
                target = draft.folder / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / file, target)
            draft.name, draft.family, draft.scheme = (
                name or packed.name,
                packed.family,
                packed.scheme,
            )
            draft.graphs, draft.config = dict(packed.graphs), dict(packed.config)
            draft.source = {**packed.source, **(source or {})}
            draft.quantization = dict(packed.quantization)
    return open_bundle(out)
