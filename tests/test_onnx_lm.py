"""ONNX folders of other programs: found, wrapped and run, with the tokens the weights give."""

from __future__ import annotations

import json

import draws
import numpy as np
import onnx
import pytest
from gguf_fixtures import Tiny, write
from onnx import TensorProto, helper, numpy_helper

from leangen import exporters
from leangen.engine import Engine
from leangen.errors import RequestError, SourceError, UnsupportedError
from leangen.exporters import gguf, onnx_lm
from leangen.families import language
from leangen.quantize import quantize
from leangen.session import Session

PROMPT = [5, 9, 200, 17, 33, 4]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """The same weights, exported by leangen."""
    folder = tmp_path_factory.mktemp("ours")
    tiny = Tiny(tied=False, context=256)
    return gguf.export(write(folder / "tiny.gguf", tiny), folder / "bundle")


def foreign(bundle, path, *, past="past_key_values", half_empty=False):
    """leangen's graph as others write it: a mask goes in, the cache grows, all logits come out."""
    model = onnx.load(bundle.graph("model"))
    graph = model.graph
    config = bundle.config
    names = {}
    for layer in range(config["layers"]):
        for kind in ("key", "value"):
            names[f"past_{kind}_{layer}"] = f"{past}.{layer}.{kind}"
            names[f"present_{kind}_{layer}"] = f"present.{layer}.{kind}"
    for node in graph.node:
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
    mask = [
        helper.make_node("ReduceSum", ["attention_mask", "mask_axis"], ["seen"], keepdims=0),
        helper.make_node("Sub", ["seen", "mask_one"], ["last"]),
        helper.make_node("Cast", ["last"], ["seqlens_k"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["mask_total"], start=1),
        helper.make_node("Squeeze", ["mask_total"], ["mask_scalar"]),
        helper.make_node("Cast", ["mask_scalar"], ["total_sequence_length"], to=TensorProto.INT32),
    ]
    nodes = [*mask, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    for name, value in (("mask_axis", [1]), ("mask_one", 1), ("logits_from", [0])):
        graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    del graph.input[:]
    info = helper.make_tensor_value_info
    graph.input.extend(
        info(name, TensorProto.INT64, ["b", size])
        for name, size in (("input_ids", "s"), ("attention_mask", "t"))
    )
    heads = [0 if half_empty else config["kv_heads"], "p", config["head_dim"]]
    shape = ["b", "h" if half_empty else heads[0], *heads[1:]]
    caches = [name for name in names.values() if name.startswith(past)]
    graph.input.extend(info(name, TensorProto.FLOAT, shape) for name in caches)
    for output in graph.output:
        output.name = names.get(output.name, output.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}_data")
    (path.parent / "tokenizer.json").write_bytes(bundle.asset("tokenizer.json").read_bytes())


def optimum(bundle, folder, name="model.onnx"):
    foreign(bundle, folder / name, half_empty=True)
    config = bundle.config
    said = {
        "model_type": "llama",
        "max_position_embeddings": 256,
        "vocab_size": config["vocab_size"],
        "num_key_value_heads": config["kv_heads"],
        "head_dim": config["head_dim"],
        "num_attention_heads": 4,
        "hidden_size": 64,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(said))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    if name.startswith("onnx/"):
        (folder / "onnx" / "tokenizer.json").rename(folder / "tokenizer.json")
    return folder


def genai(bundle, folder):
    foreign(bundle, folder / "decoder.onnx", past="kv")
    config = bundle.config
    decoder = {
        "filename": "decoder.onnx",
        "head_size": config["head_dim"],
        "num_key_value_heads": config["kv_heads"],
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "kv.%d.key",
            "past_value_names": "kv.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    model = {
        "bos_token_id": 1, "eos_token_id": [2, 0], "context_length": 256, "type": "llama",
        "vocab_size": config["vocab_size"], "decoder": decoder,
    }  # fmt: skip
    (folder / "genai_config.json").write_text(json.dumps({"model": model, "search": {}}))
    return folder


def merged(bundle, folder):
    return optimum(bundle, folder, "onnx/decoder_model_merged.onnx")


@pytest.fixture(scope="module", params=[optimum, genai, merged])
def wrapped(request, ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    source = request.param(ours, folder / "saved")
    assert exporters.find(source) is onnx_lm
    return exporters.export(source, folder / "bundle")


def text(session, **options):
    request = language.Request(**{"tokens": PROMPT, "ignore_eos": True, **options})
    return [token for step in language.run(session, request) for token in step.tokens]


def test_they_compute_what_the_weights_give(ours, wrapped):
    session, reference = Session(wrapped, threads=1), Session(ours, threads=1, kernels="ort")
    assert wrapped.scheme == "fp32"
    tokens = draws.rng().integers(3, 268, 200).tolist()
    got, expected = language.logits(session, tokens), language.logits(reference, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    for options in (
        {"max_new_tokens": 64},
        {"max_new_tokens": 24, "beams": 3},
        {"max_new_tokens": 24, "temperature": 1.0, "seed": 5},
        {"max_new_tokens": 24, "n": 2, "temperature": 1.0},
    ):
        assert text(session, **options) == text(reference, **options)
    # what was guessed is computed in one run, and taken back where it was wrong
    assert text(session, max_new_tokens=32, speculate=4) == text(reference, max_new_tokens=32)
    for prompt in (PROMPT, [*PROMPT, 7, 8]):  # the second starts from the first one's cache
        kept = text(session, tokens=prompt, max_new_tokens=8, prefix_cache=True)
        assert kept == text(reference, tokens=prompt, max_new_tokens=8)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_they_quantize_and_come_back_with_a_receipt(wrapped, tmp_path, scheme):
    low = quantize(wrapped, scheme, tmp_path / scheme)
    engine = Engine(Session(low, threads=1), baseline_s=0)
    result = engine.generate(tokens=PROMPT, max_new_tokens=4, ignore_eos=True)
    assert result.receipt.units.count == len(result.tokens) == 4
    assert result.receipt.scheme == low.scheme == scheme


def test_what_they_say_of_themselves_is_kept(wrapped):
    config = wrapped.config
    assert config["context_length"] == 256
    assert 2 in config["eos_ids"]
    if wrapped.source["kind"] == "optimum":
        run = language.run(
            Session(wrapped),
            language.Request(messages=[{"role": "user", "content": "a b"}], max_new_tokens=2),
        )
        assert list(run)


def test_a_batch_and_calibration_are_refused(wrapped, tmp_path):
    from leangen.families.batch import Batch

    with pytest.raises(RequestError, match="wraps a graph of another program"):
        Batch(Session(wrapped), rows=2, capacity=64)
    with pytest.raises(RequestError, match="wraps a graph of another program"):
        quantize(wrapped, "int4-gptq", tmp_path / "low")


def test_what_cannot_be_wrapped_is_named(ours, tmp_path):
    folder = optimum(ours, tmp_path / "saved")
    (folder / "model.onnx").rename(folder / "decoder_model.onnx")
    with pytest.raises(UnsupportedError, match=r"decoder_model\.onnx alone.*with-past"):
        exporters.export(folder, tmp_path / "out")
    folder = genai(ours, tmp_path / "genai")
    config = json.loads((folder / "genai_config.json").read_text())
    model = onnx.load(folder / "decoder.onnx", load_external_data=False)
    model.graph.input.append(helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1, 3]))
    onnx.save(model, folder / "decoder.onnx")
    with pytest.raises(UnsupportedError, match="not pixels"):
        exporters.export(folder, tmp_path / "out")
    config["model"]["decoder"]["filename"] = "other.onnx"
    (folder / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError, match=r"has no other\.onnx"):
        exporters.export(folder, tmp_path / "out")
    del config["model"]["decoder"]
    (folder / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="'decoder' is missing"):
        exporters.export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
