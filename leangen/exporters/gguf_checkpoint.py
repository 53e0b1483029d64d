"""A GGUF file of the llama architecture, read and checked: metadata, shape, weights.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import quants

from leangen.errors import SourceError, UnsupportedError
from leangen.exporters import gguf_blocks
from leangen.exporters.decoder import DecoderConfig, Matrix
from leangen.exporters.gguf_blocks import Floats

MAGIC = b"GGUF"
ARCHITECTURE = "llama"
TYPES = ("F32", "F16", "BF16", *gguf_blocks.FORMS)
"""Tensor types that can be exported, in either form."""

_MODEL = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
_LAYER = {
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
_ROPE_FACTORS = "rope_freqs.weight"


class GgufFile:
    """An opened GGUF file: `metadata` by key, `tensors` by name (memory-mapped)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as start:
                magic = start.read(len(MAGIC))
        except OSError as error:
            raise SourceError(f"cannot read {path}: {error.strerror}") from error
        if magic != MAGIC:
            raise SourceError(
                f"{path} is not a GGUF file (it starts with {magic!r}, expected {MAGIC!r}): "
                "give the path of a .gguf file"
            )
        try:
            reader = gguf.GGUFReader(path)
            self.metadata: dict[str, Any] = {
                key: field.contents() for key, field in reader.fields.items()
            }
        except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
            detail = (str(error).splitlines() or [type(error).__name__])[0]
            raise SourceError(
                f"{path} is truncated or damaged ({path.stat().st_size} bytes; {detail}): "
                "download it again"
            ) from error
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value, or `default`; SourceError when it is missing and has no default."""
        value = self.metadata.get(key, default)
        if value is None:
            raise SourceError(f"{self.path} lacks the metadata key {key!r}: convert it again")
        return value

    def hyper(self, key: str, default: Any = None) -> Any:
        """A value of the architecture: `hyper("block_count")` is `llama.block_count`."""
        return self.value(f"{ARCHITECTURE}.{key}", default)


class Checkpoint:
    """The weights of a llama GGUF under the names of `decoder.Weights`; checks them all first."""

    def __init__(self, file: GgufFile, *, keep_blocks: bool) -> None:
        self.file = file
        self.keep_blocks = keep_blocks
        self.config = read_config(file)
        _check_types(file)
        _check_tensors(file, self.config)

    def gain(self, name: str) -> Floats:
        """A norm's gain [width]."""
        return self._floats(f"{_tensor_name(name)}.weight")

    def matrix(self, name: str) -> Matrix:
        """A weight [n, k] with q and k rows in half-rotation order."""
        tensor = self.file.tensors[f"{_tensor_name(name)}.weight"]
        rows = self._rotate_half(name, tensor.data)
        if self.keep_blocks and tensor.tensor_type.name in gguf_blocks.FORMS:
            return gguf_blocks.unpack(tensor.tensor_type.name, rows)
        return np.asarray(quants.dequantize(rows, tensor.tensor_type), np.float32)

    def bias(self, name: str) -> Floats | None:
        """A linear layer's bias [n], if the file has one."""
        tensor = f"{_tensor_name(name)}.bias"
        if tensor not in self.file.tensors:
            return None
        return self._rotate_half(name, self._floats(tensor))

    def inverse_frequencies(self, table: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Radians per position [head_dim / 2]: base, linear scaling, llama-3 factors."""
        head_dim = self.config.head_dim
        base = float(self.file.hyper("rope.freq_base", 10000.0))
        frequencies = base ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.file.hyper("rope.scaling.type", "none") == "linear":
            frequencies /= float(self.file.hyper("rope.scaling.factor"))
        if _ROPE_FACTORS in self.file.tensors:
            frequencies /= self._floats(_ROPE_FACTORS)
        return frequencies

    def _floats(self, tensor_name: str) -> Floats:
        tensor = self.file.tensors[tensor_name]
        return np.asarray(quants.dequantize(tensor.data, tensor.tensor_type), np.float32)

    def _rotate_half(self, name: str, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Put each head's rows (pairs beside each other) in the order: first of each, then second.

        llama GGUF files hold q and k for interleaved rotation; whole rows move, blocks stay.
        """
        label = name.rpartition(".")[2]
        if label not in ("q", "k"):
            return rows
        heads = self.config.heads if label == "q" else self.config.kv_heads
        pairs = rows.reshape(heads, self.config.head_dim // 2, 2, *rows.shape[1:])
        return pairs.swapaxes(1, 2).reshape(rows.shape)


def _tensor_name(name: str) -> str:
    """`layers.3.q` -> `blk.3.attn_q`."""
    if name in _MODEL:
        return _MODEL[name]
    _, layer, label = name.split(".")
    return f"blk.{layer}.{_LAYER[label]}"


def read_config(file: GgufFile) -> DecoderConfig:
    """The model's shape; UnsupportedError for another architecture or variants not built."""
    try:
        return _read_config(file)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise SourceError(
            f"{file.path} has metadata of a wrong type or value ({error}): convert it again"
        ) from error


def _read_config(file: GgufFile) -> DecoderConfig:
    architecture = file.value("general.architecture")
    if architecture != ARCHITECTURE:
        raise UnsupportedError(
            f"{file.path} is a GGUF of architecture {architecture!r}: leangen exports "
            f"{ARCHITECTURE!r} only; choose a llama-architecture file"
        )
    heads = file.hyper("attention.head_count")
    kv_heads = file.hyper("attention.head_count_kv", heads)
    if not (isinstance(heads, int) and isinstance(kv_heads, int)):
        raise _unsupported(file, "head counts that differ from layer to layer")
    width = int(file.hyper("embedding_length"))
    head_dim = int(file.hyper("attention.key_length", width // heads))
    if file.hyper("expert_count", 0):
        raise _unsupported(file, "a mixture of experts")
    if file.hyper("attention.value_length", head_dim) != head_dim:
        raise _unsupported(file, "values of another head size than the keys")
    if file.hyper("rope.dimension_count", head_dim) != head_dim:
        raise _unsupported(file, "rotation of a part of each head")
    if head_dim % 16 or heads % kv_heads:
        raise _unsupported(file, f"{heads} heads of {head_dim} on {kv_heads} key heads")
    if file.metadata.get("split.count", 1) > 1:
        raise UnsupportedError(
            f"{file.path} is one of {file.metadata['split.count']} parts of a model: "
            "merge them with llama-gguf-split first"
        )
    if 0 < file.hyper("attention.sliding_window", 0) < int(file.hyper("context_length")):
        raise _unsupported(file, "attention over a sliding window")
    if file.hyper("rope.scale_linear", 1) != 1:
        raise _unsupported(file, "rope scaling by the old key rope.scale_linear")
    scaling = file.hyper("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise _unsupported(file, f"rope scaling of type {scaling!r}")
    return DecoderConfig(
        layers=int(file.hyper("block_count")),
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        vocab=len(file.value("tokenizer.ggml.tokens")),
        context=int(file.hyper("context_length")),
        epsilon=float(file.hyper("attention.layer_norm_rms_epsilon")),
        tied_head="output.weight" not in file.tensors,
    )


def _unsupported(file: GgufFile, what: str) -> UnsupportedError:
    return UnsupportedError(f"{file.path} has {what}, which leangen cannot run yet")


def _check_types(file: GgufFile) -> None:
    unknown: dict[str, list[str]] = {}
    for name, tensor in file.tensors.items():
        if tensor.tensor_type.name not in TYPES:
            unknown.setdefault(tensor.tensor_type.name, []).append(name)
    if unknown:
        found = "; ".join(
            f"{kind} ({len(names)} tensors, such as {names[0]})" for kind, names in unknown.items()
        )
        raise UnsupportedError(
            f"{file.path} has tensors of type {found}: leangen exports {', '.join(TYPES)}; "
            "choose another quantization of this model, such as Q4_K_M"
        )


def _check_tensors(file: GgufFile, config: DecoderConfig) -> None:
    """SourceError listing missing and wrongly shaped tensors; UnsupportedError for unknown ones."""
    expected, optional = _expected_shapes(config, int(file.hyper("feed_forward_length")))
    found = {name: tuple(map(int, tensor.shape[::-1])) for name, tensor in file.tensors.items()}
    known = expected | optional
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [
        f"{name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in known.items()
        if name in found and found[name] != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise SourceError(
            f"{file.path} does not fit its own metadata: {'; '.join(wrong[:8])}{more}; "
            "download or convert it again"
        )
    unknown = sorted(found.keys() - known.keys())
    if unknown:
        raise _unsupported(file, f"tensors that a llama model does not: {', '.join(unknown[:8])}")


def _expected_shapes(
    config: DecoderConfig, mlp_width: int
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """Required and optional tensors with their shapes (rows first)."""
    width, mlp, q = config.width, mlp_width, config.heads * config.head_dim
    kv = config.kv_heads * config.head_dim
    rows_columns = {
        "q": (q, width),
        "k": (kv, width),
        "v": (kv, width),
        "o": (width, q),
        "gate": (mlp, width),
        "up": (mlp, width),
        "down": (width, mlp),
    }
    required: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.vocab, width),
        "output_norm.weight": (width,),
    }
    optional: dict[str, tuple[int, ...]] = {_ROPE_FACTORS: (config.head_dim // 2,)}
    if not config.tied_head:
        required["output.weight"] = (config.vocab, width)
    for layer in range(config.layers):
        for label in _LAYER:
            tensor = _tensor_name(f"layers.{layer}.{label}")
            if label in rows_columns:
                required[f"{tensor}.weight"] = rows_columns[label]
                optional[f"{tensor}.bias"] = rows_columns[label][:1]
            else:
                required[f"{tensor}.weight"] = (width,)
    return required, optional
