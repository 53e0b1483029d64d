"""GGUF files of every architecture compute what transformers computes with the same weights."""

from __future__ import annotations

import draws
import gguf
import numpy as np
import pytest
from transformers_models import SMALL, TOKENS, VARIANTS, VOCAB, checkpoint, torch

from leangen import exporters
from leangen.exporters.gguf_architectures import ARCHITECTURES
from leangen.families import language
from leangen.session import Session


def yarn(**options):
    own = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    return {**SMALL, "rope_parameters": {"rope_theta": 1e4, **own, **options}}


def longrope(pairs, original, **options):
    """Its long factors apart from its short ones."""
    short, long = ([start + i / 8 for i in range(pairs)] for start in (1, 2))
    own = {"rope_type": "longrope", "short_factor": short, "long_factor": long}
    rotation = {"rope_theta": 1e4, **own, **options}
    return {**SMALL, "original_max_position_embeddings": original, "rope_parameters": rotation}


# By the architecture of the file: transformers' name, and the options of the model.
MODELS = {
    "gemma2": ("gemma2", VARIANTS["gemma2"][0] | {"query_pre_attn_scalar": 16}),
    "gemma3": (
        "gemma3_text",
        {
            **VARIANTS["gemma3_text"][0],
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            "query_pre_attn_scalar": 16,
        },
    ),
    "gpt2": ("gpt2", VARIANTS["gpt2"][0]),
    "gptneox": ("gpt_neox", VARIANTS["gpt_neox"][0]),
    "llama": ("llama", SMALL),
    "llama-moe": ("mixtral", VARIANTS["mixtral"][0]),
    "olmo2": ("olmo2", SMALL),
    "olmoe": ("olmoe", VARIANTS["olmoe"][0]),
    "phi3": ("phi3", VARIANTS["phi3"][1]),
    "phi3-short": ("phi3", longrope(6, original=64, partial_rotary_factor=0.75)),
    "phi3-long": ("phi3", longrope(8, original=32)),
    "llama-yarn": ("llama", yarn(attention_factor=1.5, beta_fast=4.0, beta_slow=0.5)),
    "qwen2": ("qwen2", SMALL),
    "qwen2-yarn": ("qwen2", yarn()),
    "qwen3": ("qwen3", VARIANTS["qwen3"][0]),
    "qwen3moe": ("qwen3_moe", VARIANTS["qwen3_moe"][0] | {"mlp_only_layers": []}),
    "smollm3": ("smollm3", SMALL),
}


def write(path, model, architecture):
    """A GGUF as llama.cpp's converter writes it: its names, its order of rows, its metadata."""
    config = model.config
    enum = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture)
    names = gguf.get_tensor_name_map(enum, config.num_hidden_layers)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 4 * config.hidden_size))
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    else:
        writer.add_layer_norm_eps(getattr(config, "layer_norm_eps", 1e-5))
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    writer.add_rope_freq_base(rope.get("rope_theta", 10000.0))
    writer.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        if "attention_factor" in rope:
            writer.add_rope_scaling_yarn_attn_factor(rope["attention_factor"])
            writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
            writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    if rope.get("rope_type") == "longrope":  # Phi-3's, which names no type
        original = rope["original_max_position_embeddings"]
        stretch = config.max_position_embeddings / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(np.sqrt(1 + np.log(stretch) / np.log(original)))
        for part in ("short", "long"):
            factors = np.array(rope[f"{part}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{part}.weight", factors)
    if architecture == "gptneox":
        writer.add_parallel_residual(config.use_parallel_residual)
    if getattr(config, "sliding_window", None):
        writer.add_sliding_window(config.sliding_window)
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["<", "1", "<1", *(f"<{i}>" for i in range(3, VOCAB))])
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["< 1"])
    writer.add_bos_token_id(TOKENS["bos_token_id"])
    writer.add_eos_token_id(TOKENS["eos_token_id"])

    def interleaved(rows, count):
        halves = rows.reshape(count, 2, -1, *rows.shape[1:])
        return halves.swapaxes(1, 2).reshape(rows.shape)

    together = {}
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if "experts.gate_up_proj" in name:  # transformers holds the experts' parts together
            stem = name.replace("gate_up_proj", "")
            gate, up = np.split(values, 2, axis=1)
            together |= {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
            continue
        if "experts.down_proj" in name:
            together[f"{name}.weight"] = values
            continue
        if architecture == "gpt2" and any(part in name for part in ("c_attn", "c_proj", "c_fc")):
            values = values.T
        if architecture == "gptneox" and "query_key_value" in name:
            by_head = values.reshape(heads, 3, head_dim, *values.shape[1:])
            values = by_head.swapaxes(0, 1).reshape(values.shape)
        if architecture.startswith("gemma") and "norm" in name:
            values = values + 1
        if architecture in ("llama", "smollm3"):
            values = interleaved(values, heads) if "q_proj" in name else values
            values = interleaved(values, kv_heads) if "k_proj" in name else values
        together[name] = values
    for name, values in together.items():
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        writer.add_tensor(stored, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_architecture_has_a_model():
    assert {name.partition("-")[0] for name in MODELS} == set(ARCHITECTURES)


@pytest.mark.parametrize("model", MODELS)
def test_a_gguf_computes_what_transformers_computes(tmp_path, model):
    kind, options = MODELS[model]
    reference = checkpoint(tmp_path / "saved", kind, options)
    path = write(tmp_path / "model.gguf", reference, model.partition("-")[0])
    context = 128 if model == "phi3-long" else None  # beyond the original one
    bundle = exporters.export(path, tmp_path / "bundle", context=context)
    session = Session(bundle, threads=1)
    tokens = draws.rng().integers(0, VOCAB, 60).tolist()
    with torch.no_grad():
        expected = reference.double()(torch.tensor([tokens])).logits[0].numpy()
    got = language.logits(session, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-4 * max(1, np.abs(expected).max()))
