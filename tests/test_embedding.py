"""Text embeddings: a BERT against a float64 twin and transformers, pooling, refusals."""

from __future__ import annotations

import json
from math import erf

import numpy as np
import pytest
import real_models
import tiny_bundles
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from leangen.errors import RequestError, SourceError, UnsupportedError
from leangen.exporters import embedding as exporter
from leangen.exporters import find
from leangen.families import embedding
from leangen.session import Session

WIDTH, HEADS, LAYERS, WORDS = 32, 4, 2, 40
CONFIG = {
    "model_type": "bert",
    "hidden_size": WIDTH,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "intermediate_size": 48,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
    "vocab_size": WORDS,
    "hidden_dropout_prob": 0.0,
}
TEXTS = ["w7 w8 w9 w10 w11", "w12", "w3 w4 w7", "w30 w31 w32 w33 w34 w35 w36 w37 w38 w39"]


def weights():
    rng = np.random.default_rng(0)
    made = {}

    def dense(name, rows, columns):
        made[f"{name}.weight"] = rng.standard_normal((rows, columns)) / np.sqrt(columns)
        made[f"{name}.bias"] = rng.standard_normal(rows) / 4

    def norm(name):
        made[f"{name}.weight"] = 1 + rng.standard_normal(WIDTH) / 4
        made[f"{name}.bias"] = rng.standard_normal(WIDTH) / 4

    for table, rows in (("word", WORDS), ("position", 20), ("token_type", 2)):
        made[f"embeddings.{table}_embeddings.weight"] = rng.standard_normal((rows, WIDTH))
    norm("embeddings.LayerNorm")
    for layer in range(LAYERS):
        stem = f"encoder.layer.{layer}"
        for part in ("query", "key", "value"):
            dense(f"{stem}.attention.self.{part}", WIDTH, WIDTH)
        dense(f"{stem}.attention.output.dense", WIDTH, WIDTH)
        norm(f"{stem}.attention.output.LayerNorm")
        dense(f"{stem}.intermediate.dense", 48, WIDTH)
        dense(f"{stem}.output.dense", WIDTH, 48)
        norm(f"{stem}.output.LayerNorm")
    return {name: array.astype(np.float32) for name, array in made.items()}


def twin(w, ids):
    """The last hidden states of one sequence [t, d] in float64, as the paper has them."""
    w = {name: array.astype(np.float64) for name, array in w.items()}

    def dense(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-12)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm("embeddings.LayerNorm", x + w["embeddings.token_type_embeddings.weight"][0])
    for layer in range(LAYERS):
        stem = f"encoder.layer.{layer}"
        q, k, v = (
            dense(f"{stem}.attention.self.{part}", x).reshape(len(ids), HEADS, -1).swapaxes(0, 1)
            for part in ("query", "key", "value")
        )
        scores = np.exp(q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1]))
        seen = scores / scores.sum(-1, keepdims=True) @ v
        y = dense(f"{stem}.attention.output.dense", seen.swapaxes(0, 1).reshape(len(ids), -1))
        x = norm(f"{stem}.attention.output.LayerNorm", x + y)
        h = dense(f"{stem}.intermediate.dense", x)
        h = h / 2 * (1 + np.vectorize(erf)(h / np.sqrt(2)))
        x = norm(f"{stem}.output.LayerNorm", x + dense(f"{stem}.output.dense", h))
    return x


@pytest.fixture
def folder(tmp_path):
    """What sentence-transformers saves."""
    pytest.importorskip("safetensors", reason="reads safetensors")
    from safetensors.numpy import save_file

    place = tmp_path / "encoder"
    (place / "1_Pooling").mkdir(parents=True)
    save_file(weights(), place / "model.safetensors")
    (place / "config.json").write_text(json.dumps(CONFIG))
    (place / "modules.json").write_text('[{"type": "sentence_transformers.models.Normalize"}]')
    (place / "sentence_bert_config.json").write_text('{"max_seq_length": 12}')
    pooling = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}
    (place / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    tokenizer = Tokenizer(
        models.WordLevel({f"w{index}": index for index in range(WORDS)}, unk_token="w0")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="w1 $A w2", special_tokens=[("w1", 1), ("w2", 2)]
    )
    tokenizer.enable_truncation(6)
    tokenizer.save(str(place / "tokenizer.json"))
    return place


def exported(folder, **options):
    return Session(exporter.export(folder, folder.parent / "bundle", **options), threads=1)


@pytest.mark.parametrize("context", [0, "many"])
def test_a_context_is_a_number_of_tokens(folder, context):
    with pytest.raises(RequestError, match=f"--context is {context!r}, expected a number of tok"):
        exported(folder, context=context)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_a_bert_computes_what_the_paper_says(folder, pooling):
    session = exported(folder, pooling=pooling)
    assert find(folder) is exporter
    vectors = embedding.embed(session, TEXTS)
    for text, vector in zip(TEXTS, vectors, strict=True):
        hidden = twin(weights(), [1, *(int(word[1:]) for word in text.split()), 2])
        wanted = {"mean": hidden.mean(0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        assert vector == pytest.approx(wanted / np.linalg.norm(wanted), abs=2e-6)


def test_padding_changes_nothing_that_matters(folder):
    session = exported(folder)
    together = embedding.embed(session, TEXTS)
    alone = np.concatenate([embedding.embed(session, [text]) for text in TEXTS])
    assert together == pytest.approx(alone, abs=2e-6)


def test_without_normalization_vectors_have_their_length(folder):
    (folder / "modules.json").write_text("[]")
    vectors = embedding.embed(exported(folder), TEXTS)
    assert np.all(np.abs(np.linalg.norm(vectors, axis=1) - 1) > 1e-3)


def test_many_texts_come_in_batches_and_in_their_order(tmp_path, monkeypatch):
    session = Session(tiny_bundles.embedding(tmp_path), threads=1)
    texts = [" ".join(["w1", "w2", "w3"][: 1 + n % 3] * (1 + n % 5)) for n in range(40)]
    whole = embedding.embed(session, texts)
    monkeypatch.setattr(embedding, "BATCH_TOKENS", 30)
    steps = list(embedding.run(session, embedding.Request(prompt=texts)))
    assert len(steps) > 5
    assert sum(step.units for step in steps) == sum(len(text.split()) for text in texts)
    assert embedding.embed(session, texts) == pytest.approx(whole, abs=1e-6)
    assert embedding.embed(session, texts[3:4])[0] == pytest.approx(whole[3], abs=1e-6)


def test_tokens_are_taken_as_they_are(tmp_path):
    session = Session(tiny_bundles.embedding(tmp_path), threads=1)

    def vectors(**given):
        steps = embedding.run(session, embedding.Request(**given))
        while True:
            try:
                next(steps)
            except StopIteration as stop:
                return stop.value.array

    assert vectors(tokens=[[1, 2, 3]]) == pytest.approx(vectors(prompt="w1 w2 w3"))
    with pytest.raises(RequestError, match="token 99 is not in the vocabulary, expected 0 to 31"):
        vectors(tokens=[[99]])


def test_what_cannot_be_embedded_is_refused(tmp_path):
    session = Session(tiny_bundles.embedding(tmp_path), threads=1)
    with pytest.raises(RequestError, match="text 1 has 60 tokens, expected 1 to 48: split"):
        embedding.embed(session, ["w1", "w2 " * 60])
    with pytest.raises(RequestError, match="text 0 has 0 tokens"):
        embedding.embed(session, [""])
    for wrong in ({}, {"prompt": "a", "tokens": [[1]]}, {"prompt": []}, {"prompt": [1]}):
        with pytest.raises(RequestError, match="expected|at least one"):
            embedding.Request(**wrong)


def test_what_cannot_be_exported_is_refused(folder, tmp_path):
    out = tmp_path / "out"
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(UnsupportedError, match="pooling by pooling_mode_max_tokens"):
        exporter.export(folder, out)
    pooling.unlink()
    config = folder / "config.json"
    config.write_text(json.dumps(CONFIG | {"hidden_act": "swish"}))
    with pytest.raises(UnsupportedError, match="activation is 'swish'"):
        exporter.export(folder, out)
    config.write_text(json.dumps(CONFIG | {"num_hidden_layers": 3}))
    with pytest.raises(SourceError, match=r"lacks encoder\.layer\.2"):
        exporter.export(folder, out)
    for key, value in (("num_hidden_layers", None), ("hidden_size", "x"), ("layer_norm_eps", [])):
        config.write_text(json.dumps(CONFIG | {key: value}))
        with pytest.raises(SourceError, match=f"has {key} .*, expected a"):
            exporter.export(folder, out)
    config.write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(SourceError, match="damaged"):
        exporter.export(folder, out)
    assert not out.exists()


@pytest.mark.slow
def test_minilm_is_what_transformers_computes():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    folder = real_models.source("minilm-l6").parent
    texts = ["The cat sits on the mat.", "A feline rests on a rug.", "Markets fell today. " * 20]
    model = transformers.AutoModel.from_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vectors = embedding.embed(Session(real_models.store().resolve("minilm-l6")), texts)
    for text, vector in zip(texts, vectors, strict=True):
        with torch.no_grad():
            hidden = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]
        wanted = hidden.mean(0) / hidden.mean(0).norm()
        assert vector == pytest.approx(wanted.numpy(), abs=1e-5)
    assert vectors[0] @ vectors[1] > 0.5 > vectors[0] @ vectors[2] + 0.3
