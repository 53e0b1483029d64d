"""A Whisper model that CTranslate2 saved (`model.bin`), to a transcription bundle.

The file, all little-endian (opennmt.net/CTranslate2, `python/ctranslate2/specs/model_spec.py`):

    u32 version, string spec, u32 revision
    u32 count, then for each tensor: string name, u8 rank, u32 sizes, u8 type, u32 bytes, data
    u32 count, then for each alias: string name, string of what

where a string is u16 bytes, the last of which is 0. Nothing in it is code.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from leangen.bundle import Bundle, create, open_bundle, sha256_file
from leangen.errors import SourceError, UnsupportedError
from leangen.exporters import whisper
from leangen.exporters.checkpoint import Held, Layout, Rows
from leangen.exporters.encoder_decoders import whisper_layout
from leangen.exporters.transformers_folder import TOKENIZER, read_json
from leangen.exporters.transformers_seq2seq import shape, write_graphs

MODEL = "model.bin"
VERSION = 6
_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


def accepts(path: Path) -> bool:
    """Whether it is a `model.bin` with CTranslate2's header, or the folder of one."""
    path = _file(path)
    if path.name != MODEL or not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(6)
        if len(head) < 6:
            return False
        version, length = struct.unpack("<IH", head)
        return version <= VERSION and file.read(length).endswith(b"Spec\0")


def export(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    source: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Bundle:
    """Export the Whisper in `model.bin`, or in the folder of one, to a bundle in folder `out`.

    `config.json` and `tokenizer.json` lie beside it. Raises SourceError for a damaged file,
    UnsupportedError for another model or quantized weights, StorageError.
    """
    path = _file(path)
    said, tokenizer = read_json(path.parent / "config.json"), path.parent / TOKENIZER
    if not tokenizer.is_file():
        raise SourceError(f"{path.parent} has no {TOKENIZER}: expected it beside {MODEL}")
    stored = _read(path)
    weights = _Tensors(path, stored, _layout(path, stored))
    layout, mels = weights.layout, int(weights.stored["encoder/conv1/weight"].shape[1])
    with create(out, replace=replace) as draft:
        draft.name = name or path.resolve().parent.name.lower()
        draft.family, draft.scheme = "seq2seq", "fp32"
        draft.graphs = write_graphs(draft.folder, layout, weights, mels=mels)
        (draft.folder / TOKENIZER).write_bytes(tokenizer.read_bytes())
        draft.config = {
            "architecture": "whisper",
            **shape(layout),
            "chat_template": None,
            **whisper.speech_config(
                draft.folder,
                layout,
                mels,
                {
                    "suppress_tokens": said.get("suppress_ids"),
                    "begin_suppress_tokens": said.get("suppress_ids_begin"),
                },
            ),
        }
        draft.source = dict(
            source or {"kind": "ctranslate2", "file": path.name, "sha256": sha256_file(path)}
        )
    return open_bundle(out)


def _file(path: Path) -> Path:
    return path / MODEL if path.is_dir() else path


class _Tensors(Held):
    """The weights in a `model.bin`, mapped into memory."""

    def _tensor(self, name: str, suffix: str = ".weight") -> str:
        stem = super()._tensor(name, "")
        if stem.endswith("layer_norm"):
            return stem + {".weight": "/gamma", ".bias": "/beta"}[suffix]
        if stem.endswith("encodings"):
            return stem
        return stem + suffix.replace(".", "/")


def _layout(path: Path, stored: Mapping[str, Rows]) -> Layout:
    """The shape of a Whisper, from its tensors."""
    names = {
        "embed": "decoder/embeddings",
        "positions": "decoder/position_encodings/encodings",
        "norm": "decoder/layer_norm",
        "encoder.conv1": "encoder/conv1",
        "encoder.conv2": "encoder/conv2",
        "encoder.positions": "encoder/position_encodings/encodings",
        "encoder.norm": "encoder/layer_norm",
    }
    for prefix, side in (("", "decoder"), ("encoder.", "encoder")):
        layer = f"{side}/layer_{{i}}"
        names |= {
            f"{prefix}attn_norm": f"{layer}/self_attention/layer_norm",
            f"{prefix}qkv": f"{layer}/self_attention/linear_0",
            f"{prefix}o": f"{layer}/self_attention/linear_1",
            f"{prefix}mlp_norm": f"{layer}/ffn/layer_norm",
            f"{prefix}up": f"{layer}/ffn/linear_0",
            f"{prefix}down": f"{layer}/ffn/linear_1",
        }
    for label, part in (("norm", "layer_norm"), ("q", "linear_0"), ("kv", "linear_1")):
        names[f"cross_{label}"] = f"decoder/layer_{{i}}/attention/{part}"
    names["cross_o"] = "decoder/layer_{i}/attention/linear_2"
    joint = {label: ("qkv", place) for place, label in enumerate("qkv")}
    joint |= {"cross_k": ("cross_kv", 0), "cross_v": ("cross_kv", 1)}
    whole = [f"{stem}/weight" for stem in (names["embed"], names["encoder.conv1"])]
    whole += [names["positions"], names["encoder.positions"], "encoder/num_heads"]
    if missing := [tensor for tensor in whole if tensor not in stored]:
        raise UnsupportedError(
            f"{path} has no {', '.join(missing)}: of CTranslate2's models leangen takes Whisper"
        )
    low = [name for name, rows in stored.items() if rows.ndim > 1 and rows.dtype.kind != "f"]
    if low:
        raise UnsupportedError(
            f"{path} holds {stored[low[0]].dtype} weights ({low[0]}): give a model in float16 or "
            "float32, which leangen quantizes itself"
        )
    vocab, width = stored[whole[0]].shape
    layers = [
        sum(name.endswith("/ffn/linear_0/weight") and name.startswith(side) for name in stored)
        for side in ("encoder", "decoder")
    ]
    heads = [int(stored[f"{side}/num_heads"]) for side in ("encoder", "decoder")]
    return whisper_layout(
        names,
        width=width,
        layers=(layers[0], layers[1]),
        heads=(heads[0], heads[1]),
        vocab=vocab,
        contexts=(len(stored[names["encoder.positions"]]), len(stored[names["positions"]])),
        joint=joint,
    )


def _read(path: Path) -> dict[str, Rows]:
    """The tensors by name. Raises SourceError for a file that is none, or cut off."""
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _tensors(data)
    except (OSError, ValueError, struct.error, UnicodeDecodeError) as error:
        raise SourceError(
            f"{path} is not a whole CTranslate2 model ({error}): download it again"
        ) from error


def _tensors(data: mmap.mmap) -> dict[str, Rows]:
    place = 0

    def take(form: str) -> int:
        nonlocal place
        (value,) = struct.unpack_from(f"<{form}", data, place)
        place += struct.calcsize(f"<{form}")
        return int(value)

    def text() -> str:
        nonlocal place
        length = take("H")
        place += length
        return data[place - length : place - 1].decode()

    if (version := take("I")) > VERSION:
        raise ValueError(f"version {version}, expected up to {VERSION}")
    text(), take("I")
    tensors: dict[str, Rows] = {}
    for _ in range(take("I")):
        name = text()
        sizes = [take("I") for _ in range(take("B"))]
        kind, length = take("B"), take("I")
        if kind not in _TYPES:
            raise ValueError(f"tensor {name} is of type {kind}, expected one of {list(_TYPES)}")
        count = int(np.prod(sizes, dtype=np.int64))
        if count * np.dtype(_TYPES[kind]).itemsize != length:
            raise ValueError(f"tensor {name} of {sizes} has {length} bytes")
        tensors[name] = np.frombuffer(data, _TYPES[kind], count, place).reshape(sizes)
        place += length
    return tensors
