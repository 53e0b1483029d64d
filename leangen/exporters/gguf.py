"""GGUF files of language models to a language bundle.

Two forms of the same weights: `fp32` dequantizes them, `gguf` carries the low-bit blocks over bit
for bit (see `gguf_blocks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from leangen.bundle import Bundle, create, open_bundle, sha256_file
from leangen.errors import UnsupportedError
from leangen.exporters import gguf_tokenizer, llm_graph
from leangen.exporters.gguf_checkpoint import MAGIC, Checkpoint, GgufFile
from leangen.families import properties

Form = Literal["fp32", "gguf"]


def accepts(path: Path) -> bool:
    """Whether the file starts with GGUF's magic bytes."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def export(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    source: Mapping[str, Any] | None = None,
    replace: bool = False,
    form: Form = "fp32",
    context: int | None = None,
) -> Bundle:
    """Export the GGUF file `path` to a bundle in folder `out`.

    `source` is kept in the manifest (by default the file's name, hash and licence); `context` is
    that of `transformers_lm.export`. Raises SourceError for a damaged file, UnsupportedError for
    what leangen cannot run, RequestError for a context that the model has not, StorageError.
    """
    if form not in get_args(Form):
        raise UnsupportedError(f"form is {form!r}, expected one of {', '.join(get_args(Form))}")
    file = GgufFile(path)
    checkpoint = Checkpoint(file, keep_blocks=form == "gguf", context=context)
    config = checkpoint.config
    with create(out, replace=replace) as draft:
        draft.name = name or path.stem.lower()
        draft.family = "language"
        draft.scheme = form
        draft.graphs["model"] = "model.onnx"
        nodes = llm_graph.write(draft.folder, config, checkpoint)
        with file.understood():
            draft.config = {
                "architecture": file.architecture,
                "context_length": config.context,
                **config.stated,
                **gguf_tokenizer.write(draft.folder, file.metadata),
                **properties.from_metadata(file.metadata, config.vocab),
                **checkpoint.reasons,
            }
        stored_as = sorted({tensor.tensor_type.name for tensor in file.tensors.values()})
        draft.source = {
            **(source or _default_source(path, file.metadata)),
            "weights": f"as stored in the GGUF file: {', '.join(stored_as)}",
        }
        if form == "gguf":
            draft.quantization = _quantization(nodes, tied_head=config.tied_head)
    return open_bundle(out)


def _default_source(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    licence = metadata.get("general.license")
    return {"kind": "gguf", "file": path.name, "sha256": sha256_file(path), "licence": licence}


def _quantization(nodes: Mapping[str, Mapping[str, Any]], *, tied_head: bool) -> dict[str, Any]:
    """The manifest's account: each node's form, its cost and the reason."""
    account = {}
    for path, held in nodes.items():
        reason = f"{held['form']} blocks of the file carried over bit for bit"
        if held["form"] == "fp32":
            reason = "a float tensor in the file: no blocks to carry over"
        elif held["activations"] == "fp32" and path != "/embed":
            reason += "; fp32 activations, as rounding in the last MLP reaches the logits undamped"
        account[path] = {
            "scheme": held["form"],
            "bits_per_weight": held["bits_per_weight"],
            "activations": held["activations"],
            "reason": reason,
        }
    stored = [held for path, held in nodes.items() if not (tied_head and path == "/lm_head")]
    weights = sum(held["weights"] for held in stored)
    bits = sum(held["weights"] * held["bits_per_weight"] for held in stored)
    return {"method": "gguf", "bits_per_weight": round(bits / weights, 3), "nodes": account}
