"""A folder that transformers saved an encoder-decoder in, to a bundle: T5, mT5, Whisper.

As `transformers_lm`, it reads `config.json`, `*.safetensors` and `tokenizer.json` itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leangen.bundle import Bundle, create, open_bundle
from leangen.errors import SourceError
from leangen.exporters import encoder_graph, llm_graph, whisper
from leangen.exporters.checkpoint import Checkpoint, Layout
from leangen.exporters.encoder_decoders import ENCODER_DECODERS
from leangen.exporters.transformers_folder import (
    CONFIG,
    Tensors,
    copy_tokenizer,
    default_source,
    folder_of,
    open_tensors,
    read_json,
)
from leangen.exporters.transformers_lm import checked_layout

if TYPE_CHECKING:
    from leangen.exporters.difference import Difference


def accepts(path: Path) -> bool:
    """Whether it is a folder (or its `config.json`) of an encoder-decoder that leangen knows."""
    path = folder_of(path)
    try:
        return read_json(path / CONFIG).get("model_type") in ENCODER_DECODERS
    except SourceError:
        return False


def export(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    source: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Bundle:
    """Export the model in folder `path` to a bundle in folder `out`; see `transformers_lm.export`.

    The bundle has the graphs `encoder` and `decoder`.
    """
    path = folder_of(path)
    json = read_json(path / CONFIG)
    stored = open_tensors(path)[1].keys()
    layout = checked_layout(path, lambda: ENCODER_DECODERS[json["model_type"]](json, stored))
    sound = json["model_type"] == "whisper"
    with Tensors(path, layout) as checkpoint, create(out, replace=replace) as draft:
        layout = checkpoint.layout
        draft.name = name or path.resolve().name.lower()
        draft.family, draft.scheme = "seq2seq", "fp32"
        mels = int(json.get("num_mel_bins", 80)) if sound else 0
        draft.graphs = write_graphs(draft.folder, layout, checkpoint, mels=mels)
        draft.config = {
            "architecture": json["model_type"],
            **shape(layout),
            **copy_tokenizer(path, draft.folder),
        }
        if sound:
            generation = path / "generation_config.json"
            said = json | (read_json(generation) if generation.is_file() else {})
            draft.config |= whisper.speech_config(draft.folder, layout, mels, said)
        else:
            start = json.get("decoder_start_token_id")
            start = json.get("pad_token_id", 0) if start is None else start
            draft.config |= {"task": "text", "start": [start]}
        draft.source = dict(source or default_source(path, checkpoint.files))
    return open_bundle(out)


def check(path: Path, bundle: Bundle) -> list[Difference]:
    """Compare the bundle with torch; see `transformers_check`."""
    from leangen.exporters import transformers_check

    return transformers_check.seq2seq_differences(folder_of(path), bundle)


def write_graphs(folder: Path, layout: Layout, weights: Checkpoint, *, mels: int) -> dict[str, str]:
    """Write both graphs; the manifest's `graphs`."""
    assert layout.encoder is not None  # every description of an encoder-decoder has one
    encoder_graph.write(folder, layout.encoder, layout.config, weights, mels=mels)
    llm_graph.write(folder, layout.config, weights, "decoder")
    return {"encoder": "encoder.onnx", "decoder": "decoder.onnx"}


def shape(layout: Layout) -> dict[str, Any]:
    """What a family must know of the decoder and its encoder."""
    config = layout.config
    assert layout.encoder is not None
    return {
        "context_length": config.context,
        "source_length": layout.encoder.context,
        **config.stated,
    }
