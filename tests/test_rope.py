"""Every kind of rotation that transformers scales, against transformers itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers_models import SMALL, VARIANTS, VOCAB, checkpoint, torch, transformers

from leangen import exporters
from leangen.cli import main
from leangen.errors import RequestError, SourceError, UnsupportedError
from leangen.exporters import rope
from leangen.exporters.transformers_folder import Tensors
from leangen.exporters.transformers_lm import read_layout
from leangen.families import language
from leangen.session import Session

ORIGINAL = 32  # of the 128 tokens of SMALL


def yarn(**options):
    own = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
    return {**SMALL, "rope_parameters": {"rope_theta": 1e4, **own, **options}}


def longrope(pairs=8, **options):
    """With factors that a float holds, since transformers rounds them to float32."""
    own = {
        "rope_type": "longrope",
        "short_factor": [1 + i / 16 for i in range(pairs)],
        "long_factor": [2 + i / 2 for i in range(pairs)],
        "original_max_position_embeddings": ORIGINAL,
    }
    top = {"original_max_position_embeddings": ORIGINAL}
    return {**SMALL, **top, "rope_parameters": {"rope_theta": 1e4, **own, **options}}


MODELS = {
    "llama-yarn": ("llama", yarn()),
    "llama-dynamic": (
        "llama",
        {**SMALL, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
    ),
    "llama-longrope": ("llama", longrope()),
    "qwen2-yarn-stated": ("qwen2", yarn(attention_factor=1.5, beta_fast=4.0, beta_slow=0.5)),
    "qwen3-yarn-mscale": (
        "qwen3",
        yarn(mscale=0.7, mscale_all_dim=0.4, truncate=False) | {"head_dim": 48},
    ),
    "qwen2-yarn-within": ("qwen2", yarn(original_max_position_embeddings=128)),
    "gpt_neox-yarn": (
        "gpt_neox",
        yarn(partial_rotary_factor=0.5) | {"num_attention_heads": 2},
    ),
    "phi3-longrope": ("phi3", longrope()),
    "phi3-longrope-partial": ("phi3", longrope(6, partial_rotary_factor=0.75)),
    "phi3-longrope-stated": ("phi3", longrope(attention_factor=1.25, factor=2.0)),
}
LONG = [name for name in MODELS if "longrope" in name]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a model of `MODELS`, and the model."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = folder, checkpoint(folder, *MODELS[name]).double()
        return made[name]

    return of


def assert_same(session, model, count):
    tokens = np.random.default_rng(count).integers(0, VOCAB, count).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    got = language.logits(session, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_at_every_length_of_the_bundle(tmp_path, saved, name):
    folder, model = saved(name)
    bundle = exporters.export(folder, tmp_path / "out")
    context = ORIGINAL if name in LONG else 128
    assert bundle.config["context_length"] == context
    session = Session(bundle, threads=1)
    for count in (5, ORIGINAL, context):
        assert_same(session, model, count)
    assert all(difference.passed for difference in exporters.check(folder, bundle))


@pytest.mark.parametrize("name", LONG)
def test_the_long_factors_hold_at_every_length_of_a_longer_context(tmp_path, saved, name):
    folder, model = saved(name)
    bundle = exporters.export(folder, tmp_path / "out", context=120)
    session = Session(bundle, threads=1)
    for count in (ORIGINAL + 1, 120):
        assert_same(session, model, count)


@pytest.mark.parametrize("context", [None, 128])
def test_the_check_takes_the_factors_that_the_bundle_has(tmp_path, context):
    """Its 64 tokens are fewer than the original length, by which transformers chooses."""
    late = {"original_max_position_embeddings": 100}
    checkpoint(tmp_path / "saved", "phi3", longrope(**late) | late)
    bundle = exporters.export(tmp_path / "saved", tmp_path / "out", context=context)
    assert bundle.config["context_length"] == (context or 100)
    found = exporters.check(tmp_path / "saved", bundle)
    assert found[0].tokens == 64
    assert all(difference.passed for difference in found)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("length", [1, 128])
def test_frequencies_are_those_of_transformers(saved, name, length):
    folder, model = saved(name)
    parameters = dict(read_layout(folder).ropes["rope"])
    turn = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[parameters["rope_type"]]
    expected, attention = turn(model.config, "cpu", seq_len=length)
    got, factor = rope.frequencies(parameters, 2 * len(expected), length)
    np.testing.assert_allclose(got, expected.numpy(), rtol=1e-6)
    assert factor == pytest.approx(attention, rel=1e-12)


def test_what_stands_still_is_not_scaled(saved):
    folder, _ = saved("phi3-longrope-partial")
    with Tensors(folder, read_layout(folder)) as weights:
        cosines, sines = weights.rotation("rope")
    assert (cosines[:, 6:] == 1).all() and (sines[:, 6:] == 0).all()
    assert cosines.shape == (128, 8) and (cosines[0, :6] > 1.1).all()


@pytest.mark.parametrize("kind", ["su", "yarn", "longrope"])
def test_older_files_of_phi3_are_read(saved, kind):
    """Factors stood in `rope_scaling`, the original length and the share rotated beside it."""
    folder, _ = saved("phi3-longrope-partial")
    file = folder / "config.json"
    now, config = read_layout(folder), json.loads(file.read_text())
    whole = file.read_text()
    parameters = config.pop("rope_parameters")
    scaling = {key: parameters[key] for key in ("short_factor", "long_factor")} | {"type": kind}
    old = {"rope_theta": 1e4, "partial_rotary_factor": 0.75, "rope_scaling": scaling}
    file.write_text(json.dumps(config | old))
    try:
        then = read_layout(folder)
    finally:
        file.write_text(whole)
    assert config["original_max_position_embeddings"] == ORIGINAL
    assert then.rotary_dims == now.rotary_dims == 12
    for length in (1, 128):
        one, two = (rope.frequencies(layout.ropes["rope"], 12, length) for layout in (then, now))
        np.testing.assert_array_equal(one[0], two[0])
        assert one[1] == two[1]


def test_the_bundle_says_why_its_context_is_what_it_is(tmp_path, saved, capsys):
    folder, _ = saved("phi3-longrope")
    bundle = exporters.export(folder, tmp_path / "short")
    why = "longrope's short factors, which hold for up to 32 tokens; `leangen export --context N`"
    assert why in bundle.config["reasons"]["context_length"]
    with pytest.raises(RequestError, match=rf"the model's context 32 \({why}"):
        language.encode(Session(bundle, threads=1), language.Request(tokens=[3] * 32))
    assert main(["export", str(folder), "-o", str(tmp_path / "long"), "--context", "128"]) == 0
    said = capsys.readouterr().err
    assert "context_length 128: longrope's long factors hold at every length" in said
    assert "up to 32 tokens" in said
    for name, text in (
        ("llama-dynamic", "dynamic scaling begins beyond it and is not run"),
        ("qwen2-yarn-within", "yarn's factor reaches 512 tokens"),
    ):
        bundle = exporters.export(saved(name)[0], tmp_path / name)
        assert text in bundle.config["reasons"]["context_length"]
    assert "reasons" not in exporters.export(saved("llama-yarn")[0], tmp_path / "plain").config


def test_a_context_can_be_shorter_and_not_longer_than_the_angles_hold(tmp_path, saved):
    folder, model = saved("qwen2-yarn-within")
    bundle = exporters.export(folder, tmp_path / "out", context=512)  # its factor times 128
    assert_same(Session(bundle, threads=1), model, 300)
    bundle = exporters.export(folder, tmp_path / "less", context=7)
    assert bundle.config["reasons"]["context_length"].startswith("7 tokens were asked for, of 512")
    assert_same(Session(bundle, threads=1), model, 7)
    arguments = ["export", str(folder), "-o", str(tmp_path / "one"), "--context", "1", "--check"]
    assert main(arguments) == 0
    for name, context, most in (
        ("qwen2-yarn-within", 513, 512),
        ("qwen2-yarn-within", 0, 512),
        ("llama-dynamic", 129, 128),
        ("phi3-longrope", 129, 128),
        ("phi3-longrope", -1, 128),
    ):
        with pytest.raises(RequestError, match=f"context is {context}, expected 1 to {most} tok"):
            exporters.export(saved(name)[0], tmp_path / "no", context=context)
    checkpoint(tmp_path / "gpt2", "gpt2", VARIANTS["gpt2"][0])
    with pytest.raises(RequestError, match="does not apply: this model has learned 128 positions"):
        exporters.export(tmp_path / "gpt2", tmp_path / "no", context=64)
    assert not (tmp_path / "no").exists()


MUCH = 10**400


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("llama-yarn", {"factor": None}, "factor None for its rotation, expected a number above 0"),
        ("llama-yarn", {"factor": "4"}, "factor '4' for its rotation"),
        ("llama-yarn", {"factor": MUCH}, "no angles can be computed"),
        ("llama-yarn", {"rope_theta": 1.0}, "no angles can be computed"),
        (
            "llama-yarn",
            {"partial_rotary_factor": 0.5},
            "'yarn' for a part of each head, which a ll",
        ),
        ("llama-yarn", {"beta_fast": -1}, "beta_fast -1 for its rotation"),
        ("llama-yarn", {"attention_factor": "big"}, "attention_factor 'big' for its"),
        ("llama-yarn", {"attention_factor": 0}, "attention_factor 0 for its rotation"),
        ("llama-yarn", {"original_max_position_embeddings": -4096}, "embeddings -4096 for its"),
        ("llama-dynamic", {"factor": []}, r"factor \[\] for its rotation"),
        ("phi3-longrope", {"short_factor": [1.0] * 5}, "short_factor of 5 values for its .* 8 num"),
        ("phi3-longrope", {"long_factor": None}, "long_factor of None for its rotation"),
        ("phi3-longrope", {"long_factor": "x" * 999}, r"long_factor of 'x+\.\.\.x+' for its"),
        ("phi3-longrope", {"long_factor": [1.0] * 7 + [0]}, "long_factor of 8 values"),
        ("phi3-longrope", {"long_factor": [1.0] * 7 + [True]}, "long_factor of 8 values"),
        ("phi3-longrope", {"long_factor": [MUCH] * 8}, "no angles can be computed"),
        (
            "phi3-longrope",
            {"partial_rotary_factor": 0.75},
            "of 8 values for its rotation, .* 6 num",
        ),
        ("phi3-longrope", {"partial_rotary_factor": 0.7}, "0.7 for the share of a head"),
        ("phi3-longrope", {"partial_rotary_factor": "1"}, "'1' for the share of a head"),
        ("phi3-longrope", {"partial_rotary_factor": 1.5}, "1.5 for the share of a head"),
        ("phi3-longrope", {"rope_type": "proportional"}, "rope of type 'proportional', expected"),
        ("phi3-longrope", {"rope_type": ["yarn"]}, "rope of type .* expected"),
    ],
)
def test_numbers_that_make_no_rotation_are_refused(tmp_path, saved, name, changes, said):
    folder, _ = saved(name)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] |= changes
    if "original_max_position_embeddings" in changes:
        config.pop("original_max_position_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((SourceError, UnsupportedError), match=said) as caught:
        exporters.export(tmp_path, tmp_path / "out")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900


def test_a_number_that_the_kind_of_rotation_does_not_take_is_not_looked_at():
    parameters = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": "x"}
    assert rope.room(parameters, 128) == (128, 128)
    far = {"rope_type": "yarn", "factor": 1e308, "original_max_position_embeddings": 4096}
    assert rope.room(far, 128) == (128, 2**31 - 1)


@pytest.mark.parametrize("original", [-1, "4096", None, 1])
def test_an_original_length_at_the_top_is_taken_first_and_checked(tmp_path, saved, original):
    folder, _ = saved("phi3-longrope")
    config = json.loads((folder / "config.json").read_text())
    config |= {"original_max_position_embeddings": original}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = "original_max_position_embeddings.* for its rotation"
    with pytest.raises(SourceError, match=said):
        exporters.export(tmp_path, tmp_path / "out")
