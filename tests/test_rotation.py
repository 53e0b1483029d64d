"""Rotated weights: the same model in fp32, of every architecture that can be rotated."""

from functools import partial

import numpy as np
import pytest
from tiny_bundles import BUILDERS
from transformers_models import VARIANTS, VOCAB, checkpoint

from leangen import exporters, rotation
from leangen.bundle import create, open_bundle
from leangen.cli import main
from leangen.errors import UnknownSchemeError
from leangen.families import language
from leangen.graph_edit import Graph
from leangen.low_bit_bundle import copy_assets
from leangen.quantize import quantize
from leangen.session import Session
from leangen.sites import find_sites

REFUSED = {
    "gemma2": "writes its residual stream, where a linear layer is expected",  # norms after blocks
    "gemma3_text": "writes its residual stream, where a linear layer is expected",
    "gpt2": "looks up 2 tables",
    "gpt_neox": "LayerNormalization",
    "mixtral": "reads a norm",
    "olmo2": "MatMul",  # no norm before the layers: the stream itself is read
    "olmoe": "reads a norm",
    "opt": "looks up 2 tables",
    "qwen3_moe": "reads a norm",
}


def logits(bundle, **options):
    tokens = np.random.default_rng(3).integers(0, VOCAB, 50).tolist()
    return language.logits(Session(bundle, threads=1, **options), tokens)


@pytest.mark.parametrize("width", [1, 7, 16, 48, 320, 576, 1024])
def test_a_rotation_is_orthogonal_and_mixes_all_columns(width):
    turn = rotation.Rotation(width)
    matrix = turn(np.eye(width), 1)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(width), atol=2e-6 * max(8, width**0.5))
    assert width < 16 or np.abs(matrix).max() < 0.5, "no column stays by itself"
    x = np.random.default_rng(0).standard_normal((3, 2 * width, 4)).astype(np.float32)
    stretches = x.reshape(3, 2, width, 4)
    expected = np.einsum("abwc,wv->abvc", stretches, matrix).reshape(x.shape)
    np.testing.assert_allclose(turn(x, 1), expected, atol=1e-4)
    np.testing.assert_array_equal(rotation.Rotation(width)(x, 1), turn(x, 1))


@pytest.mark.parametrize("kind", VARIANTS)
def test_the_model_stays_what_it_is_or_is_refused(kind, tmp_path):
    for place, options in enumerate(VARIANTS[kind]):
        folder = tmp_path / str(place)
        checkpoint(folder / "saved", kind, options)
        bundle = exporters.export(folder / "saved", folder / "fp32")
        if kind in REFUSED:
            with (
                pytest.raises(UnknownSchemeError, match=REFUSED[kind]),
                rotation.rotated(bundle, folder / "out"),
            ):
                pass
        else:
            with rotation.rotated(bundle, folder / "out") as turned:
                before, after = (logits(each, kernels="ort") for each in (bundle, turned))
                np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())
                ours, theirs = (Graph(each.graph("model")) for each in (turned, bundle))
                weights = [name for name in theirs.float_parameters() if name.endswith("o.weight")]
                assert weights
                for name in weights:
                    assert np.abs(ours.array(name) - theirs.array(name)).max() > 1e-3
        assert {path.name for path in folder.iterdir()} == {"saved", "fp32"}, "nothing is left"


def test_outliers_are_spread_before_rounding(tmp_path):
    """One weight of a hundred is large, as heavy tails have it: a block's scale then fits none."""
    checkpoint(tmp_path / "saved", "llama", VARIANTS["llama"][0])
    bundle = exporters.export(tmp_path / "saved", tmp_path / "fp32")
    graph, rng = Graph(bundle.graph("model")), np.random.default_rng(0)
    with create(tmp_path / "outliers") as draft:
        for site in find_sites(graph):
            if site.kind == "linear":
                by = np.where(rng.random(graph.shape(site.weight)) < 0.01, 12, 1)
                graph.change(site.weight, partial(np.multiply, by))
        graph.save(draft.folder / "model.onnx")
        copy_assets(bundle, draft.folder)
        draft.name, draft.family, draft.scheme = bundle.name, bundle.family, "fp32"
        draft.graphs, draft.config = dict(bundle.graphs), dict(bundle.config)
    bundle = open_bundle(tmp_path / "outliers")
    exact, lost = logits(bundle), {}
    for scheme in ("int4-g64-rtn", "int4-g64-rot-rtn"):
        low = quantize(bundle, scheme, tmp_path / scheme)
        assert low.scheme == scheme
        lost[scheme] = np.square(logits(low, activations="fp32") - exact).mean()
    assert lost["int4-g64-rot-rtn"] < 0.8 * lost["int4-g64-rtn"]


def test_other_families_and_schemes_are_refused(tmp_path, capsys):
    flow = BUILDERS["flow/density"](tmp_path / "f")
    assert (
        main(["quantize", str(flow.path), "--scheme", "int4-rot", "-o", str(tmp_path / "o")]) == 2
    )
    assert "cannot be rotated: that is for language models" in capsys.readouterr().err
    assert (
        main(["quantize", str(flow.path), "--scheme", "fp16-rot", "-o", str(tmp_path / "o")]) == 2
    )
    assert "fp16 has no -rot" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
