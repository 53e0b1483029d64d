"""A folder that transformers saved a causal language model in, to a language bundle.

It reads `config.json`, `*.safetensors` and `tokenizer.json` itself: no torch (but for weights that
are pickled), and no code of the model's. Weights are taken one at a time.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leangen.bundle import Bundle, create, open_bundle
from leangen.errors import SourceError, UnsupportedError
from leangen.exporters import llm_graph, rope
from leangen.exporters.architectures import ARCHITECTURES
from leangen.exporters.checkpoint import Json, Layout
from leangen.exporters.context import choose
from leangen.exporters.decoder import DecoderConfig
from leangen.exporters.encoder_decoders import ENCODER_DECODERS
from leangen.exporters.rope import positive
from leangen.exporters.transformers_folder import (
    CONFIG,
    Tensors,
    check_numbers,
    copy_tokenizer,
    default_source,
    folder_of,
    read_json,
)

if TYPE_CHECKING:
    from leangen.exporters.difference import Difference


def accepts(path: Path) -> bool:
    """Whether it is a folder with a `config.json` that names a `model_type`, or that file."""
    path = folder_of(path)
    if not (path / CONFIG).is_file():
        return False
    try:
        return "model_type" in read_json(path / CONFIG)
    except SourceError:
        return True  # `export` says what is wrong with it


def export(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    source: Mapping[str, Any] | None = None,
    replace: bool = False,
    context: int | None = None,
) -> Bundle:
    """Export the model in folder `path` to a bundle in folder `out`.

    The path of its `config.json` stands for the folder. `source` is kept in the manifest (by
    default the folder's name and its weights' hashes). `context` is how many tokens the bundle
    takes, which by longrope are else those of its short factors. Raises SourceError for damaged or
    missing files, UnsupportedError for what leangen cannot run, RequestError for a context that the
    model has not, DependencyError without safetensors, StorageError.
    """
    path = folder_of(path)
    layout, keys = choose(read_layout(path), context)
    with (
        Tensors(path, layout) as checkpoint,
        create(out, replace=replace) as draft,
    ):
        config = checkpoint.layout.config
        draft.name = name or path.resolve().name.lower()
        draft.family = "language"
        draft.scheme = "fp32"
        draft.graphs["model"] = "model.onnx"
        llm_graph.write(draft.folder, config, checkpoint)
        draft.config = {
            "architecture": read_json(path / CONFIG)["model_type"],
            "context_length": config.context,
            **config.stated,
            **copy_tokenizer(path, draft.folder),
            **keys,
        }
        draft.source = dict(source or default_source(path, checkpoint.files))
    return open_bundle(out)


def check(path: Path, bundle: Bundle) -> list[Difference]:
    """Compare the bundle with torch; see `transformers_check`."""
    from leangen.exporters import transformers_check

    return transformers_check.differences(folder_of(path), bundle)


def read_layout(path: Path) -> Layout:
    """The shape of the model in a folder; UnsupportedError names what leangen cannot run."""
    config = read_json(path / CONFIG)
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        known = (*ARCHITECTURES, *ENCODER_DECODERS)
        near = difflib.get_close_matches(kind, known, n=1, cutoff=0.3)
        nearest = f" (the nearest is {near[0]})" if near else ""
        raise UnsupportedError(
            f"{path} is of architecture {kind!r}, expected one of "
            f"{', '.join(known)}{nearest}: convert it to GGUF, or to ONNX, first"
        )
    return checked_layout(path, lambda: ARCHITECTURES[kind](config))


def checked_layout(path: Path, describe: Callable[[], Layout]) -> Layout:
    """The shape that a description makes of a folder's `config.json`, if a graph can have it."""
    config = read_json(path / CONFIG)
    if quantized := config.get("quantization_config"):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
        raise UnsupportedError(
            f"{path} is quantized ({method}), expected weights in full or half precision: "
            "give the model before it was quantized, and quantize it with leangen"
        )
    check_numbers(path, config)
    try:
        layout = describe()
    except KeyError as error:
        raise SourceError(
            f"{path / CONFIG} lacks {error}, which a {config['model_type']} has"
        ) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise SourceError(f"{path / CONFIG} has values of a wrong type: {error}") from error
    _check_ropes(path, layout)
    for part in filter(None, (layout.config, layout.encoder)):
        for problem in _problems(config, layout, part):
            raise UnsupportedError(f"{path} has {problem}, which leangen cannot run yet")
    return layout


def _problems(json: Json, layout: Layout, config: DecoderConfig) -> list[str]:
    found = [
        f"{key} {json[key]!r}"
        for key, expected in _ONLY.items()
        if key in json and json[key] not in expected
    ]
    if (json.get("word_embed_proj_dim") or config.width) != config.width:
        found.append("an embedding of another width than the layers")
    if config.activation not in ("silu", "gelu", "gelu_tanh", "gelu_quick", "relu"):
        found.append(f"activation {config.activation!r}")
    if config.experts is not None and config.experts.active > config.experts.count:
        found.append(f"{config.experts.active} active experts of {config.experts.count}")
    if config.head_dim % 16 or config.heads % config.kv_heads:
        found.append(
            f"{config.heads} heads of {config.head_dim} on {config.kv_heads} key heads (expected "
            "heads of a multiple of 16, and as many or a multiple of the key heads)"
        )
    return found


def _check_ropes(path: Path, layout: Layout) -> None:
    """UnsupportedError for a kind of rotation that no graph has, SourceError for its numbers."""
    share, rotated = layout.rotated, 0
    if positive(share) and share <= 1:
        rotated = layout.rotary_dims
    if layout.ropes and (not rotated or rotated % 2):
        raise SourceError(
            f"{path / CONFIG} has {share!r} for the share of a head that is rotated, expected a "
            "number above 0 and at most 1 that makes an even part"
        )
    for parameters in layout.ropes.values():
        kind = str(parameters["rope_type"])
        if kind not in rope.KINDS:
            raise UnsupportedError(
                f"{path} has rope of type {kind!r}, expected {', '.join(rope.KINDS)}: leangen "
                "cannot run it yet"
            )
        if kind != "default" and parameters.get("partial_rotary_factor", 1) != 1:
            raise UnsupportedError(
                f"{path} has rope of type {kind!r} for a part of each head, which a "
                f"{read_json(path / CONFIG)['model_type']} does not turn in transformers either"
            )
        try:
            rope.check(parameters, rotated)
        except ValueError as error:
            raise SourceError(f"{path / CONFIG} has {error}") from error


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
