"""A GGUF file of a language model, read and checked: metadata, shape, weights.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import quants

from leangen.errors import SourceError, UnsupportedError
from leangen.exporters import checkpoint, gguf_blocks, rope
from leangen.exporters.checkpoint import Layout, Rows
from leangen.exporters.context import choose
from leangen.exporters.decoder import Matrix
from leangen.exporters.gguf_architectures import ARCHITECTURES, ROPE_TENSORS
from leangen.exporters.gguf_blocks import Floats

MAGIC = b"GGUF"
TYPES = ("F32", "F16", "BF16", *gguf_blocks.FORMS)
"""Tensor types that can be exported, in either form."""


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
        self.architecture = str(self.value("general.architecture"))

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value, or `default`; SourceError when it is missing and has no default."""
        value = self.metadata.get(key, default)
        if value is None:
            raise SourceError(f"{self.path} lacks the metadata key {key!r}: convert it again")
        return value

    def hyper(self, key: str, default: Any = None) -> Any:
        """A value of the architecture: `hyper("block_count")` is `llama.block_count`."""
        return self.value(f"{self.architecture}.{key}", default)

    @contextmanager
    def understood(self) -> Iterator[None]:
        """Around the reading of metadata, each value of which may be anything."""
        try:
            yield
        except (TypeError, ValueError, ZeroDivisionError) as error:
            raise SourceError(
                f"{self.path} has metadata of a wrong type or value ({error}): convert it again"
            ) from error

    def has(self, tensor: str) -> bool:
        """Whether there is a tensor of that name."""
        return tensor in self.tensors

    def numbers(self, tensor: str) -> list[float]:
        """The values of a small float tensor; SourceError when there is none of that name."""
        if not self.has(tensor):
            raise SourceError(f"{self.path} lacks the tensor {tensor!r}: convert it again")
        stored = self.tensors[tensor]
        if stored.tensor_type.name not in ("F32", "F16"):
            raise ValueError(f"{tensor} is of type {stored.tensor_type.name}, expected F32")
        values: list[float] = stored.data.astype(np.float64).reshape(-1).tolist()
        return values


class Checkpoint(checkpoint.Checkpoint):
    """The weights of a GGUF file under the names of `decoder.Weights`; checks them all first."""

    def __init__(self, file: GgufFile, *, keep_blocks: bool, context: int | None = None) -> None:
        layout, self.reasons = choose(read_layout(file), context)
        super().__init__(layout)
        self.file = file
        self.keep_blocks = keep_blocks
        self.config = self.layout.config
        _check_types(file)
        self.check(file.path)
        self._check_unknown()

    def _shape(self, tensor: str) -> tuple[int, ...] | None:
        if tensor not in self.file.tensors:
            return None
        return tuple(map(int, self.file.tensors[tensor].shape[::-1]))

    def _rows(self, tensor: str) -> Rows:
        rows: Rows = self.file.tensors[tensor].data
        return rows

    def _floats(self, tensor: str, rows: Rows) -> Floats:
        return np.asarray(
            quants.dequantize(rows, self.file.tensors[tensor].tensor_type), np.float32
        )

    def _matrix(self, tensor: str, rows: Rows) -> Matrix:
        kind = self.file.tensors[tensor].tensor_type.name
        if self.keep_blocks and kind in gguf_blocks.FORMS:
            return gguf_blocks.unpack(kind, rows)
        return self._floats(tensor, rows)

    def _check_unknown(self) -> None:
        """UnsupportedError for tensors that the architecture, as leangen builds it, has not."""
        divisors, *factors = ROPE_TENSORS
        known = {*factors} if self.file.has(factors[0]) else {divisors}
        for name, _ in checkpoint.expected(self.layout):
            known |= {self._tensor(name), self._tensor(name, ".bias")}
        unknown = sorted(self.file.tensors.keys() - known)
        if unknown:
            raise _unsupported(
                self.file,
                f"tensors that a {self.file.architecture} model does not: {', '.join(unknown[:8])}",
            )


def read_layout(file: GgufFile) -> Layout:
    """The model's shape; UnsupportedError for another architecture or variants not built."""
    if file.architecture not in ARCHITECTURES:
        near = difflib.get_close_matches(file.architecture, ARCHITECTURES, n=1, cutoff=0.3)
        nearest = f" (the nearest is {near[0]})" if near else ""
        raise UnsupportedError(
            f"{file.path} is a GGUF of architecture {file.architecture!r}{nearest}: leangen "
            f"exports {', '.join(ARCHITECTURES)}; choose a file of one of them"
        )
    for key in ("attention.head_count", "attention.head_count_kv"):
        if isinstance(file.hyper(key, 0), list):
            raise _unsupported(file, "head counts that differ from layer to layer")
    with file.understood():
        layout = ARCHITECTURES[file.architecture](file)
        _check_supported(file, layout)
    return layout


def _check_supported(file: GgufFile, layout: Layout) -> None:
    config = layout.config
    if file.hyper("attention.value_length", config.head_dim) != config.head_dim:
        raise _unsupported(file, "values of another head size than the keys")
    if config.head_dim % 16 or config.heads % config.kv_heads:
        heads = f"{config.heads} heads of {config.head_dim} on {config.kv_heads} key heads"
        raise _unsupported(file, heads)
    _check_ropes(file, layout)
    if file.metadata.get("split.count", 1) > 1:
        raise UnsupportedError(
            f"{file.path} is one of {file.metadata['split.count']} parts of a model: "
            "merge them with llama-gguf-split first"
        )
    windowed = any(config.window(layer) for layer in range(config.layers))
    if 0 < file.hyper("attention.sliding_window", 0) < config.context and not windowed:
        raise _unsupported(file, "attention over a sliding window")


def _check_ropes(file: GgufFile, layout: Layout) -> None:
    rotated = layout.rotary_dims
    if rotated % 2 or not 0 < rotated <= layout.config.head_dim:
        raise ValueError(f"{rotated} of {layout.config.head_dim} numbers of a head are rotated")
    if file.hyper("rope.scale_linear", 1) != 1:
        raise _unsupported(file, "rope scaling by the old key rope.scale_linear")
    for parameters in layout.ropes.values():
        kind, factor = parameters["rope_type"], file.hyper("rope.scaling.factor", 1)
        if kind not in rope.KINDS:
            raise _unsupported(file, f"rope scaling of type {kind!r}")
        if kind == "longrope" and factor != 1:
            raise _unsupported(file, f"rope.scaling.factor {factor} beside the factors of longrope")
        if kind != "longrope" and (attention := file.hyper("rope.scaling.attn_factor", 1)) != 1:
            raise _unsupported(file, f"rope.scaling.attn_factor {attention} without longrope")
        if kind == "yarn" and (mix := file.hyper("rope.scaling.yarn_ext_factor", 1)) not in (1, -1):
            raise _unsupported(file, f"rope.scaling.yarn_ext_factor {mix}")
        rope.check(parameters, rotated)


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
