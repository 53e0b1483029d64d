"""Tiny checkpoints of every architecture of transformers that leangen exports."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, models

torch = pytest.importorskip("torch", reason="the export extra is not installed")
transformers = pytest.importorskip("transformers", reason="the export extra is not installed")
from safetensors.torch import save_file  # noqa: E402  transformers brings it

__all__ = ["ROUTED", "SMALL", "VARIANTS", "VOCAB", "checkpoint", "save_file", "torch"]

VOCAB = 96
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ROUTED = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOWED = {"sliding_window": 8, "head_dim": 16, "query_pre_attn_scalar": 24}
VARIANTS = {  # the options of each architecture that its graph depends on
    "gemma2": [
        {**SMALL, **WINDOWED, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    ],
    "gemma3_text": [
        {**SMALL, **WINDOWED, "layer_types": ["sliding_attention", "full_attention"] * 2}
    ],
    "gpt2": [{"vocab_size": VOCAB, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}],
    "gpt_neox": [
        {**SMALL, "num_attention_heads": 2, "use_parallel_residual": True},
        {**SMALL, "num_attention_heads": 2, "use_parallel_residual": False},
    ],
    "llama": [
        {**SMALL, "attention_bias": True, "mlp_bias": True},
        {**SMALL, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {
            **SMALL,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
    ],
    "mistral": [{**SMALL, "sliding_window": 8}, {**SMALL, "sliding_window": None, "head_dim": 32}],
    "mixtral": [{**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}],
    "olmo2": [SMALL],
    "olmoe": [{**SMALL, **ROUTED}, {**SMALL, **ROUTED, "norm_topk_prob": True}],
    "opt": [
        {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "word_embed_proj_dim": 64,
        }
    ],
    "phi3": [SMALL, {**SMALL, "sliding_window": 8}],
    "qwen2": [
        SMALL,
        {**SMALL, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    ],
    "qwen3": [{**SMALL, "head_dim": 48}],
    "qwen3_moe": [
        {**SMALL, **ROUTED, "head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": [1]},
        {**SMALL, **ROUTED, "head_dim": 16, "decoder_sparse_step": 2},
    ],
    "smollm3": [SMALL],
}


def checkpoint(folder, kind, options):
    """A saved model with random weights, norms and biases of all sizes, and a tokenizer."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**options, **TOKENS)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.config._experts_implementation = "eager"  # the only one that computes in float64
    with torch.no_grad():
        for parameter in model.parameters():
            # matrices that keep the size of what they multiply, norms and biases around theirs
            spread = 1 / np.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 0.3
            parameter.add_(torch.randn_like(parameter) * spread)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(VOCAB)}, unk_token="<0>"))
    tokenizer.save(str(folder / "tokenizer.json"))
    return model
