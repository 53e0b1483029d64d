"""Every architecture of transformers that leangen exports, against transformers itself."""

from __future__ import annotations

import json
import shutil

import draws
import numpy as np
import pytest
from transformers_models import (
    ROUTED,
    SMALL,
    VARIANTS,
    VOCAB,
    checkpoint,
    save_file,
    torch,
)

from leangen import exporters
from leangen.engine import Engine
from leangen.errors import SourceError, UnsupportedError
from leangen.exporters.architectures import ARCHITECTURES
from leangen.families import language
from leangen.quantize import quantize
from leangen.session import Session

CASES = [
    pytest.param(kind, options, id=f"{kind}-{i}" if i else kind)
    for kind in ARCHITECTURES
    for i, options in enumerate(VARIANTS[kind])
]


def assert_same_logits(session, model):
    """Of random tokens, which it returns."""
    tokens = draws.rng().integers(0, VOCAB, 60).tolist()
    with torch.no_grad():
        expected = model.double()(torch.tensor([tokens])).logits[0].numpy()
    got = language.logits(session, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-4 * max(1, np.abs(expected).max()))
    return tokens


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_logits_and_greedy_text_are_those_of_transformers(tmp_path, kind, options):
    model = checkpoint(tmp_path / "saved", kind, options)
    source = tmp_path / "saved" / "config.json"  # stands for its folder
    session = Session(exporters.export(source, tmp_path / "bundle"), threads=1)
    tokens = assert_same_logits(session, model)

    prompt = tokens[:20]
    run = language.run(session, language.Request(tokens=prompt, max_new_tokens=64, ignore_eos=True))
    written = [token for step in run for token in step.tokens]
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


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_a_config_leaves_out_is_what_transformers_takes(tmp_path, kind):
    """Few files name every key, and old ones have none of those that came later."""
    sizes = {*SMALL, *ROUTED, "head_dim", "num_local_experts", "ffn_dim"}
    options = {key: v for key, v in VARIANTS[kind][0].items() if key in sizes or key[:2] == "n_"}
    model = checkpoint(tmp_path / "saved", kind, options)
    file = tmp_path / "saved" / "config.json"
    file.write_text(json.dumps(options | {"model_type": kind, "rope_parameters": None}))
    session = Session(exporters.export(file, tmp_path / "bundle"), threads=1)
    assert_same_logits(session, model)


ROPE = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads 0, expected a whole number above 0"),
        ({"vocab_size": None}, "vocab_size None, expected a whole number"),
        ({"max_position_embeddings": "128"}, "max_position_embeddings '128', expected a whole"),
        ({"rms_norm_eps": None}, "rms_norm_eps None, expected a number above 0"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor None for its rotation"),
        ({"rope_parameters": {**ROPE, "rope_theta": "1e4"}}, "rope_theta '1e4' for its rotation"),
        ({"rope_parameters": "linear"}, "values of a wrong type"),
        (
            {"num_attention_heads": 8, "head_dim": None},
            "expected heads of a multiple of 16",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, r"is quantized \(fp8\), expected"),
        ({"attention_bias": False}, "q_proj.bias is there, of which config.json says nothing"),
    ],
)
def test_a_config_that_does_not_describe_a_model_is_refused(tmp_path, changes, said):
    folder = tmp_path / "saved"
    checkpoint(folder, "llama", {**SMALL, "attention_bias": True})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises((SourceError, UnsupportedError), match=said):
        exporters.export(folder, tmp_path / "out")


def test_weights_of_bytes_are_not_taken_for_numbers(tmp_path):
    """Quantizers write them under the names of the weights, their scales beside them."""
    folder = tmp_path / "saved"
    model = checkpoint(folder, "llama", SMALL)
    stored = {name: value.contiguous() for name, value in model.state_dict().items()}
    name = "model.layers.0.mlp.up_proj.weight"
    for kind, called in ((torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")):
        save_file({**stored, name: stored[name].to(kind)}, folder / "model.safetensors")
        with pytest.raises(UnsupportedError, match=f"{name} is of type {called}, expected F32"):
            exporters.export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_older_keys_of_the_rotation_are_read(tmp_path):
    """`rope_theta` stood beside `rope_scaling`, whose kind was `type`, and may be mixed."""
    model = checkpoint(
        tmp_path / "saved", "llama", {**SMALL, "rope_parameters": {**ROPE, "rope_theta": 5e5}}
    )
    file = tmp_path / "saved" / "config.json"
    config = json.loads(file.read_text())
    tokens = draws.rng().integers(0, VOCAB, 60).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    old = {"type": "linear", "factor": 2.0}
    for form in (
        {"rope_scaling": old, "rope_theta": 5e5, "rope_parameters": None},
        {"rope_parameters": ROPE, "rope_theta": 5e5},
    ):
        file.write_text(json.dumps(config | form))
        session = Session(exporters.export(file, tmp_path / "out", replace=True), threads=1)
        np.testing.assert_allclose(language.logits(session, tokens), expected, atol=1e-4)


def test_a_stored_head_is_taken_whatever_the_config_says_of_tying(tmp_path):
    model = checkpoint(tmp_path / "saved", "llama", SMALL)
    file = tmp_path / "saved" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    session = Session(exporters.export(file, tmp_path / "out"), threads=1)
    with torch.no_grad():
        expected = model(torch.tensor([[3, 1, 4]])).logits[0].numpy()
    np.testing.assert_allclose(language.logits(session, [3, 1, 4]), expected, atol=1e-4)


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
    with_config(rope_parameters={"rope_type": "proportional"})
    with pytest.raises(UnsupportedError, match="rope of type 'proportional'"):
        exporters.export(folder, tmp_path / "out")
    with_config(num_hidden_layers=5, intermediate_size=96, vocab_size=95)
    with pytest.raises(SourceError, match=r"expected \[95, 64\].*layers.4.* is missing"):
        exporters.export(folder, tmp_path / "out")
    del config["hidden_size"]
    with_config()
    with pytest.raises(SourceError, match="lacks 'hidden_size'"):
        exporters.export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["now", "before torch 1.6", "shards", "bfloat16"])
def test_pickled_weights_are_those_of_safetensors(form, tmp_path):
    saved, pickled = tmp_path / "saved", tmp_path / "pickled"
    model = checkpoint(saved, "llama", SMALL)
    if form == "bfloat16":
        model.bfloat16().save_pretrained(saved)
    shutil.copytree(saved, pickled)
    (pickled / "model.safetensors").unlink()
    state = model.state_dict()
    if form == "shards":
        names = list(state)
        where = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
        for file in set(where.values()):
            torch.save({n: state[n] for n in names if where[n] == file}, pickled / file)
        index = pickled / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": where}))
    else:
        now = form != "before torch 1.6"
        torch.save(state, pickled / "pytorch_model.bin", _use_new_zipfile_serialization=now)
    expected = exporters.export(saved, tmp_path / "a")
    bundle = exporters.export(pickled, tmp_path / "b")
    names = set(expected.files) | set(bundle.files)
    assert {name: bundle.files[name] for name in names} == expected.files


class Evil:
    def __reduce__(self):
        return print, ("code of a pickle ran",)


def test_a_pickle_that_is_more_than_tensors_is_refused_and_not_run(tmp_path, capsys):
    folder = tmp_path / "saved"
    model = checkpoint(folder, "llama", SMALL)
    (folder / "model.safetensors").unlink()
    weights = folder / "pytorch_model.bin"
    for content, text in [
        ({**model.state_dict(), "evil": Evil()}, "torch refuses to load it as weights only"),
        ({"state": model.state_dict()}, "holds more than tensors by name"),
        ([], "holds more than tensors by name"),
    ]:
        torch.save(content, weights)
        with pytest.raises(SourceError, match=text):
            exporters.export(folder, tmp_path / "out")
    torch.save(model.state_dict(), weights)
    whole = weights.read_bytes()
    for damaged in (b"", b"hello", whole[:9], whole[: len(whole) // 2], whole[:-9]):
        weights.write_bytes(damaged)
        with pytest.raises(SourceError, match="torch refuses to load it"):
            exporters.export(folder, tmp_path / "out")
    assert "ran" not in capsys.readouterr().out


def test_damaged_and_missing_files(tmp_path):
    folder = tmp_path / "saved"
    checkpoint(folder, "llama", SMALL)
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(SourceError, match="truncated or damaged"):
        exporters.export(folder, tmp_path / "out")
    weights.unlink()
    with pytest.raises(SourceError, match=r"neither \*\.safetensors nor pytorch_model\.bin"):
        exporters.export(folder, tmp_path / "out")
    weights.write_bytes(content)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match=r"tokenizer\.json is no tokenizer"):
        exporters.export(folder, tmp_path / "out")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match=r"no tokenizer\.json"):
        exporters.export(folder, tmp_path / "out")
    (folder / "config.json").write_text("{")
    with pytest.raises(SourceError, match=r"cannot read .*config\.json"):
        exporters.export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_index_says_which_files_hold_the_weights(tmp_path):
    folder = tmp_path / "saved"
    model = checkpoint(folder, "llama", SMALL)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    other = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    save_file(other, folder / "other.safetensors")  # as checkpoints have it in a second layout
    session = Session(exporters.export(folder, tmp_path / "out"), threads=1)
    with torch.no_grad():
        expected = model(torch.tensor([[3, 1, 4]])).logits[0].numpy()
    np.testing.assert_allclose(language.logits(session, [3, 1, 4]), expected, atol=1e-4)
    shards[1].unlink()
    with pytest.raises(SourceError, match=f"lacks {shards[1].name}, by its model.safetensors.ind"):
        exporters.export(folder, tmp_path / "no")


def test_half_precision_and_names_without_their_prefix(tmp_path):
    folder = tmp_path / "saved"
    model = checkpoint(folder, "gpt2", VARIANTS["gpt2"][0])
    half = {
        name.removeprefix("transformer."): value.to(torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    (folder / "model.safetensors").unlink()
    save_file(half, folder / "model.safetensors")
    session = Session(exporters.export(folder, tmp_path / "out"), threads=1)
    tokens = [3, 1, 4, 1, 5]
    model.load_state_dict({f"transformer.{k}": v.float() for k, v in half.items()}, strict=False)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    np.testing.assert_allclose(language.logits(session, tokens), expected, atol=1e-4)
