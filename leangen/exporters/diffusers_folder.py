"""A folder that diffusers saved a pipeline in, or a bare UNet, to a diffusion bundle.

One bundle for the pipeline, a graph for each of its components. No code that comes with a model is
ever run; weights are taken one at a time. Graphs that optimum has exported already are taken as
they are (`diffusers_onnx`). torch and diffusers are needed here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leangen.bundle import Bundle, create, open_bundle
from leangen.errors import RequestError
from leangen.exporters import diffusers_reuse
from leangen.exporters.diffusers_saved import CONFIG, INDEX, Saved

if TYPE_CHECKING:
    from leangen.exporters.difference import Difference
    from leangen.exporters.diffusers_components import Form


def accepts(path: Path) -> bool:
    """Whether it is a folder with a pipeline's index, or with a component's config."""
    if (path / INDEX).is_file():
        return True
    return (path / CONFIG).is_file() and '"_class_name"' in (path / CONFIG).read_text(
        encoding="utf-8", errors="replace"
    )


def export(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    source: Mapping[str, Any] | None = None,
    replace: bool = False,
    reuse: bool = False,
) -> Bundle:
    """Export the pipeline in folder `path` to a bundle in folder `out`.

    With `reuse` steps may take the deep features of those before them: see `diffusers_reuse`.
    Raises SourceError for damaged or missing files, UnsupportedError for what leangen cannot run,
    DependencyError without torch and diffusers, StorageError.
    """
    saved = Saved(path)
    from leangen.exporters import diffusers_config  # after it is known that diffusers is there

    with create(out, replace=replace) as draft:
        draft.name = name or path.resolve().name.lower()
        draft.family = "diffusion"
        written: dict[str, dict[str, Form]] = {}
        hashes: dict[str, str] = {}
        for component in saved.components():
            forms = component.write(draft)
            written[component.name] = forms
            hashes |= component.hashes()
        if reuse:
            diffusers_reuse.split(draft.folder)
            draft.graphs["shallow"] = "shallow.onnx"
        draft.config = diffusers_config.describe(saved, written, draft)
        own = {"kind": "diffusers", "pipeline": saved.kind, "folder": path.resolve().name}
        draft.source = dict(source or own | {"sha256": hashes})
    return open_bundle(out)


def check(path: Path, bundle: Bundle) -> list[Difference]:
    """Compare the bundle with torch; see `diffusers_check`.

    Raises RequestError for a folder of ONNX graphs.
    """
    from leangen.exporters import diffusers_check

    saved = Saved(path)
    if saved.onnx:
        raise RequestError(
            f"--check compares with torch, and {path} holds ONNX graphs only: leave it out"
        )
    return diffusers_check.differences(saved, bundle)
