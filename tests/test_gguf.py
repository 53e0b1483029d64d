"""GGUF files that cannot be exported say why, and leave nothing behind."""

import json
import re

import numpy as np
import pytest
from gguf_fixtures import Tiny, write

from leangen import exporters
from leangen.bundle import open_bundle, verify
from leangen.cli import main
from leangen.errors import SourceError, StorageError, UnsupportedError
from leangen.exporters import gguf, gguf_checkpoint


def refused(tmp_path, tiny, error, *patterns):
    path = write(tmp_path / "tiny.gguf", tiny)
    with pytest.raises(error) as caught:
        gguf.export(path, tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message
    for pattern in (re.escape(str(path)), *patterns):
        assert re.search(pattern, message), message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.gguf"]


def test_a_truncated_file_says_so_wherever_it_ends(tmp_path):
    whole = write(tmp_path / "whole.gguf", Tiny()).read_bytes()
    cut = tmp_path / "cut.gguf"
    ends = np.unique(np.linspace(5, len(whole) - 1, 25).astype(int))
    for end in [*ends, *range(5, 60, 7)]:
        cut.write_bytes(whole[:end])
        with pytest.raises(SourceError, match=r"truncated or damaged .* download it again"):
            gguf.export(cut, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_not_a_gguf_file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 something else")
    assert not gguf.accepts(path)
    assert not gguf.accepts(tmp_path / "missing")
    with pytest.raises(SourceError, match="is not a GGUF file .*PK"):
        gguf.export(path, tmp_path / "out")


def test_another_architecture_is_named(tmp_path):
    said = ("'qwen3next'", "the nearest is qwen3", "leangen exports gemma2, .*llama")
    refused(tmp_path, Tiny(architecture="qwen3next"), UnsupportedError, *said)


def test_missing_tensors_are_listed(tmp_path):
    gone = ("blk.0.attn_k.weight", "blk.1.ffn_up.weight")
    refused(tmp_path, Tiny(skip=gone), SourceError, *(f"{name} is missing" for name in gone))


def test_a_missing_embedding_is_listed(tmp_path):
    missing = "token_embd.weight"
    refused(tmp_path, Tiny(skip=(missing,)), SourceError, f"{missing} is missing")


def test_a_wrong_shape_is_stated(tmp_path):
    bad = Tiny(skip=("blk.1.attn_q.weight",))
    bad.extra = {"blk.1.attn_q.weight": np.zeros((48, 64), np.float32)}
    refused(tmp_path, bad, SourceError, r"blk.1.attn_q.weight is \[48, 64\], expected \[64, 64\]")


def test_unknown_tensors_are_not_ignored(tmp_path):
    extra = {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}
    refused(tmp_path, Tiny(extra=extra), UnsupportedError, "attn_q_norm")


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"llama.rope.scaling.type": "ntk"}, "rope scaling of type 'ntk'"),
        ({"llama.rope.scaling.attn_factor": 2}, "attn_factor 2 without longrope"),
        (
            {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.yarn_ext_factor": 2},
            "yarn_ext_factor 2",
        ),
        ({"llama.attention.sliding_window": 32}, "sliding window"),
        ({"split.count": 3}, "one of 3 parts"),
    ],
)
def test_variants_that_would_compute_wrongly_are_refused(tmp_path, more, what):
    refused(tmp_path, Tiny(metadata=more), UnsupportedError, what)


def with_factors(*parts, pairs=8, **metadata):
    extra = {f"rope_factors_{part}.weight": np.ones(pairs, np.float32) for part in parts}
    keys = {"llama.rope.scaling.original_context_length": 64, **metadata}
    return Tiny(extra=extra, metadata=keys)


@pytest.mark.parametrize(
    ("tiny", "error", "what"),
    [
        (with_factors("long"), SourceError, r"lacks the tensor 'rope_factors_short\.weight'"),
        (with_factors("short"), UnsupportedError, r"does not: rope_factors_short\.weight"),
        (with_factors("long", "short", pairs=5), SourceError, "short_factor of 5 values for its"),
        (
            with_factors("long", "short", **{"llama.rope.scaling.factor": 4}),
            UnsupportedError,
            "rope.scaling.factor 4 beside the factors of longrope",
        ),
        (
            Tiny(metadata={"llama.rope.scaling.type": "longrope"}),
            SourceError,
            r"lacks the tensor 'rope_factors_short\.weight'",
        ),
        (Tiny(rope_factors=np.ones(7)), SourceError, "divisors of 7 values for its rotation"),
        (
            Tiny(
                metadata={
                    "llama.rope.scaling.type": "yarn",
                    "llama.rope.scaling.factor": 4,
                    "llama.rope.scaling.original_context_length": 0,
                }
            ),
            SourceError,
            "original_max_position_embeddings 0 for its rotation",
        ),
    ],
)
def test_factors_of_the_rotation_that_are_missing_or_too_many_are_named(
    tmp_path, tiny, error, what
):
    refused(tmp_path, tiny, error, what)


def test_a_share_of_a_head_that_floats_round_down_is_rotated_whole(tmp_path):
    tiny = Tiny(head_dim=176, heads=2, kv_heads=1, metadata={"llama.rope.dimension_count": 30})
    file = gguf_checkpoint.GgufFile(write(tmp_path / "a.gguf", tiny))
    _, sines = gguf_checkpoint.Checkpoint(file, keep_blocks=False).rotation("rope")
    assert np.count_nonzero(sines[1]) == 15


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", "two"),
        ("llama.attention.sliding_window", "wide"),
        ("llama.rope.freq_base", 0),
        ("llama.rope.dimension_count", 5),
        ("split.count", "one"),
        ("tokenizer.ggml.bos_token_id", "first"),
        ("tokenizer.ggml.token_type", 1),
    ],
)
def test_metadata_of_a_wrong_type_is_refused(tmp_path, key, value):
    refused(tmp_path, Tiny(metadata={key: value}), SourceError, "wrong type or value")


def test_an_unsupported_quantization_names_it_and_the_supported_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_checkpoint, "TYPES", ("F32", "Q8_0"))
    tiny = Tiny(types={"blk.0.attn_q": "Q4_0"})
    refused(tmp_path, tiny, UnsupportedError, r"Q4_0 \(1 tensors, such as blk.0.attn_q", "Q8_0")


def test_an_unknown_form_and_an_existing_target_are_refused(tmp_path):
    path = write(tmp_path / "tiny.gguf", Tiny())
    with pytest.raises(UnsupportedError, match="form is 'int3'"):
        gguf.export(path, tmp_path / "out", form="int3")
    gguf.export(path, tmp_path / "out")
    with pytest.raises(StorageError, match="exists already"):
        gguf.export(path, tmp_path / "out")
    gguf.export(path, tmp_path / "out", replace=True)


def test_the_manifest_tells_what_the_bundle_is(tmp_path):
    tiny = Tiny(default_type="Q4_1", types={"token_embd": "Q8_0", "blk.0.attn_output": "F16"})
    path = write(tmp_path / "Tiny-Q4_1.gguf", tiny)
    bundle = gguf.export(path, tmp_path / "out", form="gguf")
    verify(bundle)
    assert (bundle.name, bundle.family, bundle.scheme) == ("tiny-q4_1", "language", "gguf")
    assert bundle.config["context_length"] == 128
    assert bundle.config["eos_ids"] == [2, 0]  # the file's own first
    assert bundle.source["kind"] == "gguf"
    assert "F16, F32, Q4_1, Q8_0" in bundle.source["weights"]
    nodes = bundle.quantization["nodes"]
    assert nodes["/layers.0/attn/qkv"]["scheme"] == "Q4_1"
    assert nodes["/layers.0/attn/o"]["scheme"] == "fp32"
    assert nodes["/lm_head"]["scheme"] == nodes["/embed"]["scheme"] == "Q8_0"
    assert all(node["reason"] for node in nodes.values())
    assert 6 < bundle.quantization["bits_per_weight"] < 32
    fp32 = gguf.export(path, tmp_path / "fp32", name="tiny", source={"kind": "test"})
    assert (fp32.name, fp32.scheme, fp32.quantization) == ("tiny", "fp32", {})
    assert fp32.source["kind"] == "test"
    assert open_bundle(fp32.path) == fp32
    json.dumps(dict(bundle.config))


def test_what_cannot_be_checked_is_refused_before_it_is_exported(tmp_path, capsys):
    path, out = write(tmp_path / "a.gguf", Tiny()), tmp_path / "out"
    assert main(["export", str(path), "-o", str(out), "--check"]) == 2
    assert "torch, which does not run a.gguf" in capsys.readouterr().err and not out.exists()
    assert main(["export", "hf:some/model", "-o", str(out)]) == 2
    assert "`leangen pull hf:some/model` fetches" in capsys.readouterr().err


def test_the_registry_finds_the_exporter(tmp_path):
    path = write(tmp_path / "no-extension", Tiny())
    assert exporters.find(path) is gguf
    with pytest.raises(SourceError, match="there is no"):
        exporters.find(tmp_path / "missing.gguf")
