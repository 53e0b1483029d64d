"""The decoder-only architectures of transformers: how each differs from llama.

A new one is a function from its `config.json` to a `Layout`, and one line in `ARCHITECTURES`.
Names are those that transformers writes to safetensors files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from leangen.exporters.checkpoint import Json, Layout
from leangen.exporters.decoder import DecoderConfig, Experts

LLAMA = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "attn_norm": "model.layers.{i}.input_layernorm",
    "q": "model.layers.{i}.self_attn.q_proj",
    "k": "model.layers.{i}.self_attn.k_proj",
    "v": "model.layers.{i}.self_attn.v_proj",
    "o": "model.layers.{i}.self_attn.o_proj",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm",
    "gate": "model.layers.{i}.mlp.gate_proj",
    "up": "model.layers.{i}.mlp.up_proj",
    "down": "model.layers.{i}.mlp.down_proj",
}
_QK_NORM = {
    "q_norm": "model.layers.{i}.self_attn.q_norm",
    "k_norm": "model.layers.{i}.self_attn.k_norm",
}
_EXPERTS = {
    "router": "model.layers.{i}.mlp.gate",
    "experts.gate": "model.layers.{i}.mlp.experts.{e}.gate_proj",
    "experts.up": "model.layers.{i}.mlp.experts.{e}.up_proj",
    "experts.down": "model.layers.{i}.mlp.experts.{e}.down_proj",
}
_NEAR, _ALL = "sliding_attention", "full_attention"
_GEMMA = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
"""What a `config.json` of Gemma leaves out."""
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "gelu_quick",
    "relu": "relu",
}


def _llama(json: Json, **special: Any) -> Layout:
    """Llama, and what differs from it in `special`."""
    kind = json.get("hidden_activation") or json.get("hidden_act", "silu")
    own = {"epsilon": json.get("rms_norm_eps", 1e-6), "activation": activation(kind)}
    unbiased = {"head"}
    if not json.get("attention_bias", False):
        unbiased |= {"q", "k", "v", "o"}
    if not json.get("mlp_bias", False):
        unbiased |= {"gate", "up", "down"}
    return Layout(
        config=_config(json, **own | special),
        names=LLAMA,
        unbiased=frozenset(unbiased),
        ropes={"rope": rope(json)},
    )


def _config(json: Json, **special: Any) -> DecoderConfig:
    """The shape under the names that most configs have for it, and `special` beside or before."""
    heads = json["num_attention_heads"]
    config: dict[str, Any] = {
        "layers": json["num_hidden_layers"],
        "width": json["hidden_size"],
        "heads": heads,
        "kv_heads": json.get("num_key_value_heads") or heads,
        "head_dim": json.get("head_dim") or json["hidden_size"] // heads,
        "vocab": json["vocab_size"],
        "context": json["max_position_embeddings"],
        "tied_head": bool(json.get("tie_word_embeddings", False)),
    }
    return DecoderConfig(**config | special)


def activation(name: str) -> str:
    """Ours for transformers' name; a name that has none is refused by who reads the config."""
    return _ACTIVATIONS.get(name, name)


def rope(json: Json) -> dict[str, Any]:
    """The parameters of the rotation, from before transformers 5 as well."""
    parameters = dict(json.get("rope_scaling") or json.get("rope_parameters") or {})
    parameters.setdefault("rope_type", parameters.pop("type", "default"))
    parameters.setdefault("rope_theta", json.get("rope_theta", 10000.0))
    most, original = "max_position_embeddings", "original_max_position_embeddings"
    parameters[most] = json[most]
    parameters.setdefault(original, json[most])
    if original in json:  # transformers takes it before what stands in the parameters
        parameters[original] = json[original]
    return parameters


def _window(json: Json) -> tuple[int, ...]:
    """The same `sliding_window` in every layer."""
    window = json.get("sliding_window")
    return () if window is None else (window,) * json["num_hidden_layers"]


def _windows(json: Json, kinds: Sequence[str]) -> tuple[int, ...]:
    """`sliding_window` in the layers that `layer_types`, or else `kinds`, say have it."""
    said = json.get("layer_types")
    kinds = kinds if said is None else said
    layers, window = json["num_hidden_layers"], json.get("sliding_window")
    if len(kinds) != layers or not {*kinds} <= {_NEAR, _ALL}:
        raise ValueError(
            f"layer_types are {list(kinds)}, expected {layers} of {_NEAR!r} or {_ALL!r}"
        )
    return () if window is None else tuple(window if kind == _NEAR else 0 for kind in kinds)


def _mistral(json: Json) -> Layout:
    return _llama(json, windows=_window({"sliding_window": 4096, **json}))


def _qwen2(json: Json) -> Layout:
    layout = _qwen(json, _qwen_windows(json))
    return replace(layout, unbiased=layout.unbiased - {"q", "k", "v"})


def _qwen(json: Json, windows: tuple[int, ...]) -> Layout:
    return _llama(json, windows=windows if json.get("use_sliding_window", False) else ())


def _qwen_windows(json: Json) -> tuple[int, ...]:
    full = json.get("max_window_layers", 28)
    kinds = [_ALL if i < full else _NEAR for i in range(json["num_hidden_layers"])]
    return _windows({"sliding_window": 4096, **json}, kinds)


def _head_norms(layout: Layout) -> Layout:
    config = replace(layout.config, query_key_norm="head")
    return replace(layout, config=config, names={**layout.names, **_QK_NORM})


def _qwen3(json: Json) -> Layout:
    json = {"head_dim": 128, **json}
    return _head_norms(_qwen(json, _qwen_windows(json)))


def _gemma2(json: Json) -> Layout:
    json = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, **json}
    return _gemma(json, [_ALL if i % 2 else _NEAR for i in range(json["num_hidden_layers"])])


def _gemma(json: Json, kinds: Sequence[str], **special: Any) -> Layout:
    json = {**_GEMMA, **json}
    layout = _llama(
        json,
        norms="both",
        windows=_windows(json, kinds),
        attention_scale=json["query_pre_attn_scalar"] ** -0.5,
        attention_softcap=json.get("attn_logit_softcapping") or 0.0,
        logit_softcap=json.get("final_logit_softcapping") or 0.0,
        embedding_scale=json["hidden_size"] ** 0.5,
        **special,
    )
    names = {
        **LLAMA,
        "attn_post_norm": "model.layers.{i}.post_attention_layernorm",
        "mlp_norm": "model.layers.{i}.pre_feedforward_layernorm",
        "mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm",
    }
    return replace(layout, names=names, unit_gain=True)


def _gemma3(json: Json) -> Layout:
    every = json.get("sliding_window_pattern", 6)
    kinds = [_NEAR if (i + 1) % every else _ALL for i in range(json["num_hidden_layers"])]
    rotations = tuple(
        "rope_local" if kind == _NEAR else "rope" for kind in json.get("layer_types") or kinds
    )
    both = json.get("rope_parameters") or {}
    far = (both.get(_ALL) or {}) | (json.get("rope_scaling") or {})
    json = {"rope_theta": 1e6, **json, "rope_scaling": None, "rope_parameters": far}
    json |= {"attn_logit_softcapping": None}  # has the key, and no use for it
    near = {
        "rope_parameters": both.get(_NEAR),
        "rope_theta": json.get("rope_local_base_freq", 10000.0),
        "max_position_embeddings": json["max_position_embeddings"],
    }
    layout = _head_norms(_gemma(json, kinds, rotations=rotations))
    return replace(layout, ropes={**layout.ropes, "rope_local": rope(near)})


def _phi3(json: Json) -> Layout:
    json = {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096, **json}
    layout, parameters = _llama(json, windows=_window(json)), rope(json)
    if parameters["rope_type"] in ("su", "yarn"):  # what older files of Phi-3 call it
        parameters["rope_type"] = "longrope"
    share = parameters.pop("partial_rotary_factor", json.get("partial_rotary_factor", 1.0))
    names = {
        **LLAMA,
        "qkv": "model.layers.{i}.self_attn.qkv_proj",
        "gate_up": "model.layers.{i}.mlp.gate_up_proj",
    }
    joint = {"q": ("qkv", 0), "k": ("qkv", 1), "v": ("qkv", 2), "gate": ("gate_up", 0)}
    joint["up"] = ("gate_up", 1)
    return replace(layout, names=names, joint=joint, rotated=share, ropes={"rope": parameters})


def _olmo2(json: Json) -> Layout:
    layout = _llama({"rms_norm_eps": 1e-5, **json}, norms="after", query_key_norm="row")
    names = {
        **LLAMA,
        **_QK_NORM,
        "attn_post_norm": "model.layers.{i}.post_attention_layernorm",
        "mlp_post_norm": "model.layers.{i}.post_feedforward_layernorm",
    }
    return replace(layout, names=names)


def _smollm3(json: Json) -> Layout:
    json = {"tie_word_embeddings": True, "rope_theta": 2e6, **json}
    every, layers = json.get("no_rope_layer_interval", 4), json["num_hidden_layers"]
    rotated = json.get("no_rope_layers")
    rotated = [(i + 1) % every != 0 for i in range(layers)] if rotated is None else rotated
    if len(rotated) != layers:
        raise ValueError(f"no_rope_layers has {len(rotated)} entries, expected {layers}")
    rotations = tuple("rope" if on else "" for on in rotated)
    windows = _windows(json, [_ALL if on else _NEAR for on in rotated])
    return _llama(
        json, rotations=rotations, windows=windows if json.get("use_sliding_window") else ()
    )


def _mixtral(json: Json) -> Layout:
    json = {"rope_theta": 1e6, "rms_norm_eps": 1e-5, **json}
    experts = Experts(
        count=json["num_local_experts"], active=json["num_experts_per_tok"], normalized=True
    )
    stem = "model.layers.{i}.block_sparse_moe"
    names = {
        **LLAMA,
        "router": f"{stem}.gate",
        "experts.gate": f"{stem}.experts.{{e}}.w1",
        "experts.up": f"{stem}.experts.{{e}}.w3",
        "experts.down": f"{stem}.experts.{{e}}.w2",
    }
    layout = _llama(json, windows=_window(json), experts=experts)
    return replace(layout, names=names)


def _mixture(json: Json, dense: frozenset[int] = frozenset()) -> Experts:
    return Experts(
        count=json.get("num_experts") or json["num_local_experts"],
        active=json["num_experts_per_tok"],
        normalized=bool(json.get("norm_topk_prob", False)),
        dense_layers=dense,
    )


def _qwen3_moe(json: Json) -> Layout:
    step, only = json.get("decoder_sparse_step", 1), json.get("mlp_only_layers") or []
    layers = range(json["num_hidden_layers"])
    dense = frozenset(i for i in layers if i in only or (i + 1) % step)
    layout = _head_norms(_qwen(json, _window({"sliding_window": 4096, **json})))
    config = replace(layout.config, experts=_mixture(json, dense))
    return replace(layout, config=config, names={**layout.names, **_EXPERTS})


def _olmoe(json: Json) -> Layout:
    layout = _llama({"rms_norm_eps": 1e-5, **json}, query_key_norm="row", experts=_mixture(json))
    return replace(layout, names={**LLAMA, **_QK_NORM, **_EXPERTS})


def _gpt2(json: Json) -> Layout:
    config = DecoderConfig(
        layers=json["n_layer"],
        width=json["n_embd"],
        heads=json["n_head"],
        kv_heads=json["n_head"],
        head_dim=json["n_embd"] // json["n_head"],
        vocab=json["vocab_size"],
        context=json["n_positions"],
        epsilon=json.get("layer_norm_epsilon", 1e-5),
        tied_head=bool(json.get("tie_word_embeddings", True)),
        norm="layer",
        activation=activation(json.get("activation_function", "gelu_new")),
        gated=False,
        learned_positions=True,
    )
    names = {
        "embed": "transformer.wte",
        "positions": "transformer.wpe",
        "norm": "transformer.ln_f",
        "head": "lm_head",
        "attn_norm": "transformer.h.{i}.ln_1",
        "qkv": "transformer.h.{i}.attn.c_attn",
        "o": "transformer.h.{i}.attn.c_proj",
        "mlp_norm": "transformer.h.{i}.ln_2",
        "up": "transformer.h.{i}.mlp.c_fc",
        "down": "transformer.h.{i}.mlp.c_proj",
    }
    joint = {"q": ("qkv", 0), "k": ("qkv", 1), "v": ("qkv", 2)}
    return Layout(config=config, names=names, transposed=True, joint=joint)


def _opt(json: Json) -> Layout:
    config = _config(
        json,
        epsilon=1e-5,
        tied_head=bool(json.get("tie_word_embeddings", True)),
        norm="layer",
        activation=activation(json.get("activation_function", "relu")),
        gated=False,
        learned_positions=True,
    )
    stem = "model.decoder.layers.{i}"
    names = {
        "embed": "model.decoder.embed_tokens",
        "positions": "model.decoder.embed_positions",
        "norm": "model.decoder.final_layer_norm",
        "head": "lm_head",
        "attn_norm": f"{stem}.self_attn_layer_norm",
        "q": f"{stem}.self_attn.q_proj",
        "k": f"{stem}.self_attn.k_proj",
        "v": f"{stem}.self_attn.v_proj",
        "o": f"{stem}.self_attn.out_proj",
        "mlp_norm": f"{stem}.final_layer_norm",
        "up": f"{stem}.fc1",
        "down": f"{stem}.fc2",
    }
    return Layout(config=config, names=names, skipped_positions=2)


def _gpt_neox(json: Json) -> Layout:
    parameters = rope({"rope_theta": json.get("rotary_emb_base", 10000.0), **json})
    share = parameters.pop("partial_rotary_factor", json.get("rotary_pct", 0.25))
    config = _config(
        json,
        epsilon=json.get("layer_norm_eps", 1e-5),
        norm="layer",
        parallel=bool(json.get("use_parallel_residual", True)),
        activation=activation(json.get("hidden_act", "gelu")),
        gated=False,
    )
    stem = "gpt_neox.layers.{i}"
    names = {
        "embed": "gpt_neox.embed_in",
        "norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
        "attn_norm": f"{stem}.input_layernorm",
        "qkv": f"{stem}.attention.query_key_value",
        "o": f"{stem}.attention.dense",
        "mlp_norm": f"{stem}.post_attention_layernorm",
        "up": f"{stem}.mlp.dense_h_to_4h",
        "down": f"{stem}.mlp.dense_4h_to_h",
    }
    return Layout(
        config=config,
        names=names,
        joint={"q": ("qkv", 0), "k": ("qkv", 1), "v": ("qkv", 2)},
        interleaved_qkv=True,
        rotated=share,
        ropes={"rope": parameters},
    )


ARCHITECTURES: Mapping[str, Callable[[Json], Layout]] = {
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "olmo2": _olmo2,
    "olmoe": _olmoe,
    "opt": _opt,
    "phi3": _phi3,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "smollm3": _smollm3,
}
"""By `model_type` of `config.json`."""
