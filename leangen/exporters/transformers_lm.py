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
from leangen.exporters.architectures import ARCHITECTURES
from leangen.exporters.checkpoint import Checkpoint, Json, Layout, Rows
from leangen.exporters.gguf_blocks import Floats

if TYPE_CHECKING:
    from leangen.exporters.transformers_check import Difference

CONFIG, TOKENIZER, TEMPLATE = "config.json", "tokenizer.json", "chat_template.jinja"


def accepts(path: Path) -> bool:
    """Whether it is a folder with a `config.json` that names a `model_type`, or that file."""
    path = _folder(path)
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

    The path of its `config.json` stands for the folder. `source` is kept in the manifest (by
    default the folder's name and its weights' hashes). Raises SourceError for damaged or missing
    files, UnsupportedError for what leangen cannot run, DependencyError without safetensors,
    StorageError.
    """
    path = _folder(path)
    layout = read_layout(path)
    config = layout.config
    with Tensors(path, layout) as checkpoint, create(out, replace=replace) as draft:
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

    return transformers_check.differences(_folder(path), bundle)


def _folder(path: Path) -> Path:
    return path.parent if path.name == CONFIG else path


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


class Tensors(Checkpoint):
    """The weights in a folder's safetensors files."""

    def __init__(self, path: Path, layout: Layout) -> None:
        super().__init__(layout)
        try:
            import ml_dtypes  # noqa: F401  gives NumPy bfloat16
            from safetensors import SafetensorError, safe_open
        except ModuleNotFoundError as error:
            if error.name not in ("safetensors", "ml_dtypes"):
                raise
            raise DependencyError(f"{path} holds safetensors: `pip install safetensors`") from None
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
        # Some were saved without what stands around the layers: `h.0` for `transformer.h.0`.
        self._bare = layout.names["embed"] + ".weight" not in self._tensors
        self.check(path)

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
        rows: Rows = self._tensors[tensor].get_tensor(tensor)
        return rows

    def _floats(self, tensor: str, rows: Rows) -> Floats:
        return np.asarray(rows, np.float32)


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
