"""The exported graph computes what transformers' Llama computes on the same weights."""

import draws
import numpy as np
import onnx
import pytest
from gguf_fixtures import Tiny, write

from leangen.exporters import gguf, gguf_checkpoint, rope
from leangen.families import decoder, language
from leangen.families.decoder import Decoder
from leangen.session import Session

MIXED = {  # as in a Q4_K_M file: values and half of the down projections at more bits
    "token_embd": "Q6_K",
    "blk.0.attn_v": "Q6_K",
    "blk.0.ffn_down": "Q6_K",
    "blk.1.attn_k": "Q5_K",
    "blk.1.ffn_up": "Q5_K",
    "blk.1.attn_output": "F16",
}
VARIANTS = {
    "plain": Tiny(),
    "untied": Tiny(tied=False),
    "biases": Tiny(biases=True),
    "one kv head": Tiny(kv_heads=1),
    "as many kv heads": Tiny(kv_heads=4),
    "wide heads": Tiny(head_dim=32),
    "rope base": Tiny(rope_base=100000.0),
    "linear rope": Tiny(linear_factor=4.0),
    "rope factors": Tiny(rope_factors=np.linspace(1, 8, 8)),
    "half precision": Tiny(default_type="F16"),
    "bfloat": Tiny(default_type="BF16"),
    "low bit": Tiny(default_type="Q4_1", types={"token_embd": "Q8_0"}),
}
LOW_BIT = {
    **{form: Tiny(default_type=form) for form in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")},
    **{
        form: Tiny(width=256, mlp_width=512, head_dim=64, default_type=form)
        for form in ("Q4_K", "Q5_K", "Q6_K")
    },
    "untied": Tiny(tied=False, default_type="Q4_1", types={"token_embd": "Q4_0"}),
    "biases": Tiny(biases=True, default_type="Q4_1"),
    "5 and 8 bits": Tiny(default_type="Q5_0", types={"blk.0.attn_v": "Q8_0"}),
    "5 and 8 bits, biases": Tiny(default_type="Q5_0", types={"blk.0.attn_v": "Q8_0"}, biases=True),
    "Q4_K_M": Tiny(width=256, mlp_width=512, head_dim=64, default_type="Q4_K", types=MIXED),
}


def session(tmp_path, tiny, form="fp32", **options):
    path = write(tmp_path / "tiny.gguf", tiny)
    return Session(gguf.export(path, tmp_path / form, form=form), threads=1, **options)


def some_tokens(tiny, n=40):
    return draws.rng().integers(0, len(tiny.tokens), n).tolist()


def transformers_model(path):
    """Llama from transformers in float64, with the weights and the rope of the file."""
    torch = pytest.importorskip("torch", reason="the export extra is not installed")
    transformers = pytest.importorskip("transformers", reason="the export extra is not installed")
    file = gguf_checkpoint.GgufFile(path)
    weights = gguf_checkpoint.Checkpoint(file, keep_blocks=False)
    config = weights.config
    biased = "blk.0.attn_q.bias" in file.tensors
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab,
            hidden_size=config.width,
            intermediate_size=file.hyper("feed_forward_length"),
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.epsilon,
            tie_word_embeddings=config.tied_head,
            attention_bias=biased,
            mlp_bias=biased,
        )
    )
    names = {
        "attn_norm": "input_layernorm",
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    state = {
        "model.embed_tokens.weight": weights.matrix("embed"),
        "model.norm.weight": weights.gain("norm"),
        "lm_head.weight": weights.matrix("embed" if config.tied_head else "head"),
    }
    for layer in range(config.layers):
        for ours, theirs in names.items():
            key, name = f"model.layers.{layer}.{theirs}", f"layers.{layer}.{ours}"
            norm = ours.endswith("norm")
            state[f"{key}.weight"] = weights.gain(name) if norm else weights.matrix(name)
            if biased and not norm:
                state[f"{key}.bias"] = weights.bias(name)
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})
    model = model.double().eval()
    frequencies, _ = rope.frequencies(weights.layout.ropes["rope"], config.head_dim, config.context)
    model.model.rotary_emb.inv_freq = torch.from_numpy(frequencies)
    return model


def transformers_logits(path, tokens):
    """Logits [n, vocab] of that model after each of the n tokens."""
    model = transformers_model(path)
    torch = pytest.importorskip("torch", reason="the export extra is not installed")
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].numpy()


def assert_same_logits(got, expected):
    """[n, vocab] to fp32's rounding, which a random model's near tie amplifies here and there."""
    worst = np.abs(got - expected).max(axis=1) / np.std(expected)
    assert np.median(worst) < 1e-4
    assert worst.max() < 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_fp32_logits_agree_with_transformers(tmp_path, variant):
    tiny = VARIANTS[variant]
    tokens = some_tokens(tiny)
    got = language.logits(session(tmp_path, tiny), tokens)
    expected = transformers_logits(tmp_path / "tiny.gguf", tokens)
    assert expected.std() > 0.5
    assert_same_logits(got, expected)


@pytest.mark.parametrize("variant", LOW_BIT)
def test_low_bit_form_is_the_same_weights(tmp_path, variant):
    tiny = LOW_BIT[variant]
    tokens = some_tokens(tiny)
    fp32 = language.logits(session(tmp_path, tiny), tokens)
    exact = session(tmp_path, tiny, "gguf", activations="fp32")
    assert_same_logits(language.logits(exact, tokens), fp32)
    rounded = language.logits(Session(exact.bundle, threads=1), tokens)
    assert np.std(rounded - fp32) < 0.1 * np.std(fp32)


@pytest.fixture(scope="module")
def tiny_session(tmp_path_factory):
    return session(tmp_path_factory.mktemp("tiny"), Tiny())


def test_decoding_continues_a_prefill(tiny_session):
    tokens = some_tokens(Tiny())
    expected = language.logits(tiny_session, tokens)
    with Decoder(tiny_session, len(tokens)) as sequence:
        np.testing.assert_allclose(sequence.feed(tokens[:20]), expected[19], atol=1e-4)
        np.testing.assert_allclose(sequence.feed(tokens[20:23]), expected[22], atol=1e-4)
        for i in range(23, len(tokens)):
            np.testing.assert_allclose(sequence.feed([tokens[i]]), expected[i], atol=1e-4)


def test_a_long_prompt_in_chunks_is_the_same(tiny_session, monkeypatch):
    tokens = some_tokens(Tiny(), 100)
    whole = language.logits(tiny_session, tokens)
    monkeypatch.setattr(decoder, "CHUNK", 16)
    monkeypatch.setattr(language, "CHUNK", 16)
    np.testing.assert_allclose(language.logits(tiny_session, tokens), whole, atol=1e-4)
    with Decoder(tiny_session, 100) as sequence:
        np.testing.assert_allclose(sequence.feed(tokens), whole[-1], atol=1e-4)


def test_a_batch_is_its_rows(tiny_session):
    rows = [some_tokens(Tiny(), 12) for _ in range(2)]
    empty = np.zeros((2, 2, 16, 16), np.float32)
    feeds = {
        "input_ids": np.array(rows, np.int64),
        "seqlens_k": np.array([11, 11], np.int32),
        "total_sequence_length": np.array(12, np.int32),
        "logits_from": np.array([-3], np.int64),
    }
    for layer in range(2):
        feeds |= {f"past_key_{layer}": empty, f"past_value_{layer}": empty}
    together = tiny_session.run("model", feeds, ["logits"])[0]
    expected = np.stack([language.logits(tiny_session, row)[-3:] for row in rows])
    np.testing.assert_allclose(together, expected, atol=1e-4)


def test_nodes_have_paths_and_standard_domains(tmp_path):
    opened = session(tmp_path, LOW_BIT["Q4_K_M"], "gguf")
    model = onnx.load(opened.bundle.graph("model"), load_external_data=False)
    names = {node.name for node in model.graph.node}
    assert len(names) == len(model.graph.node)
    assert {"/embed", "/layers.0/attn/qk", "/layers.0/attn/v", "/layers.1/mlp/down"} <= names
    assert {"/layers.0/mlp/gate_up", "/layers.1/mlp/gate", "/lm_head"} <= names
    assert {node.domain for node in model.graph.node} == {"", "com.microsoft"}
    assert set(opened.bundle.quantization["nodes"]) <= names


def test_a_tied_head_shares_the_bytes_of_the_embedding(tmp_path):
    def data_bytes(tiny, form):
        opened = session(tmp_path / f"{form}{tiny.tied}", tiny, form)
        return opened.bundle.files["model.onnx.data"]["bytes"]

    for form in ("fp32", "gguf"):
        tied = data_bytes(Tiny(default_type="Q8_0"), form)
        untied = data_bytes(Tiny(default_type="Q8_0", tied=False), form)
        assert untied - tied > len(Tiny().tokens) * 64
