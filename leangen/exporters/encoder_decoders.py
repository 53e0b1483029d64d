"""The encoder-decoders of transformers: their shape, and what their tensors are called.

A new one is a function from its `config.json` and the names of its stored tensors to a `Layout`,
and one line in `ENCODER_DECODERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from leangen.exporters.architectures import activation
from leangen.exporters.checkpoint import Json, Layout
from leangen.exporters.decoder import DecoderConfig, Relative


def _t5(json: Json, stored: Collection[str]) -> Layout:
    """T5 (1910.10683) and v1.1, which has gated GELU and a head of its own."""
    relative = Relative(
        buckets=json["relative_attention_num_buckets"],
        most=json.get("relative_attention_max_distance", 128),
    )
    kind = json.get("feed_forward_proj", "relu")
    gated = kind.startswith("gated-")
    scaled = json.get("tie_word_embeddings", True) is not False
    scaled = json.get("scale_decoder_outputs", scaled) and json["model_type"] == "t5"
    stack = {
        "width": json["d_model"],
        "heads": json["num_heads"],
        "kv_heads": json["num_heads"],
        "head_dim": json["d_kv"],
        "vocab": json["vocab_size"],
        "context": json.get("n_positions", 512),
        "epsilon": json.get("layer_norm_epsilon", 1e-6),
        "relative": relative,
        "attention_scale": 1.0,
        "gated": gated,
        "activation": "gelu_tanh" if kind == "gated-gelu" else activation(kind.split("-")[-1]),
    }
    encoder = DecoderConfig(layers=json["num_layers"], tied_head=True, **stack)
    decoder = DecoderConfig(
        layers=json.get("num_decoder_layers") or json["num_layers"],
        tied_head="lm_head.weight" not in stored,
        head_scale=json["d_model"] ** -0.5 if scaled else 1.0,
        cross=True,
        **stack,
    )
    names = {
        "embed": "shared",
        "encoder.embed": "shared",
        "head": "lm_head",
        "norm": "decoder.final_layer_norm",
        "relative": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias",
        "encoder.norm": "encoder.final_layer_norm",
        "encoder.relative": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
    }
    for prefix, side, place in (("", "decoder", 2), ("encoder.", "encoder", 1)):
        block = f"{side}.block.{{i}}.layer"
        names[f"{prefix}attn_norm"] = f"{block}.0.layer_norm"
        for label in "qkvo":
            names[f"{prefix}{label}"] = f"{block}.0.SelfAttention.{label}"
        mlp = f"{block}.{place}.DenseReluDense"
        names[f"{prefix}mlp_norm"] = f"{block}.{place}.layer_norm"
        names |= {f"{prefix}up": f"{mlp}.wi_1" if gated else f"{mlp}.wi"}
        names |= {f"{prefix}gate": f"{mlp}.wi_0"} if gated else {}
        names[f"{prefix}down"] = f"{mlp}.wo"
    names["cross_norm"] = "decoder.block.{i}.layer.1.layer_norm"
    for label in "qkvo":
        names[f"cross_{label}"] = f"decoder.block.{{i}}.layer.1.EncDecAttention.{label}"
    return Layout(config=decoder, encoder=encoder, names=names)


def _whisper(json: Json, stored: Collection[str]) -> Layout:
    """Whisper (2212.04356): its encoder reads log-mel sound."""
    names = {
        "embed": "model.decoder.embed_tokens",
        "positions": "model.decoder.embed_positions",
        "norm": "model.decoder.layer_norm",
        "head": "proj_out",
        "encoder.conv1": "model.encoder.conv1",
        "encoder.conv2": "model.encoder.conv2",
        "encoder.positions": "model.encoder.embed_positions",
        "encoder.norm": "model.encoder.layer_norm",
    }
    for prefix, side in (("", "decoder"), ("encoder.", "encoder")):
        layer = f"model.{side}.layers.{{i}}"
        names |= _bart_attention(prefix, f"{layer}.self_attn", f"{layer}.self_attn_layer_norm")
        names[f"{prefix}mlp_norm"] = f"{layer}.final_layer_norm"
        names |= {f"{prefix}up": f"{layer}.fc1", f"{prefix}down": f"{layer}.fc2"}
    layer = "model.decoder.layers.{i}"
    names |= _bart_attention("cross_", f"{layer}.encoder_attn", f"{layer}.encoder_attn_layer_norm")
    return whisper_layout(
        names,
        width=json["d_model"],
        layers=(json["encoder_layers"], json["decoder_layers"]),
        heads=(json["encoder_attention_heads"], json["decoder_attention_heads"]),
        vocab=json["vocab_size"],
        contexts=(json["max_source_positions"], json["max_target_positions"]),
        activation=activation(json.get("activation_function", "gelu")),
    )


def whisper_layout(
    names: Mapping[str, str],
    *,
    width: int,
    layers: tuple[int, int],
    heads: tuple[int, int],
    vocab: int,
    contexts: tuple[int, int],
    activation: str = "gelu",
    joint: Mapping[str, tuple[str, int]] | None = None,
) -> Layout:
    """A Whisper of that shape under those names; pairs are of encoder and decoder."""

    def stack(side: int, *, cross: bool) -> DecoderConfig:
        return DecoderConfig(
            layers=layers[side],
            width=width,
            heads=heads[side],
            kv_heads=heads[side],
            head_dim=width // heads[side],
            vocab=vocab,
            context=contexts[side],
            epsilon=1e-5,
            tied_head=True,
            norm="layer",
            activation=activation,
            gated=False,
            learned_positions=True,
            cross=cross,
        )

    encoder, decoder = stack(0, cross=False), stack(1, cross=True)
    return Layout(config=decoder, encoder=encoder, names=names, joint=joint or {})


def _bart_attention(prefix: str, attention: str, norm: str) -> dict[str, str]:
    names = {f"{prefix}{label}": f"{attention}.{label}_proj" for label in "qkv"}
    label = f"{prefix}norm" if prefix == "cross_" else f"{prefix}attn_norm"
    return names | {f"{prefix}o": f"{attention}.out_proj", label: norm}


ENCODER_DECODERS: Mapping[str, Callable[[Json, Collection[str]], Layout]] = {
    "mt5": _t5,
    "t5": _t5,
    "whisper": _whisper,
}
"""By `model_type` of `config.json`."""
