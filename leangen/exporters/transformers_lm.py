"""A folder that transformers saved a causal language model in, to a language bundle.

It reads `config.json`, `*.safetensors` and `tokenizer.json` itself: no torch, and no code of the
model's. Weights are taken one at a time.
"""

from __future__ import annotations

import difflib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from leangen.bundle import Bundle, create, open_bundle, sha256_file
from leangen.errors import DependencyError, SourceError, UnsupportedError
from leangen.exporters import llm_graph
from leangen.exporters.architectures import ARCHITECTURES, Json, Layout
from leangen.exporters.gguf_blocks import Floats

if TYPE_CHECKING:
    from leangen.exporters.transformers_check import Difference

CONFIG, TOKENIZER, TEMPLATE = "config.json", "tokenizer.json", "chat_template.jinja"


def accepts(path: Path) -> bool:
    """Whether it is a folder with a `config.json` that names a `model_type`."""
    if not (path / CONFIG).is_file():
        return False
    try:
        return "model_type" in _json(path / CONFIG)
    except SourceError:
        return True  # `export` says what is wrong with it


def export(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    source: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Bundle:
    """Export the model in folder `path` to a bundle in folder `out`.

    `source` is kept in the manifest (by default the folder's name and its weights' hashes). Raises
    SourceError for damaged or missing files, UnsupportedError for what leangen cannot run,
    DependencyError without safetensors, StorageError.
    """
    layout = read_layout(path)
    config = layout.config
    with Checkpoint(path, layout) as checkpoint, create(out, replace=replace) as draft:
        draft.name = name or path.resolve().name.lower()
        draft.family = "language"
        draft.scheme = "fp32"
        draft.graphs["model"] = "model.onnx"
        llm_graph.write(draft.folder, config, checkpoint)
        draft.config = {
            "architecture": _json(path / CONFIG)["model_type"],
            "context_length": config.context,
            "layers": config.layers,
            "kv_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocab,
            **_tokenizer(path, draft.folder),
        }
        draft.source = dict(source or _default_source(path, checkpoint.files))
    return open_bundle(out)


def check(path: Path, bundle: Bundle) -> list[Difference]:
    """Compare the bundle with torch; see `transformers_check`."""
    from leangen.exporters import transformers_check

    return transformers_check.differences(path, bundle)


def read_layout(path: Path) -> Layout:
    """The shape of the model in a folder; UnsupportedError names what leangen cannot run."""
    config = _json(path / CONFIG)
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        near = difflib.get_close_matches(kind, ARCHITECTURES, n=1, cutoff=0.3)
        nearest = f" (the nearest is {near[0]})" if near else ""
        raise UnsupportedError(
            f"{path} is of architecture {kind!r}, expected one of "
            f"{', '.join(ARCHITECTURES)}{nearest}: convert it to GGUF, or to ONNX, first"
        )
    try:
        layout = ARCHITECTURES[kind](config)
    except KeyError as error:
        raise SourceError(f"{path / CONFIG} lacks {error}, which a {kind} has") from error
    except TypeError as error:
        raise SourceError(f"{path / CONFIG} has values of a wrong type: {error}") from error
    for problem in _problems(config, layout):
        raise UnsupportedError(f"{path} has {problem}, which leangen cannot run yet")
    return layout


def _problems(json: Json, layout: Layout) -> list[str]:
    config = layout.config
    found = [
        f"{key} {json[key]!r}"
        for key, expected in _ONLY.items()
        if key in json and json[key] not in expected
    ]
    if json.get("word_embed_proj_dim", config.width) != config.width:
        found.append("an embedding of another width than the layers")
    if config.activation not in ("silu", "gelu", "gelu_tanh", "relu"):
        found.append(f"activation {config.activation!r}")
    if config.head_dim % 16 or config.heads % config.kv_heads:
        found.append(f"{config.heads} heads of {config.head_dim} on {config.kv_heads} key heads")
    for parameters in layout.ropes.values():
        if parameters.get("rope_type", "default") not in ("default", "linear", "llama3"):
            found.append(f"rope of type {parameters['rope_type']!r}")
    return found


_ONLY: Mapping[str, tuple[Any, ...]] = {
    "do_layer_norm_before": (True,),
    "_remove_final_layer_norm": (False,),
    "layer_norm_elementwise_affine": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "use_bidirectional_attention": (False, None),
    "clip_qkv": (None,),
}
"""Values of `config.json` that a graph can be built for, where it has the key."""


class Checkpoint:
    """The weights in a folder's safetensors files, under the names of `decoder.Weights`."""

    def __init__(self, path: Path, layout: Layout) -> None:
        try:
            import ml_dtypes  # noqa: F401  gives NumPy bfloat16
            from safetensors import SafetensorError, safe_open
        except ModuleNotFoundError as error:
            if error.name not in ("safetensors", "ml_dtypes"):
                raise
            raise DependencyError(
                f"{path} holds safetensors, which needs `pip install 'leangen[export]'`"
            ) from None
        self.path = path
        self.layout = layout
        self.files = sorted(path.glob("*.safetensors"))
        if not self.files:
            raise SourceError(_no_weights(path))
        self._tensors: dict[str, Any] = {}
        for file in self.files:
            try:
                opened = safe_open(file, framework="np")
            except (SafetensorError, OSError) as error:
                raise SourceError(
                    f"{file} is truncated or damaged ({error}): download it again"
                ) from error
            self._tensors.update(dict.fromkeys(cast(Any, opened).keys(), opened))
        self._bare = layout.names["embed"] + ".weight" not in self._tensors
        self._check()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._tensors.clear()  # closes the files

    def gain(self, name: str) -> Floats:
        """A norm's gain."""
        gain = self._floats(self._tensor(name))
        return gain + np.float32(1) if self.layout.unit_gain else gain

    def matrix(self, name: str) -> Floats:
        """A weight [n, k] with q and k rows in half-rotation order, or a table [rows, width]."""
        label = name.rpartition(".")[2]
        if label in self.layout.joint:
            joint, place = self.layout.joint[label]
            stem = name.removesuffix(label)
            whole = self._stored(f"{stem}{joint}")
            return self._order(label, self._part(label, place, whole))
        rows = self._stored(name)
        if name == "positions":
            return rows[self.layout.skipped_positions :]
        return self._order(label, rows)

    def bias(self, name: str) -> Floats | None:
        """The bias of a linear layer or norm, if there is one."""
        label = name.rpartition(".")[2]
        joint, place = self.layout.joint.get(label, (None, 0))
        tensor = self._tensor(name.removesuffix(label) + joint if joint else name, ".bias")
        if tensor not in self._tensors:
            return None
        whole = self._floats(tensor)
        return self._order(label, self._part(label, place, whole) if joint else whole)

    def inverse_frequencies(self, table: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Radians per position [head_dim / 2]: base, linear scaling, llama-3 factors."""
        parameters, head_dim = self.layout.ropes[table], self.layout.config.head_dim
        rotated = self._rotated()
        base = float(parameters.get("rope_theta", 10000.0))
        frequencies = base ** (-np.arange(0, rotated, 2, dtype=np.float64) / rotated)
        kind = parameters.get("rope_type", "default")
        if kind == "linear":
            frequencies /= float(parameters["factor"])
        elif kind == "llama3":
            frequencies = _llama3(frequencies, parameters)
        return np.concatenate([frequencies, np.zeros((head_dim - rotated) // 2)])

    def _rotated(self) -> int:
        return int(self.layout.config.head_dim * self.layout.rotated)

    def _tensor(self, name: str, suffix: str = ".weight") -> str:
        """`layers.3.experts.5.gate` -> what the file calls it."""
        parts = name.split(".")
        numbers = [part for part in parts if part.isdigit()]
        label = ".".join(part for part in parts if part != "layers" and not part.isdigit())
        names = dict(zip("ie", numbers, strict=False))
        stored = self.layout.names[label].format(**names) + suffix
        return stored.partition(".")[2] if self._bare and stored.count(".") > 1 else stored

    def _floats(self, tensor: str) -> Floats:
        return np.asarray(self._tensors[tensor].get_tensor(tensor), np.float32)

    def _stored(self, name: str) -> Floats:
        values = self._floats(self._tensor(name))
        return values.T if self.layout.transposed and name.startswith("layers.") else values

    def _part(self, label: str, place: int, whole: Floats) -> Floats:
        """The rows of one of the matrices that stand in a joint one."""
        config = self.layout.config
        if label not in ("q", "k", "v"):
            return np.split(whole, 2)[place]
        if self.layout.interleaved_qkv:
            by_head = whole.reshape(config.heads, 3, config.head_dim, *whole.shape[1:])
            return by_head[:, place].reshape(-1, *whole.shape[1:])
        rows = [count * config.head_dim for count in (config.heads, *[config.kv_heads] * 2)]
        return np.split(whole, np.cumsum(rows)[:2])[place]

    def _order(self, label: str, rows: Floats) -> Floats:
        """Where a part of each head is rotated, put the pairs of it half a head apart."""
        head_dim, rotated = self.layout.config.head_dim, self._rotated()
        if label not in ("q", "k") or rotated == head_dim:
            return rows
        first, second = np.arange(rotated // 2), np.arange(rotated // 2, rotated)
        still = np.split(np.arange(rotated, head_dim), 2)
        order = np.concatenate([first, still[0], second, still[1]])
        heads = rows.reshape(-1, head_dim, *rows.shape[1:])
        return np.ascontiguousarray(heads[:, order].reshape(rows.shape))

    def _check(self) -> None:
        """SourceError listing the tensors that are missing or of another shape."""
        wrong = []
        for name, shape in _expected(self.layout):
            tensor = self._tensor(name)
            if tensor not in self._tensors:
                wrong.append(f"{tensor} is missing")
                continue
            found = tuple(self._tensors[tensor].get_slice(tensor).get_shape())
            if self.layout.transposed and name.startswith("layers.") and len(found) == 2:
                found = found[::-1]
            if len(found) != len(shape) or any(
                want is not None and want != have for want, have in zip(shape, found, strict=True)
            ):
                wanted = ", ".join("any" if size is None else str(size) for size in shape)
                wrong.append(f"{tensor} is {list(found)}, expected [{wanted}]")
        if wrong:
            more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
            raise SourceError(
                f"{self.path} does not fit its {CONFIG}: {'; '.join(wrong[:8])}{more}; "
                "download it again"
            )


def _llama3(frequencies: np.ndarray[Any, np.dtype[np.float64]], parameters: Json) -> Any:
    """Llama 3.1's: slow rotations are slowed down, quick ones kept, those between blended."""
    factor, low = float(parameters["factor"]), float(parameters["low_freq_factor"])
    high = float(parameters["high_freq_factor"])
    turns = float(parameters["original_max_position_embeddings"]) * frequencies / (2 * np.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return frequencies * (blend + (1 - blend) / factor)


def _expected(layout: Layout) -> list[tuple[str, tuple[int | None, ...]]]:
    """Our names of all tensors, with their shapes (rows first); None is any size."""
    config = layout.config
    width, q, kv = config.width, config.heads * config.head_dim, config.kv_heads * config.head_dim
    rows: list[tuple[str, tuple[int | None, ...]]] = [("embed", (config.vocab, width))]
    rows.append(("norm", (width,)))
    if not config.tied_head:
        rows.append(("head", (config.vocab, width)))
    if config.learned_positions:
        rows.append(("positions", (config.context + layout.skipped_positions, width)))
    by_row = config.query_key_norm == "row"
    shapes: dict[str, tuple[int | None, ...]] = {
        "qkv": (q + 2 * kv, width),
        "q": (q, width),
        "k": (kv, width),
        "v": (kv, width),
        "o": (width, q),
        "q_norm": (q if by_row else config.head_dim,),
        "k_norm": (kv if by_row else config.head_dim,),
    }
    experts = config.experts
    for layer in range(config.layers):
        for label in layout.names:
            if label in ("embed", "norm", "head", "positions") or label in layout.joint:
                continue
            norm_before = label in ("attn_norm", "mlp_norm")
            if label.endswith("_norm") and norm_before and config.norms == "after":
                continue
            mlp = label in ("gate", "up", "down", "gate_up")
            if (config.routed(layer) and mlp) or (
                not config.routed(layer) and label.startswith(("experts.", "router"))
            ):
                continue
            shape: tuple[int | None, ...] = shapes.get(label, (None, width))
            if label.endswith("down"):
                shape = (width, None)
            elif label.endswith("_norm") and label not in shapes:
                shape = (width,)
            if label == "router" and experts is not None:
                shape = (experts.count, width)
            if label.startswith("experts.") and experts is not None:
                part = label.removeprefix("experts.")
                rows += [
                    (f"layers.{layer}.experts.{e}.{part}", shape) for e in range(experts.count)
                ]
            else:
                rows.append((f"layers.{layer}.{label}", shape))
    return rows


def _no_weights(path: Path) -> str:
    pickled = sorted(file.name for file in (*path.glob("*.bin"), *path.glob("*.pt")))
    if pickled:
        return (
            f"{path} holds pickled weights only ({pickled[0]}), which could run code when read: "
            "load it where you trust it and save it with save_pretrained, which writes safetensors"
        )
    return f"{path} holds no *.safetensors: expected a folder that save_pretrained wrote"


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(f"there is no {path}: expected a folder of transformers") from error
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path} is not a JSON object: download it again")
    return content


def _tokenizer(path: Path, folder: Path) -> dict[str, Any]:
    """Copy the tokenizer and the chat template; the bundle's config keys about them."""
    if not (path / TOKENIZER).is_file():
        raise SourceError(
            f"{path} has no {TOKENIZER}: save it there with "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    shutil.copyfile(path / TOKENIZER, folder / TOKENIZER)
    template: Any = None
    if (path / TEMPLATE).is_file():
        template = (path / TEMPLATE).read_text(encoding="utf-8")
    elif (path / "tokenizer_config.json").is_file():
        template = _json(path / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((t["template"] for t in template if t.get("name") == "default"), None)
    if template:
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
    config = _json(path / CONFIG)
    generation = path / "generation_config.json"
    ends = _json(generation).get("eos_token_id") if generation.is_file() else None
    ends = config.get("eos_token_id") if ends is None else ends
    return {
        "bos_id": config.get("bos_token_id"),
        "eos_ids": [] if ends is None else ends if isinstance(ends, list) else [ends],
        "chat_template": TEMPLATE if template else None,
    }


def _default_source(path: Path, files: Sequence[Path]) -> dict[str, Any]:
    hashes = {file.name: sha256_file(file) for file in files}
    return {"kind": "transformers", "folder": path.resolve().name, "sha256": hashes}
