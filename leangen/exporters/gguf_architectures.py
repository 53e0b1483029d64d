"""The architectures of GGUF files that leangen builds: how each differs from llama.

A new one is a function from the file's metadata to a `Layout`, and one line in `ARCHITECTURES`.
Names are llama.cpp's (https://github.com/ggml-org/llama.cpp, `gguf-py/gguf/constants.py`). What its
converter has folded into the weights (Gemma's unit gains, NeoX's joint matrix) is not undone here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Any, Protocol

from leangen.exporters.checkpoint import Layout
from leangen.exporters.decoder import DecoderConfig, Experts

LLAMA = {
    "embed": "token_embd",
    "norm": "output_norm",
    "head": "output",
    "attn_norm": "blk.{i}.attn_norm",
    "q": "blk.{i}.attn_q",
    "k": "blk.{i}.attn_k",
    "v": "blk.{i}.attn_v",
    "o": "blk.{i}.attn_output",
    "mlp_norm": "blk.{i}.ffn_norm",
    "gate": "blk.{i}.ffn_gate",
    "up": "blk.{i}.ffn_up",
    "down": "blk.{i}.ffn_down",
}
_EXPERTS = {
    "router": "blk.{i}.ffn_gate_inp",
    "experts.gate": "blk.{i}.ffn_gate_exps",
    "experts.up": "blk.{i}.ffn_up_exps",
    "experts.down": "blk.{i}.ffn_down_exps",
}
_QK_NORM = {"q_norm": "blk.{i}.attn_q_norm", "k_norm": "blk.{i}.attn_k_norm"}
_POST_NORMS = {
    "attn_post_norm": "blk.{i}.post_attention_norm",
    "mlp_post_norm": "blk.{i}.post_ffw_norm",
}
_DIVISORS, _LONG, _SHORT = ROPE_TENSORS = (
    "rope_freqs.weight",
    "rope_factors_long.weight",
    "rope_factors_short.weight",
)
_YARN = {"attention_factor": "attn_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
"""Our names to those that follow `rope.scaling.yarn_`."""
_QKV = {"q": ("qkv", 0), "k": ("qkv", 1), "v": ("qkv", 2)}


class Metadata(Protocol):
    """What of a GGUF file says its shape."""

    def value(self, key: str, default: Any = None) -> Any:
        """A metadata value; SourceError when it is missing and has no default."""

    def hyper(self, key: str, default: Any = None) -> Any:
        """A value of the architecture: `hyper("block_count")` is `llama.block_count`."""

    def has(self, tensor: str) -> bool:
        """Whether there is a tensor of that name."""

    def numbers(self, tensor: str) -> list[float]:
        """The values of a small float tensor; SourceError when there is none of that name."""


def _llama(file: Metadata, **special: Any) -> Layout:
    """Llama, Mistral and Mixtral, and what differs from them in `special`."""
    heads = file.hyper("attention.head_count")
    width = int(file.hyper("embedding_length"))
    head_dim = int(file.hyper("attention.key_length", width // heads))
    config: dict[str, Any] = {
        "layers": int(file.hyper("block_count")),
        "width": width,
        "heads": heads,
        "kv_heads": file.hyper("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab": len(file.value("tokenizer.ggml.tokens")),
        "context": int(file.hyper("context_length")),
        "epsilon": float(file.hyper("attention.layer_norm_rms_epsilon", 0.0)),
        "tied_head": not file.has("output.weight"),
    }
    names = LLAMA
    if count := int(file.hyper("expert_count", 0)):
        active = int(file.hyper("expert_used_count"))
        config["experts"] = Experts(count=count, active=active, normalized=True)
        names = {**LLAMA, **_EXPERTS}
    return Layout(
        config=DecoderConfig(**config | special),
        names=names,
        neighbours=True,
        rotated=Fraction(int(file.hyper("rope.dimension_count", head_dim)), head_dim),
        ropes={"rope": _rope(file)},
    )


def _rope(file: Metadata) -> dict[str, Any]:
    """The parameters of the rotation under transformers' names."""
    kind = file.hyper("rope.scaling.type", "linear")
    if file.has(_LONG):  # which the files of Phi-3 do not say
        kind = "longrope"
    parameters: dict[str, Any] = {
        "rope_type": "default" if kind == "none" else str(kind),
        "rope_theta": float(file.hyper("rope.freq_base", 10000.0)),
    }
    if file.has(_DIVISORS):
        parameters["divisors"] = file.numbers(_DIVISORS)
    if kind == "none":
        return parameters
    context = file.hyper("rope.scaling.original_context_length", file.hyper("context_length"))
    parameters["original_max_position_embeddings"] = int(context)
    if kind == "longrope":
        parameters["attention_factor"] = float(file.hyper("rope.scaling.attn_factor", 1.0))
        return parameters | {
            "short_factor": file.numbers(_SHORT),
            "long_factor": file.numbers(_LONG),
        }
    parameters["factor"] = float(file.hyper("rope.scaling.factor", 1.0))
    if spread := float(file.hyper("rope.scaling.yarn_log_multiplier", 0.0)):
        parameters |= {"mscale": 1.0, "mscale_all_dim": spread}
    given = {ours: file.hyper(f"rope.scaling.yarn_{theirs}", 0.0) for ours, theirs in _YARN.items()}
    return parameters | {ours: float(value) for ours, value in given.items() if value}


def _neox(file: Metadata, **special: Any) -> Layout:
    """As llama, with the rows of q and k in half-rotation order."""
    return replace(_llama(file, **special), neighbours=False)


def _qwen3(file: Metadata, **special: Any) -> Layout:
    layout = _neox(file, query_key_norm="head", **special)
    return replace(layout, names={**layout.names, **_QK_NORM})


def _gemma(file: Metadata, sliding: Callable[[int], bool], **special: Any) -> Layout:
    layers, width = int(file.hyper("block_count")), int(file.hyper("embedding_length"))
    window = int(file.hyper("attention.sliding_window", 0))
    layout = _neox(
        file,
        norms="both",
        activation="gelu_tanh",
        embedding_scale=width**0.5,
        windows=tuple(window if sliding(i) else 0 for i in range(layers)),
        **special,
    )
    return replace(layout, names={**layout.names, **_POST_NORMS})


def _gemma2(file: Metadata) -> Layout:
    layers, width = int(file.hyper("block_count")), int(file.hyper("embedding_length"))
    # llama.cpp, too, knows the 27B by its depth: its scale is of another width than its heads.
    wide = layers == 46
    return _gemma(
        file,
        lambda i: i % 2 == 0,
        attention_scale=(width / file.hyper("attention.head_count")) ** -0.5 if wide else None,
        attention_softcap=float(file.hyper("attn_logit_softcapping", 50.0)),
        logit_softcap=float(file.hyper("final_logit_softcapping", 30.0)),
    )


def _gemma3(file: Metadata) -> Layout:
    layers, width = int(file.hyper("block_count")), int(file.hyper("embedding_length"))
    wide = layers == 62  # the 27B, as with Gemma 2

    def sliding(i: int) -> bool:
        return (i + 1) % 6 != 0

    layout = _gemma(
        file,
        sliding,
        query_key_norm="head",
        attention_scale=(width / file.hyper("attention.head_count")) ** -0.5 if wide else None,
        rotations=tuple("rope_local" if sliding(i) else "rope" for i in range(layers)),
    )
    ropes = {**layout.ropes, "rope_local": {"rope_type": "default", "rope_theta": 10000.0}}
    return replace(layout, names={**layout.names, **_QK_NORM}, ropes=ropes)


def _phi3(file: Metadata) -> Layout:
    layers, window = int(file.hyper("block_count")), int(file.hyper("attention.sliding_window", 0))
    layout = _neox(file, windows=(window,) * layers)
    names = {**layout.names, "qkv": "blk.{i}.attn_qkv", "gate_up": "blk.{i}.ffn_up"}
    joint = {**_QKV, "gate": ("gate_up", 0), "up": ("gate_up", 1)}
    return replace(layout, names=names, joint=joint)


def _olmo2(file: Metadata) -> Layout:
    layout = _neox(file, norms="after", query_key_norm="row")
    return replace(layout, names={**layout.names, **_QK_NORM, **_POST_NORMS})


def _smollm3(file: Metadata) -> Layout:
    layers = int(file.hyper("block_count"))
    return _llama(file, rotations=tuple("rope" if (i + 1) % 4 else "" for i in range(layers)))


def _olmoe(file: Metadata) -> Layout:
    layout = _neox(file, query_key_norm="row")
    experts = layout.config.experts
    mixture = None if experts is None else replace(experts, normalized=False)
    config = replace(layout.config, experts=mixture)
    return replace(layout, config=config, names={**layout.names, **_QK_NORM})


def _layer_norm(file: Metadata, **special: Any) -> Layout:
    return _neox(
        file,
        norm="layer",
        epsilon=float(file.hyper("attention.layer_norm_epsilon")),
        gated=False,
        **special,
    )


def _gpt2(file: Metadata) -> Layout:
    layout = _layer_norm(file, activation="gelu_tanh", learned_positions=True)
    names = {**layout.names, "positions": "position_embd", "qkv": "blk.{i}.attn_qkv"}
    return replace(layout, names=_ungated(names), joint=_QKV)


def _gpt_neox(file: Metadata) -> Layout:
    parallel = bool(file.hyper("use_parallel_residual", True))
    layout = _layer_norm(file, activation="gelu", parallel=parallel)
    names = {**layout.names, "qkv": "blk.{i}.attn_qkv"}
    return replace(layout, names=_ungated(names), joint=_QKV)


def _ungated(names: Mapping[str, str]) -> dict[str, str]:
    return {ours: theirs for ours, theirs in names.items() if ours != "gate"}


ARCHITECTURES: Mapping[str, Callable[[Any], Layout]] = {
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "gptneox": _gpt_neox,
    "llama": _llama,
    "olmo2": _olmo2,
    "olmoe": _olmoe,
    "phi3": _phi3,
    "qwen2": _neox,
    "qwen3": _qwen3,
    "qwen3moe": _qwen3,
    "smollm3": _smollm3,
}
"""By `general.architecture`. Mistral and Mixtral files are of architecture llama."""
