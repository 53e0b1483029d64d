"""What transformers saves of a model: its config, its weights, its tokenizer.

Weights are in safetensors, or in pickles that hold tensors alone, which torch reads.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from leangen.bundle import sha256_file
from leangen.errors import SourceError, UnsupportedError, needs
from leangen.exporters import pickled
from leangen.exporters.checkpoint import Checkpoint, Layout, Rows
from leangen.exporters.gguf_blocks import Floats
from leangen.exporters.rope import positive

CONFIG, TOKENIZER, TEMPLATE = "config.json", "tokenizer.json", "chat_template.jinja"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
FLOATS = ("F32", "F16", "BF16", "F64")
"""Types of weights in safetensors that are whole in themselves."""


def folder_of(path: Path) -> Path:
    """The folder of a model, which the path of its `config.json` may stand for."""
    return path.parent if path.name == CONFIG else path


def model_type(path: Path) -> str | None:
    """What the `config.json` of a folder says it is; None where there is none that can be read."""
    try:
        kind: str | None = read_json(folder_of(path) / CONFIG).get("model_type")
    except SourceError:
        return None
    return kind


def open_tensors(path: Path) -> tuple[list[Path], dict[str, Any]]:
    """The files with a folder's weights, and by tensor the opened file that has it."""
    files = _weight_files(path)
    tensors: dict[str, Any] = {}
    for file in files:
        opened = _open(file) if file.suffix == ".safetensors" else pickled.Opened(file)
        tensors.update(dict.fromkeys(opened.keys(), opened))
    return files, tensors


def _open(file: Path) -> Any:
    message = f"{file} holds safetensors: `pip install safetensors`"
    with needs("safetensors", "ml_dtypes", message=message):
        import ml_dtypes  # noqa: F401  gives NumPy bfloat16
        from safetensors import SafetensorError, safe_open
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{file} is truncated or damaged ({error}): download it again") from error


def _weight_files(path: Path) -> list[Path]:
    """Those that transformers would read; others may lie beside them, in another's layout."""
    for name in WEIGHTS:
        whole, index = path / name, path / f"{name}.index.json"
        if whole.is_file():
            return [whole]
        if index.is_file():
            return _indexed(path, index)
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise SourceError(
            f"{path} holds neither *.safetensors nor {WEIGHTS[1]}: expected a folder that "
            "save_pretrained wrote"
        )
    return files


def _indexed(path: Path, index: Path) -> list[Path]:
    names = sorted({str(name) for name in (read_json(index).get("weight_map") or {}).values()})
    missing = [name for name in names if not (path / name).is_file()]
    if missing or not names:
        what = ", ".join(missing) or "weights"
        raise SourceError(f"{path} lacks {what}, by its {index.name}: download it again")
    return [path / name for name in names]


class Tensors(Checkpoint):
    """The weights in a folder's files."""

    def __init__(self, path: Path, layout: Layout) -> None:
        super().__init__(layout)
        self.files, self._tensors = open_tensors(path)
        # Some were saved without what stands around the layers: `h.0` for `transformer.h.0`.
        self._bare = layout.names["embed"] + ".weight" not in self._tensors
        if layout.config.tied_head and self._has_own_head():
            self.layout = replace(layout, config=replace(layout.config, tied_head=False))
        self.check(path)

    def _has_own_head(self) -> bool:
        """Whether a head is stored that is not the embedding: then no word of tying holds."""
        head, embed = self.layout.names.get("head", "") + ".weight", self._tensor("embed")
        if not {head, embed} <= self._tensors.keys():
            return False
        return not np.array_equal(self._rows(head), self._rows(embed))

    def __enter__(self) -> Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.clear()  # closes the files

    def _tensor(self, name: str, suffix: str = ".weight") -> str:
        stored = super()._tensor(name, suffix)
        return stored.partition(".")[2] if self._bare and stored.count(".") > 1 else stored

    def _shape(self, tensor: str) -> tuple[int, ...] | None:
        if tensor not in self._tensors:
            return None
        return tuple(self._tensors[tensor].get_slice(tensor).get_shape())

    def _rows(self, tensor: str) -> Rows:
        held = self._tensors[tensor]
        kind = held.get_slice(tensor).get_dtype()
        if kind not in FLOATS:
            raise UnsupportedError(
                f"{tensor} is of type {kind}, expected {', '.join(FLOATS)}: "
                "give the model before it was quantized"
            )
        rows: Rows = held.get_tensor(tensor)
        return rows

    def _floats(self, tensor: str, rows: Rows) -> Floats:
        return np.asarray(rows, np.float32)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; SourceError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(f"there is no {path}: expected a folder of transformers") from error
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path} is not a JSON object: download it again")
    return content


def check_numbers(path: Path, json: Mapping[str, Any]) -> None:
    """SourceError where a size or a number of `config.json` is none."""
    for key, value in json.items():
        whole = type(value) is int and value > 0
        if key in _SIZES and not whole and not (value is None and key in _OPTIONAL):
            raise SourceError(
                f"{path / CONFIG} has {key} {value!r}, expected a whole number above 0"
            )
        if key in _NUMBERS and not (positive(value) or (value is None and key in _OPTIONAL)):
            raise SourceError(f"{path / CONFIG} has {key} {value!r}, expected a number above 0")


_SIZES = frozenset(
    (
        *("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"),
        *("num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window"),
        *("num_experts", "num_local_experts", "num_experts_per_tok", "decoder_sparse_step"),
        *("n_layer", "n_embd", "n_head", "n_positions", "no_rope_layer_interval"),
        *("d_model", "d_kv", "num_heads", "num_layers", "num_decoder_layers", "num_mel_bins"),
        *("encoder_layers", "decoder_layers", "max_source_positions", "max_target_positions"),
        *("encoder_attention_heads", "decoder_attention_heads", "sliding_window_pattern"),
        *("relative_attention_num_buckets", "relative_attention_max_distance"),
    )
)
_NUMBERS = frozenset(
    (
        *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "query_pre_attn_scalar"),
        *("attn_logit_softcapping", "final_logit_softcapping"),
    )
)
_OPTIONAL = frozenset(
    (
        *("num_key_value_heads", "head_dim", "sliding_window", "num_decoder_layers"),
        *("attn_logit_softcapping", "final_logit_softcapping"),
    )
)
"""What may be null."""


def copy_tokenizer(
    path: Path, folder: Path, said: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Copy the tokenizer and the chat template; the bundle's config keys about them.

    `said` has `bos_token_id` and `eos_token_id`; by default `config.json` and
    `generation_config.json` have them.
    """
    if not (path / TOKENIZER).is_file():
        raise SourceError(
            f"{path} has no {TOKENIZER}: save it there with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        Tokenizer.from_file(str(path / TOKENIZER))
    except Exception as error:  # tokenizers raises no other type
        raise SourceError(
            f"{path / TOKENIZER} is no tokenizer ({error}): download it again"
        ) from error
    shutil.copyfile(path / TOKENIZER, folder / TOKENIZER)
    template: Any = None
    if (path / TEMPLATE).is_file():
        template = (path / TEMPLATE).read_text(encoding="utf-8")
    elif (path / "tokenizer_config.json").is_file():
        template = read_json(path / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    if template:
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
    config, ends = said, None
    if config is None:
        config, generation = read_json(path / CONFIG), path / "generation_config.json"
        ends = read_json(generation).get("eos_token_id") if generation.is_file() else None
    ends = config.get("eos_token_id") if ends is None else ends
    return {
        "bos_id": config.get("bos_token_id"),
        "eos_ids": [] if ends is None else ends if isinstance(ends, list) else [ends],
        "chat_template": TEMPLATE if template else None,
    }


def default_source(path: Path, files: Sequence[Path]) -> dict[str, Any]:
    """What the manifest says of a folder that no one described."""
    hashes = {file.name: sha256_file(file) for file in files}
    return {"kind": "transformers", "folder": path.resolve().name, "sha256": hashes}
