"""Replaces ORT's operators in a bundle's graphs by leangen's own, where this CPU has kernels.

A bundle stays portable: lowering happens at its first load, and the whole lowered model (graph and
packed weights) is kept beside it (see `cache`). A warm start reads neither the original weights nor
`onnx`.

A rule is one module with

    rewrite(graph: Draft) -> int    edits the graph in place; how many nodes it put in place

and one line in RULES. A node that no rule matches stays with ORT, so a rule matches exactly what it
can replace: it checks attributes, constants and shapes, and leaves the rest alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache as remember
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import leangen_kernels
import onnxruntime as ort

from leangen.bundle import Bundle
from leangen.errors import StorageError
from leangen.lowering import cache

if TYPE_CHECKING:
    from leangen.lowering.draft import Draft

VERSION = 13
"""To be raised when a rule or a packed layout changes, so that lowered models are made again."""

RULES = {
    "linear": "leangen.lowering.linear",
    "language": "leangen.lowering.language",
    "convolution": "leangen.lowering.convolution",
    "pixel_attention": "leangen.lowering.pixel_attention",
}
"""Rules in the order in which they are applied."""
ON_A_CARD = ("linear", "language")
"""Those of which `cuda` then moves all nodes to a card's operators."""

MODEL = "model.onnx"
"""The lowered graph; see `file_of` for its other forms."""
KV_FORMS = ("fp32", "fp16", "int8")
"""How a language model's keys and values can be kept."""


@dataclass(frozen=True, slots=True)
class Lowered:
    """A lowered graph on the disk."""

    path: Path
    variant: str
    """The kernels' instruction set, such as `avx2`."""
    library: Path
    """What ONNX Runtime must register before it loads the graph."""

    def discard(self) -> None:
        """Remove it, so that the next start makes it again."""
        cache.discard(self.path.parent)


def file_of(fp32_activations: bool, kv: str | None) -> str:
    """The file of a form of the lowered graph; `kv` is None for a graph that keeps none."""
    activations = ".fp32" * fp32_activations
    return f"model{activations}{'' if kv is None else f'.kv-{kv}'}.onnx"


def find(
    bundle: Bundle,
    role: str,
    *,
    fp32_activations: bool = False,
    kv: str = "fp16",
    device: str = "cpu",
) -> tuple[Lowered | None, str]:
    """The lowered graph of a role, made at the first call, or None; and the reason for either.

    kv: how keys and values are to be kept, of a graph that has any; on a card fp32 is fp16.
    device: `cpu`, or `cuda` for a card's operators.
    """
    variant, why = leangen_kernels.status()
    library = leangen_kernels.library()
    if variant is None or library is None:
        return None, f"ONNX Runtime's own: {why}"
    on_card = device == "cuda"
    if on_card:
        from leangen_kernels.cuda import driver

        if not (library.parent / "cuda" / driver.NAMES).exists():
            return None, "ONNX Runtime's own: the kernels for a card were not built"
        variant, why, kv = device, "on a card", "fp16" if kv == "fp32" else kv
    original = bundle.graph(role)
    depends_on = (str(VERSION), bundle.digest, role, ort.__version__, _hash(library))
    name = cache.name_of(role, variant, depends_on)
    entry = cache.find(bundle, name)
    if entry is None:
        try:
            lower = _lower_for_card if on_card else _lower
            entry = cache.make(bundle, name, lambda folder: lower(original, folder))
        except StorageError as error:
            return None, f"ONNX Runtime's own: {error}"
    if not entry.nodes:
        return None, "ONNX Runtime's own: leangen's kernels fit no node of it"
    path = entry.path / file_of(fp32_activations, kv)
    if not path.is_file():
        path = entry.path / file_of(fp32_activations, None)
    counts = ", ".join(f"{count} by {rule}" for rule, count in entry.nodes.items())
    return Lowered(path, variant, library), f"{why}; nodes replaced: {counts}"


def alone(path: Path, folder: Path) -> Lowered | None:
    """The lowered form of a graph outside of bundles, written to a new folder, if there is one."""
    variant, library = leangen_kernels.status()[0], leangen_kernels.library()
    if variant is None or library is None:
        return None
    folder.mkdir()
    return Lowered(folder / MODEL, variant, library) if _lower(path, folder) else None


@remember
def _hash(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _lower(path: Path, folder: Path) -> Mapping[str, int]:
    """Write the lowered graph in its forms, over the same weights; nothing if no rule matches."""
    from leangen.lowering.draft import Draft

    graph = Draft(path)
    counts = {name: import_module(module).rewrite(graph) for name, module in RULES.items()}
    return _save(graph, counts, folder)


def _lower_for_card(path: Path, folder: Path) -> Mapping[str, int]:
    """The same for a card; nothing also where it lacks an operator that the graph needs."""
    from leangen.lowering import cuda
    from leangen.lowering.draft import Draft

    graph = Draft(path)
    counts = {name: import_module(RULES[name]).rewrite(graph) for name in ON_A_CARD}
    return {} if cuda.rewrite(graph) is not None else _save(graph, counts, folder)


def _save(graph: Draft, counts: Mapping[str, int], folder: Path) -> Mapping[str, int]:
    import onnx

    from leangen.lowering import activations, caches, chain

    replaced = {name: count for name, count in counts.items() if count}
    if replaced:
        graph.finish()
        graph.save(folder / MODEL)
        usual, exact = (onnx.load(folder / MODEL, load_external_data=False) for _ in range(2))
        activations.use_fp32(exact)
        for fp32, model in enumerate((usual, exact)):
            for form in (None, *(KV_FORMS if caches.fit(model) else ())):
                kept = onnx.ModelProto()
                kept.CopyFrom(model)
                if form is not None:
                    caches.use(kept, form)
                chain.fuse(kept)
                (folder / file_of(bool(fp32), form)).write_bytes(kept.SerializeToString())
    return replaced
