"""What `eval`, `compare` and `tune` judge quality by: the same options, read the same way."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leangen.console import Progress, say

if TYPE_CHECKING:
    from leangen.bundle import Bundle
    from leangen.quality import Task
    from leangen.store import Store

TOKENS, PROMPTS = 2048, 4
RECOGNISER = "whisper-tiny-en"


def task_options(sub: argparse.ArgumentParser) -> None:
    """Every option defaults to None: what is not given is the family's default."""
    group = sub.add_argument_group("what quality is judged by")
    group.add_argument(
        "--data", type=Path, help="a text; rows (.npy, .csv); images (folder, .npy, .npz)"
    )
    group.add_argument("--tokens", type=int, help=f"language: tokens to score; default {TOKENS}")
    group.add_argument(
        "--prompts", type=int, help=f"language: greedy continuations; default {PROMPTS}"
    )
    group.add_argument("--new-tokens", type=int, help="language: length of each; default 64")
    group.add_argument("--seeds", type=int, help="images, speech: samples to draw; default 4")
    group.add_argument("--steps", type=int, help="diffusion: steps; default: the model's")
    group.add_argument(
        "--reuse", type=int, metavar="N", help="diffusion: what reuse costs; see `generate`"
    )
    group.add_argument("--rows", type=int, help="flow: samples to draw; default 4096")
    group.add_argument("--features", type=Path, metavar="ONNX", help="images: a feature network")
    group.add_argument(
        "--recogniser",
        metavar="MODEL",
        help=f"speech: what tells words, or `none`; default {RECOGNISER} (tune: none)",
    )


def task_of(
    args: argparse.Namespace,
    store: Store,
    bundle: Bundle,
    progress: Progress | None = None,
    *,
    recogniser: str = RECOGNISER,
) -> Task:
    """The task that was asked for; a language model's text defaults to the catalog's for it."""
    from leangen.families import key
    from leangen.quality import Task

    names = (
        *("data", "tokens", "prompts", "new_tokens", "seeds", "steps", "rows", "features"),
        "reuse",
    )
    given: dict[str, Any] = {
        name: getattr(args, name) for name in names if getattr(args, name) is not None
    }
    if bundle.family == "language":
        given = {"tokens": TOKENS, "prompts": PROMPTS} | given
        if "data" not in given:
            given["data"] = _text(bundle, store, progress)
    recogniser = args.recogniser or recogniser
    if key(bundle) == "flow/speech" and recogniser != "none":
        heard_by = store.resolve(recogniser, notify=say, progress=progress)
        given["recogniser"] = heard_by.path
    return Task(**given)


def _text(bundle: Bundle, store: Store, progress: Progress | None) -> Path:
    """What a language model is judged on by default: words of its own kind."""
    entry = store.catalog.get(bundle.name)
    if entry is not None and entry.text is not None:
        return Path(__file__).parents[1] / "assets" / entry.text
    return store.data("wiki-text", notify=say, progress=progress)


def reference_of(bundle: Bundle, reference: str) -> str:
    """`--reference`: a scheme of the same model, or another model's name or folder."""
    from leangen.catalog import CATALOG

    another = reference in CATALOG or ":" in reference or Path(reference).is_dir()
    return reference if another or "/" in reference else f"{bundle.name}:{reference}"
