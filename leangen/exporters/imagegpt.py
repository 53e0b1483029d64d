"""A folder that transformers saved an ImageGPT in, to a bundle that draws images.

The colours that its tokens stand for are `clusters` of `preprocessor_config.json`, of three
channels or of one. A model that begins with a label in place of one token has their names as
`labels` in its `config.json`; its last tokens are theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import numpy as np

from leangen.bundle import Bundle, create, open_bundle
from leangen.errors import SourceError, UnsupportedError
from leangen.exporters import llm_graph
from leangen.exporters.architectures import ARCHITECTURES
from leangen.exporters.checkpoint import Checkpoint, Json, Layout
from leangen.exporters.gguf_blocks import Floats
from leangen.exporters.transformers_folder import (
    CONFIG,
    Tensors,
    default_source,
    folder_of,
    model_type,
    read_json,
)
from leangen.exporters.transformers_lm import checked_layout
from leangen.families.image_tokens import COLOURS

KIND = "imagegpt"
PREPROCESSOR = "preprocessor_config.json"


def accepts(path: Path) -> bool:
    """Whether it is a folder (or its `config.json`) of an ImageGPT."""
    return model_type(path) == KIND


def export(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    source: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Bundle:
    """Export the model in folder `path` to a bundle in folder `out`; see `transformers_lm.export`.

    Raises SourceError where the colours are missing or do not fit.
    """
    path = folder_of(path)
    json = read_json(path / CONFIG)
    shape = checked_layout(path, lambda: layout(json))
    colours = _colours(path, shape.config.head_vocab)
    side = math.isqrt(shape.config.context)
    if side**2 != shape.config.context:
        raise UnsupportedError(f"{path} draws {shape.config.context} pixels, expected a square")
    with Tensors(path, shape) as checkpoint, create(out, replace=replace) as draft:
        draft.name = name or path.resolve().name.lower()
        write(draft.folder, shape, checkpoint, colours)
        draft.family, draft.graphs = "autoregressive", {"model": "model.onnx"}
        draft.config = config_of(shape, json.get("labels", ()))
        draft.source = dict(source or default_source(path, checkpoint.files))
    return open_bundle(out)


def layout(json: Json) -> Layout:
    """GPT-2 with RMS norms, a head of its own, and a token that only begins."""
    base = ARCHITECTURES["gpt2"]({**json, "tie_word_embeddings": False})
    starts = len(json.get("labels", ())) or 1
    config = changed(base.config, norm="rms", head_vocab=json["vocab_size"] - starts)
    return changed(base, config=config)


def write(folder: Path, shape: Layout, weights: Checkpoint, colours: Floats) -> None:
    """Write the graph and the colours."""
    llm_graph.write(folder, shape.config, weights)
    np.save(folder / COLOURS, colours)


def config_of(shape: Layout, labels: Sequence[str] = ()) -> dict[str, Any]:
    """The keys that `families.image_tokens` reads."""
    config = shape.config
    side = math.isqrt(config.context)
    return {
        "architecture": KIND,
        "task": "image",
        **config.stated,
        "head_size": config.head_vocab,
        "size": [side, side],
        "start": config.head_vocab,
        "conditions": {"label": label_condition(labels)} if labels else {},
        "range": [-1.0, 1.0],
    }


def label_condition(names: Sequence[str]) -> dict[str, Any]:
    """A condition that is one of these labels."""
    return {
        "min": 0,
        "max": len(names) - 1,
        "default": 0,
        "shape": [],
        "dtype": "int64",
        "names": {name: place for place, name in enumerate(names)},
    }


def _colours(path: Path, count: int) -> Floats:
    said = read_json(path / PREPROCESSOR)
    colours = np.asarray(said.get("clusters") or [], np.float32)
    if colours.shape not in ((count, 3), (count, 1)):
        raise SourceError(
            f"{path / PREPROCESSOR} has clusters of shape {list(colours.shape)}, expected "
            f"[{count}, 3]: the colours that the tokens stand for"
        )
    return colours
