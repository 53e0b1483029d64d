"""Tiny checkpoints of every encoder-decoder of transformers that leangen exports."""

from __future__ import annotations

import json

import numpy as np
from tokenizers import Tokenizer, models, processors
from transformers_models import TOKENS, VOCAB, torch, transformers

T5 = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "d_kv": 32,
    "d_ff": 96,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
    **TOKENS,
}
WHISPER = {
    "vocab_size": VOCAB,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "num_mel_bins": 80,
    "max_source_positions": 60,
    "max_target_positions": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
VARIANTS = {
    "t5": [
        {**T5, "feed_forward_proj": "relu"},
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ],
    "mt5": [{**T5, "feed_forward_proj": "gated-gelu"}],
    "whisper": [WHISPER, {**WHISPER, "tie_word_embeddings": False}],
}
SPECIAL = ("<pad>", "<|startoftranscript|>", "<|endoftext|>", "<|en|>", "<|de|>")
LATER = ("<|translate|>", "<|transcribe|>", "<|notimestamps|>")
"""Whisper's own tokens; after the last one all are times."""


def checkpoint(folder, kind, options, *, multilingual=False):
    """A saved model with random weights and a tokenizer; greedy text of it is not one token."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**options)
    auto = "AutoModelForSpeechSeq2Seq" if kind == "whisper" else "AutoModelForSeq2SeqLM"
    model = getattr(transformers, auto).from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 1 / np.sqrt(parameter.shape[1:].numel()) if parameter.dim() > 1 else 0.3
            if "relative" in name or "embed_tokens" in name or "shared" in name:
                spread = 1.0
            if name != "model.encoder.embed_positions.weight":
                parameter.add_(torch.randn_like(parameter) * spread)
    model.save_pretrained(folder)
    words = [f"<{i}>" for i in range(VOCAB)]
    if kind == "whisper":
        words[: len(SPECIAL)], words[80 : 80 + len(LATER)] = SPECIAL, LATER
        (folder / "generation_config.json").write_text(
            json.dumps(
                {
                    "is_multilingual": multilingual,
                    "suppress_tokens": [7, 9],
                    "begin_suppress_tokens": [2, 11],
                }
            )
        )
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    if kind != "whisper":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <2>", special_tokens=[("<2>", 2)]
        )
    tokenizer.save(str(folder / "tokenizer.json"))
    return model
