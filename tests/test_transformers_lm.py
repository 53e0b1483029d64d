"""Every architecture of transformers that leangen exports, against transformers itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from leangen import exporters
from leangen.engine import Engine
from leangen.errors import SourceError, UnsupportedError
from leangen.exporters.architectures import ARCHITECTURES
from leangen.families import language
from leangen.quantize import quantize
from leangen.session import Session

torch = pytest.importorskip("torch", reason="the export extra is not installed")
transformers = pytest.importorskip("transformers", reason="the export extra is not installed")

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
CASES = [
    pytest.param(kind, options, id=f"{kind}-{i}" if i else kind)
    for kind in ARCHITECTURES
    for i, options in enumerate(VARIANTS[kind])
]


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


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_logits_and_greedy_text_are_those_of_transformers(tmp_path, kind, options):
    model = checkpoint(tmp_path / "saved", kind, options)
    session = Session(exporters.export(tmp_path / "saved", tmp_path / "bundle"), threads=1)
    tokens = np.random.default_rng().integers(0, VOCAB, 60).tolist()
    with torch.no_grad():
        expected = model.double()(torch.tensor([tokens])).logits[0].numpy()
    got = language.logits(session, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-4 * max(1, np.abs(expected).max()))

    prompt = tokens[:20]
    run = language.run(session, language.Request(tokens=prompt, max_new_tokens=64, ignore_eos=True))
    written = [step.token for step in run]
    with torch.no_grad():
        rows = model(torch.tensor([prompt + written])).logits[0, len(prompt) - 1 : -1].numpy()
    assert len(written) == 64
    for row, token in zip(rows, written, strict=True):  # each the likeliest, or as likely to 1e-4
        assert row[token] >= row.max() - 1e-4 * max(1, np.abs(row).max())


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_every_architecture_quantizes_and_generates_with_a_receipt(tmp_path, kind, scheme):
    checkpoint(tmp_path / "saved", kind, VARIANTS[kind][0])
    bundle = exporters.export(tmp_path / "saved", tmp_path / "fp32")
    low = quantize(bundle, scheme, tmp_path / scheme)
    assert low.quantization["weights_8bit_or_fewer"] > 0.9
    engine = Engine(Session(low, threads=1), baseline_s=0)
    result = engine.generate(tokens=[5, 6, 7], max_new_tokens=4, ignore_eos=True)
    assert len(result.tokens) == 4
    assert result.receipt.scheme == scheme
    assert result.receipt.units.count == 4


def test_what_cannot_be_exported_is_named(tmp_path):
    folder = tmp_path / "saved"
    checkpoint(folder, "llama", SMALL)
    config = json.loads((folder / "config.json").read_text())

    def with_config(**changes):
        (folder / "config.json").write_text(json.dumps(config | changes))

    with_config(model_type="llama5")
    with pytest.raises(UnsupportedError, match=r"'llama5'.*the nearest is llama"):
        exporters.export(folder, tmp_path / "out")
    with_config(hidden_act="mish")
    with pytest.raises(UnsupportedError, match="activation 'mish'"):
        exporters.export(folder, tmp_path / "out")
    with_config(rope_parameters={"rope_type": "yarn", "factor": 4.0})
    with pytest.raises(UnsupportedError, match="rope of type 'yarn'"):
        exporters.export(folder, tmp_path / "out")
    with_config(num_hidden_layers=5, intermediate_size=96, vocab_size=95)
    with pytest.raises(SourceError, match=r"expected \[95, 64\].*layers.4.* is missing"):
        exporters.export(folder, tmp_path / "out")
    del config["hidden_size"]
    with_config()
    with pytest.raises(SourceError, match="lacks 'hidden_size'"):
        exporters.export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_missing_and_pickled_files(tmp_path):
    folder = tmp_path / "saved"
    checkpoint(folder, "llama", SMALL)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(SourceError, match="truncated or damaged"):
        exporters.export(folder, tmp_path / "out")
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(SourceError, match="pickled weights only"):
        exporters.export(folder, tmp_path / "out")
    weights.write_bytes(content)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"no tokenizer\.json"):
        exporters.export(folder, tmp_path / "out")
    (folder / "config.json").write_text("{")
    with pytest.raises(SourceError, match=r"cannot read .*config\.json"):
        exporters.export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_precision_and_names_without_their_prefix(tmp_path):
    folder = tmp_path / "saved"
    model = checkpoint(folder, "gpt2", VARIANTS["gpt2"][0])
    half = {
        name.removeprefix("transformer."): value.to(torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    (folder / "model.safetensors").unlink()
    from safetensors.torch import save_file

    save_file(half, folder / "model.safetensors")
    session = Session(exporters.export(folder, tmp_path / "out"), threads=1)
    tokens = [3, 1, 4, 1, 5]
    model.load_state_dict({f"transformer.{k}": v.float() for k, v in half.items()}, strict=False)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(language.logits(session, tokens), expected, atol=1e-4)
