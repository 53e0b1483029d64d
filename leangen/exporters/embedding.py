"""A folder with a text encoder, to an embedding bundle.

Either what sentence-transformers or transformers saved of a BERT (`config.json`, safetensors,
`tokenizer.json`), or any encoder as ONNX (`model.onnx`, also in a folder `onnx`) with its
`tokenizer.json`. How vectors of tokens become one of a text is read from `modules.json` and
`1_Pooling/config.json` where they lie there, or given; else it is their mean, normalized.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from leangen.bundle import Bundle, create, open_bundle, sha256_file
from leangen.errors import BundleError, RequestError, SourceError, UnsupportedError, needs
from leangen.exporters import bert
from leangen.exporters.onnx_writer import Array
from leangen.exporters.transformers_folder import check_numbers
from leangen.families.embedding import POOLING
from leangen.graph_edit import Graph

CONFIG, TOKENIZER, WEIGHTS = "config.json", "tokenizer.json", "model.safetensors"
GRAPHS = ("model.onnx", "onnx/model.onnx")
OUTPUTS = ("sentence_embedding", "last_hidden_state", "token_embeddings")
"""What encoders' outputs are called, the most finished first."""
TAKEN = ("input_ids", "attention_mask", "token_type_ids")
CONTEXT = 512
"""Tokens of a text where nothing says how many the encoder reads."""
_POOLINGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


def accepts(path: Path) -> bool:
    """Whether it is a folder with a BERT, or an encoder as ONNX beside its tokenizer."""
    folder = _folder(path)
    if not (folder / TOKENIZER).is_file():
        return False
    if (folder / WEIGHTS).is_file():
        return (folder / CONFIG).is_file() and _json(folder / CONFIG).get("model_type") == "bert"
    found = _graph(folder)
    return found is not None and _output(found) is not None


def export(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    source: Mapping[str, Any] | None = None,
    replace: bool = False,
    pooling: str | None = None,
    normalize: bool | None = None,
    context: int | None = None,
) -> Bundle:
    """Write the encoder in folder `path` (or beside its `config.json`) as an fp32 bundle.

    `pooling` is `mean`, `cls` or `last`; `context` the most tokens that a text may have. Both, and
    `normalize`, are the folder's own where they are not given. Raises SourceError for damaged or
    missing files, UnsupportedError for what leangen cannot run, RequestError for a context of none,
    DependencyError, StorageError.
    """
    if context is not None and (type(context) is not int or context < 1):
        raise RequestError(f"--context is {context!r}, expected a number of tokens, 1 or more")
    folder = _folder(path)
    graph = _graph(folder)
    with create(out, replace=replace) as draft:
        config = _pooling(folder)
        if (folder / WEIGHTS).is_file():
            weights = folder / WEIGHTS
            config |= _write_bert(folder, draft.folder)
        elif graph is not None:
            weights = folder / next(name for name in GRAPHS if (folder / name).is_file())
            config |= _describe(graph, folder)
            graph.save(draft.folder / "model.onnx")
        else:
            raise SourceError(f"{folder} has neither {WEIGHTS} nor {' nor '.join(GRAPHS)}")
        given = {"pooling": pooling, "normalize": normalize, "context_length": context}
        config |= {key: value for key, value in given.items() if value is not None}
        if config["pooling"] not in POOLING:
            raise UnsupportedError(
                f"pooling {config['pooling']!r} is unknown: expected mean, cls or last"
            )
        draft.config = config | _tokenizer(folder, draft.folder)
        draft.name, draft.family = name or folder.resolve().name.lower(), "embedding"
        draft.graphs = {"model": "model.onnx"}
        own = {"kind": "folder", "folder": folder.resolve().name, "sha256": sha256_file(weights)}
        draft.source = dict(source or own)
    return open_bundle(out)


def _folder(path: Path) -> Path:
    return path.parent if path.name == CONFIG else path


def _graph(folder: Path) -> Graph | None:
    for name in GRAPHS:
        if (folder / name).is_file():
            try:
                graph = Graph(folder / name)
                graph.check_files()
            except BundleError as error:
                raise SourceError(f"{folder / name} is damaged ({error})") from None
            return graph
    return None


def _output(graph: Graph) -> tuple[str, int, int] | None:
    """Name, rank and width of an encoder's output; None when the graph is no encoder."""
    inputs = {value.name for value in graph.model.graph.input if not graph.has(value.name)}
    outputs = {value.name: value for value in graph.model.graph.output}
    name = next((name for name in OUTPUTS if name in outputs), None)
    if name is None or "input_ids" not in inputs or inputs - set(TAKEN):
        return None
    shape = outputs[name].type.tensor_type.shape.dim
    return name, len(shape), shape[-1].dim_value if shape else 0


def _describe(graph: Graph, folder: Path) -> dict[str, Any]:
    """What the bundle's config says of an ONNX encoder."""
    found = _output(graph)
    if found is None:
        raise UnsupportedError(
            f"{folder} does not hold a text encoder: expected inputs {', '.join(TAKEN)} and an "
            f"output {' or '.join(OUTPUTS)}"
        )
    name, rank, width = found
    file = folder / CONFIG
    stated = _json(file) if file.is_file() else {}
    width = width or int(stated.get("hidden_size", 0))
    if not width:
        raise UnsupportedError(
            f"output {name!r} of {folder} leaves its width open: put a {CONFIG} with hidden_size "
            "beside it"
        )
    return {
        "inputs": [v.name for v in graph.model.graph.input if v.name in TAKEN],
        "output": name,
        "dimensions": width,
        "context_length": _context(folder) or CONTEXT,
        **({"pooling": None} if rank == 2 else {}),
    }


def _write_bert(folder: Path, out: Path) -> dict[str, Any]:
    """Write the graph of a BERT; what the bundle's config says of it."""
    message = f"{folder} holds safetensors: `pip install safetensors`"
    with needs("safetensors", message=message):
        from safetensors import SafetensorError, safe_open
    config = _json(folder / CONFIG)
    check_numbers(folder, config)
    try:
        with safe_open(folder / WEIGHTS, framework="np") as file:
            stored = set(file.keys())
            prefix = "" if "embeddings.LayerNorm.weight" in stored else "bert."

            def tensor(name: str) -> Array:
                if prefix + name not in stored:
                    raise SourceError(f"{folder / WEIGHTS} lacks {prefix + name}")
                return np.asarray(file.get_tensor(prefix + name), np.float32)

            bert.write(out, config, tensor)
    except (SafetensorError, OSError) as error:
        raise SourceError(f"{folder / WEIGHTS} is damaged ({error}): download it again") from error
    except KeyError as error:
        raise SourceError(f"{folder / CONFIG} lacks {error}, which a BERT has") from error
    return {
        "inputs": list(bert.INPUTS),
        "output": bert.OUTPUT,
        "dimensions": int(config["hidden_size"]),
        "context_length": _context(folder) or CONTEXT,
    }


def _context(folder: Path) -> int | None:
    """The most tokens of a text: as trained, else as there are positions; None where unsaid."""
    for name, key in (
        ("sentence_bert_config.json", "max_seq_length"),
        (CONFIG, "max_position_embeddings"),
    ):
        stated = _json(folder / name).get(key) if (folder / name).is_file() else None
        if stated:
            return int(stated)
    return None


def _pooling(folder: Path) -> dict[str, Any]:
    """Pooling and normalization as sentence-transformers states them, else the mean, normalized."""
    file = folder / "1_Pooling" / CONFIG
    pooling = "mean"
    if file.is_file():
        stated = _json(file)
        on = [key for key in stated if key.startswith("pooling_mode_") and stated[key]]
        asked: list[Any] = [_POOLINGS.get(key, key) for key in on] or [stated.get("pooling_mode")]
        if len(asked) != 1 or asked[0] not in ("mean", "cls", "last"):
            raise UnsupportedError(
                f"{file} asks for pooling by {' and '.join(map(str, asked))}, expected one of "
                "mean, cls and last"
            )
        pooling = asked[0]
    normalize = True
    if (folder / "modules.json").is_file():
        text = (folder / "modules.json").read_text(encoding="utf-8")
        normalize = "models.Normalize" in text
        if "models.Dense" in text:
            raise UnsupportedError(f"{folder} has a dense layer after pooling, expected none")
    return {"pooling": pooling, "normalize": normalize}


def _tokenizer(folder: Path, out: Path) -> dict[str, Any]:
    """Copy the tokenizer, which is not to pad or cut by itself; the config's keys about it."""
    content = _json(folder / TOKENIZER)
    padding = content.get("padding") or {}
    content |= {"padding": None, "truncation": None}
    (out / TOKENIZER).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return {"pad_id": int(padding.get("pad_id", 0))}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path} is not a JSON object: download it again")
    return content
