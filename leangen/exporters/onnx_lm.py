"""A folder with a causal language model that another program exported to ONNX, as a bundle.

    optimum-onnx            config.json, model.onnx or decoder_model_merged.onnx (or in `onnx/`)
    onnxruntime-genai       genai_config.json, which names the graph, its inputs and its outputs

The graph stays what it is; `leangen.families.grown_cache` runs it. Graphs without a cache of keys
and values, and models of images or sound, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onnx import TensorProto, ValueInfoProto

from leangen.bundle import Bundle, create, open_bundle, sha256_file
from leangen.errors import BundleError, SourceError, UnsupportedError
from leangen.exporters.transformers_folder import CONFIG, copy_tokenizer, folder_of, read_json
from leangen.graph_edit import Graph, attributes

GENAI = "genai_config.json"
GRAPHS = ("model.onnx", "decoder_model_merged.onnx", "decoder_with_past_model.onnx")
"""What optimum calls them, the best to run first."""
WITHOUT_CACHE = "decoder_model.onnx"
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


def accepts(path: Path) -> bool:
    """Whether it is such a folder, or the `config.json` of one."""
    path = folder_of(path)
    if (path / GENAI).is_file():
        return True
    if not (path / CONFIG).is_file():
        return False
    found = _graph_file(path)
    if found is None:
        return _find(path, WITHOUT_CACHE) is not None  # `export` says what is wrong with it
    try:
        inputs = Graph(found).model.graph.input
    except BundleError:
        return found.name != GRAPHS[0]
    return any(_PAST.fullmatch(given.name) for given in inputs)


def export(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    source: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Bundle:
    """Wrap the graph in folder `path` as a language bundle in folder `out`.

    Raises SourceError for damaged or missing files, UnsupportedError for a graph that does not
    generate token by token from a cache, StorageError.
    """
    path = folder_of(path)
    genai = (path / GENAI).is_file()
    said = _genai(path) if genai else _optimum(path)
    file = said.pop("file")
    graph = _open(file)
    io = _io(graph, file, said.pop("names", {}))
    with create(out, replace=replace) as draft:
        graph.save(draft.folder / "model.onnx")
        draft.name = name or path.resolve().name.lower()
        draft.family, draft.scheme = "language", _scheme(graph)
        draft.graphs["model"] = "model.onnx"
        tokens = said.pop("tokens", None)
        draft.config = {
            **said,
            **_shape(graph, io, file, said),
            **copy_tokenizer(path, draft.folder, tokens),
            "io": io,
        }
        draft.source = dict(
            source
            or {
                "kind": "onnxruntime-genai" if genai else "optimum",
                "folder": path.resolve().name,
                "sha256": {file.name: sha256_file(file)},
            }
        )
    return open_bundle(out)


def _find(path: Path, name: str) -> Path | None:
    return next((f for f in (path / name, path / "onnx" / name) if f.is_file()), None)


def _graph_file(path: Path) -> Path | None:
    return next((found for name in GRAPHS if (found := _find(path, name)) is not None), None)


def _optimum(path: Path) -> dict[str, Any]:
    """What a folder of optimum says: the graph, and the model's shape."""
    file = _graph_file(path)
    if file is None:
        raise UnsupportedError(
            f"{path} has {WITHOUT_CACHE} alone, which computes every token anew: export it again "
            "with `optimum-cli export onnx --task text-generation-with-past`"
        )
    json = read_json(path / CONFIG)
    heads = json.get("num_attention_heads") or json.get("n_head")
    width = json.get("hidden_size") or json.get("n_embd") or json.get("d_model")
    context = json.get("max_position_embeddings") or json.get("n_positions")
    return {
        "file": file,
        "architecture": json.get("model_type"),
        "context_length": context or json.get("seq_length") or 2048,
        "vocab_size": json.get("vocab_size"),
        "kv_heads": json.get("num_key_value_heads") or heads,
        "head_dim": json.get("head_dim") or (width // heads if width and heads else None),
    }


def _genai(path: Path) -> dict[str, Any]:
    """What a genai folder says: the graph, the names in it, and the model's shape."""
    json = read_json(path / GENAI)
    try:
        model = json["model"]
        decoder = model["decoder"]
        file = path / decoder["filename"]
        if not file.is_file():
            raise SourceError(f"{path} has no {decoder['filename']}, which its {GENAI} names")
        return {
            "file": file,
            "names": {**decoder["inputs"], **decoder["outputs"]},
            "tokens": model,
            "architecture": model["type"],
            "context_length": model["context_length"],
            "vocab_size": model["vocab_size"],
            "kv_heads": decoder["num_key_value_heads"],
            "head_dim": decoder["head_size"],
        }
    except (KeyError, TypeError) as error:
        raise UnsupportedError(
            f"{path / GENAI} describes no decoder of text ({error} is missing): of "
            "onnxruntime-genai's models leangen takes causal language models"
        ) from error


def _open(file: Path) -> Graph:
    try:
        graph = Graph(file)
        graph.check_files()
    except BundleError as error:
        raise SourceError(f"{file}: {error}") from None
    return graph


def _io(graph: Graph, file: Path, names: Mapping[str, str]) -> dict[str, Any]:
    """The names of what the graph takes and gives; UnsupportedError where the cache lacks."""
    taken = [given.name for given in graph.model.graph.input if not graph.has(given.name)]
    given = [output.name for output in graph.model.graph.output]

    def named(kind: str, default: str) -> list[str]:
        form = [names.get(f"{kind}_{part}_names", f"{default}.%d.{part}") for part in _PARTS]
        layers = sum(_matches(form[0], name) for name in (*taken, *given))
        return [one % layer for layer in range(layers) for one in form]

    io: dict[str, Any] = {
        "past": named("past", "past_key_values"),
        "present": named("present", "present"),
        "logits": names.get("logits", "logits"),
    }
    for kind in ("input_ids", "attention_mask", "position_ids", "use_cache_branch"):
        if (name := names.get(kind, kind)) in taken:
            io[kind] = name
    known = {name for key in io for name in ([io[key]] if isinstance(io[key], str) else io[key])}
    strange = [name for name in taken if name not in known]
    lacking = [name for name in (*io["present"], io["logits"]) if name not in given]
    if strange or lacking or "input_ids" not in io or not io["past"]:
        raise UnsupportedError(
            f"{file} takes {', '.join(taken[:6])} ... and gives {', '.join(given[:4])} ...: "
            f"expected input_ids, past_key_values.I.key/value, present.I.key/value and logits"
            f"{f', not {strange[0]}' if strange else ''}; export it as text-generation-with-past"
        )
    return io


_PARTS = ("key", "value")


def _matches(form: str, name: str) -> bool:
    before, _, after = form.partition("%d")
    middle = name.removeprefix(before).removesuffix(after)
    return name.startswith(before) and name.endswith(after) and middle.isdigit()


def _shape(
    graph: Graph, io: Mapping[str, Any], file: Path, said: Mapping[str, Any]
) -> dict[str, int]:
    """Layers, heads and vocabulary, by the graph where it has numbers, else by what was said."""
    values = {value.name: value for value in (*graph.model.graph.input, *graph.model.graph.output)}
    past, logits = _sizes(values[io["past"][0]]), _sizes(values[io["logits"]])
    element = values[io["past"][0]].type.tensor_type.elem_type
    if len(past) != 4 or element not in _FLOATS:
        raise UnsupportedError(
            f"{file} keeps {io['past'][0]} as {past}, expected float [batch, heads, tokens, size]"
        )
    shape = {
        "layers": len(io["past"]) // 2,
        "kv_heads": past[1] or said["kv_heads"],
        "head_dim": past[3] or said["head_dim"],
        "vocab_size": logits[-1] or said["vocab_size"],
    }
    if unknown := [key for key, value in shape.items() if not value]:
        raise UnsupportedError(
            f"{file} leaves {', '.join(unknown)} open, and so does its config: state them there"
        )
    return {key: int(value) for key, value in shape.items()}


def _sizes(value: ValueInfoProto) -> list[int]:
    """Dimensions; 0 where one is open."""
    return [int(size.dim_value) for size in value.type.tensor_type.shape.dim]


def _scheme(graph: Graph) -> str:
    """`fp32`, or what the weights are in already."""
    bits = [
        int(attributes(node).get("bits", 4))
        for node in graph.nodes
        if node.op_type in ("MatMulNBits", "QMoE")
    ]
    if bits:
        return f"int{min(bits)}"
    if any(node.op_type in ("DequantizeLinear", "MatMulInteger") for node in graph.nodes):
        return "int8"
    half = [tensor.data_type == TensorProto.FLOAT16 for tensor in graph.model.graph.initializer]
    return "fp16" if half and sum(half) > len(half) / 2 else "fp32"
