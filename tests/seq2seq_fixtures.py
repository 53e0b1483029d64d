"""Tiny encoder-decoders without torch: a T5, and a Whisper as CTranslate2 saves it."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, processors

from leangen.bundle import Bundle, create, open_bundle
from leangen.exporters.checkpoint import Checkpoint, expected
from leangen.exporters.encoder_decoders import ENCODER_DECODERS
from leangen.exporters.transformers_seq2seq import shape, write_graphs

VOCAB = 96
T5 = {
    "model_type": "t5", "vocab_size": VOCAB, "d_model": 64, "d_kv": 32, "d_ff": 96,
    "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2,
    "relative_attention_num_buckets": 8,
}  # fmt: skip


class Random(Checkpoint):
    """Weights of the shapes that a layout asks for."""

    def __init__(self, layout):
        super().__init__(layout)
        rng = np.random.default_rng(0)
        self.stored = {}
        for name, wanted in expected(layout):
            size = [96 if n is None else n for n in wanted]
            if layout.transposed and name.startswith("layers."):
                size = size[::-1]
            scale = 1 / np.sqrt(size[-1]) if len(size) > 1 else 0.1
            self.stored[self._tensor(name)] = rng.normal(size=size).astype(np.float32) * scale

    def _shape(self, tensor):
        return self.stored[tensor].shape if tensor in self.stored else None

    def _rows(self, tensor):
        return self.stored[tensor]

    def _floats(self, tensor, rows):
        return np.asarray(rows, np.float32)


def text_to_text(folder: Path) -> Bundle:
    """A T5 of two and two layers."""
    words = {f"<{i}>": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<3>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <2>", special_tokens=[("<2>", 2)]
    )
    layout = ENCODER_DECODERS["t5"](T5, ())
    with create(folder / "bundle") as draft:
        draft.name, draft.family = "tiny-t5", "seq2seq"
        draft.graphs = write_graphs(draft.folder, layout, Random(layout), mels=0)
        tokenizer.save(str(draft.folder / "tokenizer.json"))
        draft.config = {
            **shape(layout), "task": "text", "start": [0],
            "bos_id": None, "eos_ids": [2], "chat_template": None,
        }  # fmt: skip
    return open_bundle(folder / "bundle")


def text(value: str) -> bytes:
    return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"


def ctranslate2(
    folder: Path, change=lambda tensors: None, *, vocab=VOCAB, dtype=np.float16
) -> Path:
    """Write a Whisper of 2 + 2 layers as `model.bin`, `config.json`, `tokenizer.json`."""
    rng = np.random.default_rng(0)
    width, hidden, mels = 64, 96, 80
    tensors = {
        "decoder/num_heads": np.int16(2),
        "encoder/num_heads": np.int16(2),
        "decoder/embeddings/weight": rng.normal(size=(vocab, width)),
        "decoder/position_encodings/encodings": rng.normal(size=(40, width)) * 0.1,
        "encoder/position_encodings/encodings": rng.normal(size=(60, width)) * 0.1,
        "encoder/conv1/weight": rng.normal(size=(width, mels, 3)) / 15,
        "encoder/conv2/weight": rng.normal(size=(width, width, 3)) / 14,
    }
    tensors |= {f"encoder/conv{i}/bias": rng.normal(size=width) * 0.1 for i in (1, 2)}
    norms = ["encoder/layer_norm", "decoder/layer_norm"]
    for side in ("encoder", "decoder"):
        for layer in range(2):
            stem = f"{side}/layer_{layer}"
            sizes = {
                "self_attention/linear_0": (3 * width, width),
                "self_attention/linear_1": (width, width),
                "ffn/linear_0": (hidden, width),
                "ffn/linear_1": (width, hidden),
            }
            norms += [f"{stem}/self_attention/layer_norm", f"{stem}/ffn/layer_norm"]
            if side == "decoder":
                sizes |= {
                    "attention/linear_0": (width, width),
                    "attention/linear_1": (2 * width, width),
                    "attention/linear_2": (width, width),
                }
                norms.append(f"{stem}/attention/layer_norm")
            for name, size in sizes.items():
                tensors[f"{stem}/{name}/weight"] = rng.normal(size=size) / np.sqrt(size[1])
                tensors[f"{stem}/{name}/bias"] = rng.normal(size=size[0]) * 0.1
    for name in norms:
        tensors[f"{name}/gamma"] = 1 + rng.normal(size=width) * 0.1
        tensors[f"{name}/beta"] = rng.normal(size=width) * 0.1
    change(tensors)
    types = {np.float32: 0, np.int8: 1, np.int16: 2, np.float16: 4}
    content = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    for name, array in tensors.items():
        array = np.asarray(array)
        array = array.astype(dtype) if array.dtype.kind == "f" else array
        content += text(name) + struct.pack("<B", array.ndim)
        content += struct.pack(f"<{array.ndim}I", *array.shape)
        content += struct.pack("<BI", types[array.dtype.type], array.nbytes) + array.tobytes()
    content += struct.pack("<I", 1) + text("decoder/projection/weight")
    content += text("decoder/embeddings/weight")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.bin").write_bytes(content)
    said = {"suppress_ids": [7, 9], "suppress_ids_begin": [2, 11]}
    (folder / "config.json").write_text(json.dumps(said))
    words = {f"w{i}": i for i in range(vocab)}
    for i, special in ((1, "startoftranscript"), (2, "endoftext"), (80, "notimestamps")):
        del words[f"w{i}"]
        words[f"<|{special}|>"] = i
    Tokenizer(models.WordLevel(words, unk_token="w3")).save(str(folder / "tokenizer.json"))
    return folder / "model.bin"
