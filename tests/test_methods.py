"""Methods of rounding, against plain twins in float64 and against the graph before rounding."""

import re
import signal
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from tiny_bundles import BUILDERS

from leangen import calibration_data, methods, moments, precision, schemes
from leangen.bundle import create, open_bundle
from leangen.errors import BundleError, RequestError, UnknownSchemeError
from leangen.graph_edit import Graph
from leangen.methods import METHODS, awq, gptq, output_loss
from leangen.moments import Moments
from leangen.quantize import quantize
from leangen.sites import find_sites

RNG = np.random.default_rng(0)


def inputs(k, rows=400, seed=0):
    """Correlated inputs with a few large channels, as transformers have them."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((k, k)) / np.sqrt(k)
    x = rng.standard_normal((rows, k)) @ (mixing + np.eye(k))
    x *= np.exp(rng.normal(0, 1, k))
    return x.astype(np.float32)


def moment_of(x):
    return (x.T.astype(np.float64) @ x / len(x)).astype(np.float32)


def layer(n=24, k=96, seed=0):
    w = np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)
    return w, inputs(k, seed=seed)


OPTIONS = [{"block_size": 32}, {"block_size": 16, "asymmetric": True}, {"block_size": 128}]
every_method = pytest.mark.parametrize("name", METHODS)
every_option = pytest.mark.parametrize("options", OPTIONS, ids=["g32", "asym-g16", "g128"])


@every_method
@every_option
@pytest.mark.parametrize("scheme", ["int4", "int3", "int2"])
def test_codes_stay_in_range_and_weights_close(name, options, scheme):
    w, x = layer()
    module = schemes.get(scheme)
    packed = methods.get(name).quantize(w, module, moment_of(x), **options)
    assert packed.shape == w.shape and packed.q.max() < 1 << module.BITS
    assert (packed.scheme, packed.bits) == (scheme, module.BITS)
    back = module.dequantize(packed)
    error = np.linalg.norm(back - w) / np.linalg.norm(w)
    assert 0 < error < {"int4": 0.3, "int3": 0.5, "int2": 0.9}[scheme]


@every_method
def test_same_input_same_codes(name):
    w, x = layer()
    one, two = (methods.get(name).quantize(w, schemes.get("int4"), moment_of(x)) for _ in "ab")
    assert np.array_equal(one.q, two.q) and np.array_equal(one.scales, two.scales)


@every_option
@pytest.mark.parametrize("scheme", ["int4", "int3", "int2"])
def test_gptq_loses_at_most_what_rtn_loses_in_every_row_and_much_less_in_all(scheme, options):
    w, x = layer(n=64)
    module, moment = schemes.get(scheme), moment_of(x)
    ours, nearest = (
        ((module.dequantize(packed) - w).astype(np.float64) @ x.T.astype(np.float64)) ** 2
        for packed in (
            gptq.quantize(w, module, moment, **options),
            module.quantize(w, importance=np.diagonal(moment), **options),
        )
    )
    assert np.all(ours.sum(axis=1) <= nearest.sum(axis=1) * 1.001)
    assert ours.sum() < 0.7 * nearest.sum()


def gptq_twin(w, grid, moment, order):
    """GPTQ as the paper states it: one column at a time, in float64, with an explicit inverse."""
    h = moment.astype(np.float64) + 0.01 * np.diagonal(moment).mean() * np.eye(len(moment))
    inverse = np.linalg.inv(h[np.ix_(order, order)])
    rest, codes = w[:, order].astype(np.float64), np.empty(w.shape, np.uint8)
    scales = schemes.spread(grid.scales.astype(np.float64), grid)[:, order]
    zeros = schemes.spread(grid.zero_points.astype(np.float64), grid)[:, order]
    for column in range(w.shape[1]):
        q = np.clip(np.rint(rest[:, column] / scales[:, column] + zeros[:, column]), 0, 15)
        codes[:, order[column]] = q
        lost = rest[:, column] - (q - zeros[:, column]) * scales[:, column]
        rest -= np.outer(lost / inverse[column, column], inverse[column])
        # Eliminate the column: the inverse of what is left (Schur complement).
        inverse -= np.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column, column] = 1.0
    return codes


def test_gptq_is_its_float64_twin():
    w, x = layer(n=32, k=160)
    grid = schemes.get("int4").quantize(w, block_size=32, asymmetric=True)
    moment = moment_of(x)
    order = np.argsort(-np.diagonal(moment), kind="stable")
    turned = np.ix_(order[::-1], order[::-1])
    factor = gptq._factor(gptq._damped(moment)[turned].astype(np.float64))
    ours = gptq._rounded(w.T.copy(), *gptq._grid(grid, slice(None)), 16, factor, order).T
    assert np.mean(ours == gptq_twin(w, grid, moment, order)) > 0.99  # float32 moves a tie or two


def test_codes_set_one_by_one_only_ever_gain():
    w, x = layer(n=8, k=160)
    grid = schemes.get("int3").quantize(w, block_size=32)
    moment = gptq._damped(moment_of(x))
    scales, zeros = gptq._grid(grid, slice(None))
    codes, columns = grid.q.T.astype(np.float32), w.T.copy()

    def loss(codes):
        error = ((codes - zeros) * scales - columns).astype(np.float64)
        return np.einsum("kn,kn->n", moment @ error, error)

    losses = [loss(codes)]
    for _ in range(8):
        gptq._descend(columns, scales, zeros, grid, moment, codes)
        losses.append(loss(codes))
    assert np.all(np.diff(losses, axis=0) <= 1e-6 * losses[0])
    for column in range(0, 160, 7):  # at rest, no neighbouring code is better
        for step in (-1, 1):
            other = codes.copy()
            other[column] = np.clip(other[column] + step, 0, 7)
            assert np.all(loss(other) >= losses[-1] * (1 - 1e-4))
    at_rest = scales.copy()
    for block in range(0, 160, 32):  # nor is another scale
        for factor in (0.99, 1.01):
            scales[block : block + 32] = at_rest[block : block + 32] * factor
            assert np.all(loss(codes) >= losses[-1] * (1 - 1e-4))
            scales[block : block + 32] = at_rest[block : block + 32]


def test_gptq_bears_inputs_that_are_always_zero():
    w, x = layer()
    x[:, 5:20] = 0
    packed = gptq.quantize(w, schemes.get("int4"), moment_of(x))
    assert np.isfinite(schemes.get("int4").dequantize(packed)).all()
    gptq.quantize(w, schemes.get("int4"), np.zeros((96, 96), np.float32))


def test_hqq_shrugs_off_outliers():
    w = np.random.default_rng(1).standard_normal((32, 128)).astype(np.float32)
    w[:, ::64] *= 8
    scheme = schemes.get("int4")

    def typical(packed):
        return np.median(np.abs(scheme.dequantize(packed) - w))

    ours = methods.get("hqq").quantize(w, scheme, None, block_size=64)
    lo, hi = (f(w.reshape(32, 2, 64), axis=2)[..., None] for f in (np.min, np.max))
    s = (hi - lo) / 15
    plain = (np.clip(np.rint(w.reshape(32, 2, 64) / s + np.rint(-lo / s)), 0, 15)) - np.rint(
        -lo / s
    )
    assert ours.zero_points is not None and ours.zero_points.dtype == np.uint8
    assert typical(ours) <= np.median(np.abs((plain * s).reshape(w.shape) - w)) * 1.001


def test_output_loss_is_the_mean_square_over_the_data():
    w, x = layer()
    error = RNG.standard_normal(w.shape).astype(np.float32)
    direct = ((x.astype(np.float64) @ error.T.astype(np.float64)) ** 2).mean(axis=0)
    assert np.allclose(output_loss(error, moment_of(x)), direct, rtol=1e-3)


# Graphs


def norm_mlp(path):
    """RMS norm -> gate_up -> Split -> SiLU * up -> down, as an exported llama has it."""
    node, rng = helper.make_node, np.random.default_rng(3)
    nodes = [
        node("RMSNormalization", ["x", "gain"], ["n"], "/norm", axis=-1),
        node("MatMul", ["n", "gate_up"], ["both"], "/gate_up"),
        node("Split", ["both"], ["gate", "up"], "/split", axis=-1, num_outputs=2),
        node("Sigmoid", ["gate"], ["open"], "/open"),
        node("Mul", ["open", "up"], ["gated"], "/gated"),
        node("MatMul", ["gated", "down"], ["y"], "/down"),
    ]
    constants = {
        "gain": rng.uniform(0.5, 2, 64),
        "gate_up": rng.standard_normal((64, 256)) / 8,
        "down": rng.standard_normal((128, 64)) / 11,
    }
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", 1, ["b", 64])],
        [helper.make_tensor_value_info("y", 1, ["b", 64])],
        [numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 23)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return {"x": inputs(64, 300, seed=5)}


def prepared(tmp_path):
    """The graph after AWQ's rescaling, its moments, and a feed."""
    feed = norm_mlp(tmp_path / "g.onnx")
    graph = Graph(tmp_path / "g.onnx")
    sites = find_sites(graph)
    widths = {site.node.input[0]: site.columns for site in sites}
    moments = Moments(tmp_path / "g.onnx", widths, [feed])

    def trial(site, w, importance):
        packed = schemes.get("int4").quantize(w, block_size=32, importance=importance)
        return schemes.get("int4").dequantize(packed)

    awq.prepare(graph, sites, moments, trial)
    return graph, moments, feed


def run(path, feed, *outputs):
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(list(outputs) or None, feed)


def test_awq_changes_weights_but_not_what_the_graph_computes(tmp_path):
    graph, _, feed = prepared(tmp_path)
    assert not np.allclose(graph.array("gain"), Graph(tmp_path / "g.onnx").array("gain"))
    assert not np.allclose(graph.array("down"), Graph(tmp_path / "g.onnx").array("down"))
    graph.save(tmp_path / "scaled.onnx")
    (exact,), (ours,) = (run(tmp_path / n, feed) for n in ("g.onnx", "scaled.onnx"))
    assert np.allclose(ours, exact, rtol=1e-4, atol=1e-4 * np.abs(exact).max())


def test_moments_are_those_of_the_activations_and_follow_the_rescaling(tmp_path):
    graph, moments, feed = prepared(tmp_path)
    graph.save(tmp_path / "scaled.onnx")
    model = onnx.load(tmp_path / "scaled.onnx")
    for name in ("n", "gated"):
        model.graph.output.append(helper.make_tensor_value_info(name, 1, None))
    onnx.save(model, tmp_path / "seen.onnx")
    for name, x in zip(
        ("n", "gated"), run(tmp_path / "seen.onnx", feed, "n", "gated"), strict=True
    ):
        assert np.allclose(moments[name], moment_of(x), rtol=1e-3, atol=1e-5)


def test_moments_of_a_small_limit_are_the_same(tmp_path):
    feed = norm_mlp(tmp_path / "g.onnx")
    widths = {"n": 64, "gated": 128}
    whole = Moments(tmp_path / "g.onnx", widths, [feed, feed])
    few = Moments(tmp_path / "g.onnx", widths, [feed], limit_bytes=1)
    for name in widths:
        assert np.allclose(whole[name], few[name], rtol=1e-5)


def test_moments_part_by_part_and_in_any_order_are_those_of_the_whole(lm):
    path = lm.graph("model")
    feeds, _ = calibration_data.feeds(lm, None)
    sites = [site for site in find_sites(Graph(path)) if site.kind == "linear"]
    widths = {site.node.input[0]: site.columns for site in sites}
    whole, parts = (
        Moments(path, widths, feeds["model"][:2], limit_bytes=limit) for limit in (1 << 30, 1)
    )
    for name in [*widths, *reversed(widths)]:
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-4, atol=1e-6)


def test_no_node_is_in_two_parts_and_none_that_is_not_needed(lm):
    nodes = Graph(lm.graph("model")).nodes
    assert any("" in node.output for node in nodes)  # left out: it is no tensor that nodes share
    names = [f"/layers.{layer}/mlp/gated/y" for layer in range(2)]
    first, second = moments._parts(nodes, [[name] for name in names])
    layers = [{nodes[i].name.split("/")[1] for i in part.nodes} for part in (first, second)]
    assert "layers.1" not in layers[0] and "layers.0" in layers[0] and "layers.1" in layers[1]
    assert not set(first.nodes) & set(second.nodes)


# Whole bundles


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return BUILDERS["language"](tmp_path_factory.mktemp("lm"))


@every_method
def test_a_language_model_is_quantized_on_its_own_text(lm, name, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_data, "WINDOW", 16)
    low = quantize(lm, f"int4-g16-{name}" if name != "rtn" else "int4-g16", tmp_path / "q")
    assert low.scheme == ("int4-g16" if name == "rtn" else f"int4-g16-{name}")
    assert open_bundle(low.path).quantization["scheme"] == low.scheme
    again = quantize(lm, low.scheme, tmp_path / "again")
    assert again.files == low.files


KILLED = """
import sys
from pathlib import Path
from leangen import calibration_data
from leangen.bundle import open_bundle
from leangen.methods import gptq
from leangen.quantize import quantize

calibration_data.WINDOW, rounds, left = 16, gptq._rounded, int(sys.argv[3])

def dying(*args):
    global left
    left -= 1
    if left < 0:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    return rounds(*args)

gptq._rounded = dying
quantize(open_bundle(Path(sys.argv[1])), "int4-g16-gptq", Path(sys.argv[2]))
"""


def test_killed_half_way_it_goes_on_and_makes_the_same(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_data, "WINDOW", 16)
    whole = quantize(lm, "int4-g16-gptq", tmp_path / "whole")
    layers = sum(e["treatment"] == "matmul4-g16" for e in whole.quantization["nodes"].values())
    out = tmp_path / "q"
    for _ in range(2):
        command = [sys.executable, "-c", KILLED, str(lm.path), str(out), "1"]
        assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
        assert not out.exists()
    (kept,) = tmp_path.glob(".q.tmp-rounded-*")
    assert len(list(kept.iterdir())) == 2
    next(kept.glob("*.npz")).write_bytes(b"damaged")  # counts as missing
    made, counted = [], gptq.quantize
    monkeypatch.setattr(gptq, "quantize", lambda *a, **o: made.append(1) or counted(*a, **o))
    low = quantize(lm, "int4-g16-gptq", out)
    assert len(made) == layers - 1 and low.files == whole.files
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".q.")]


@every_method
@pytest.mark.parametrize("family", ["oneshot", "diffusion"])
def test_other_families_take_methods_too(family, name, tmp_path):
    exact = BUILDERS[family](tmp_path / "exact")
    if family == "diffusion":
        with pytest.raises(UnknownSchemeError, match="fits no weight"):
            quantize(exact, f"int2-{name}", tmp_path / "q")
    else:
        low = quantize(exact, f"int4-g16-{name}", tmp_path / "q")
        assert low.size_bytes < exact.size_bytes


BAD = {
    "empty.txt": (b" \n", "is empty, expected text"),
    "binary.txt": (b"\xff\xfe\x00", "cannot be read as UTF-8"),
    "short.txt": (b"word", "tokens, expected at least"),
    "text.npy": (b"no array", "cannot be read as .npy"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_calibration_data_is_refused_and_leaves_nothing(lm, name, tmp_path):
    (tmp_path / name).write_bytes(BAD[name][0])
    with pytest.raises(RequestError, match=BAD[name][1]):
        quantize(lm, "int4-gptq", tmp_path / "q", data=tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]


ARRAYS = {
    "tokens.npy": (np.zeros((2, 9, 1), np.int64), "expected token ids"),
    "beyond.npy": (np.full((1, 20), 10**6), "expected 0 to"),
    "real.npy": (np.zeros((2, 20)), "of float64, expected token ids"),
    "nothing.npy": (np.zeros((0, 20), np.int64), "is empty"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_arrays_that_are_no_tokens_are_refused(lm, name, tmp_path):
    np.save(tmp_path / name, ARRAYS[name][0])
    with pytest.raises(RequestError, match=ARRAYS[name][1]):
        quantize(lm, "int4-gptq", tmp_path / "q", data=tmp_path / name)


def test_data_that_nothing_looks_at_is_refused(lm, tmp_path):
    (tmp_path / "text.txt").write_text("some text")
    with pytest.raises(RequestError, match="looks at no data: leave out --data"):
        quantize(lm, "int4", tmp_path / "q", data=tmp_path / "text.txt")
    with pytest.raises(RequestError, match="does not exist"):
        quantize(lm, "int4-gptq", tmp_path / "q", data=tmp_path / "none.txt")


def test_images_and_named_arrays_calibrate_a_denoiser(tmp_path):
    from PIL import Image

    exact = BUILDERS["diffusion"](tmp_path / "exact")
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (8, 8), np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    found, said = calibration_data.feeds(exact, folder)
    levels = {float(feed["sigma"][0]) for feed in found["model"]}
    assert len(levels) >= 4 and said[0]["images"] == 3
    feed = dict(found["model"][0])
    np.savez(tmp_path / "feed.npz", **feed)
    assert calibration_data.feeds(exact, tmp_path / "feed.npz")[0]["model"][0].keys() == feed.keys()
    np.savez(tmp_path / "wrong.npz", **feed | {"noisy": np.zeros((1, 1, 9, 9), np.float32)})
    with pytest.raises(RequestError, match=r"noisy has shape \[1, 1, 9, 9\], expected"):
        calibration_data.feeds(exact, tmp_path / "wrong.npz")
    np.savez(tmp_path / "nan.npz", **feed | {"sigma": np.float32([np.nan])})
    with pytest.raises(RequestError, match="NaN or infinity"):
        calibration_data.feeds(exact, tmp_path / "nan.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(RequestError, match="holds x, expected the inputs of a graph: noisy"):
        calibration_data.feeds(exact, tmp_path / "other.npz")
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(folder / "9.png")
    with pytest.raises(RequestError, match=r"9.png has shape \[9, 8, 1\], expected \[8, 8, 1\]"):
        calibration_data.feeds(exact, folder)


def test_named_arrays_take_the_types_of_the_inputs(tmp_path):
    exact = BUILDERS["diffusion"](tmp_path / "exact")
    feed = dict(calibration_data.feeds(exact, None)[0]["model"][0])
    path = tmp_path / "feed.npz"
    np.savez(path, **{name: array.astype(np.float64) for name, array in feed.items()})
    again = calibration_data.feeds(exact, path)[0]["model"][0]
    assert {name: array.dtype for name, array in again.items()} == dict.fromkeys(feed, np.float32)
    np.savez(path, **feed | {"sigma": np.array(["much"])})
    with pytest.raises(RequestError, match="sigma is <U4, expected float32"):
        calibration_data.feeds(exact, path)
    with path.open("wb") as file:
        np.save(file, feed["noisy"])
    with pytest.raises(RequestError, match="feed.npz is a .npy file by its content"):
        calibration_data.feeds(exact, path)
    path.write_text("no archive")
    with pytest.raises(RequestError, match="feed.npz cannot be read as .npz"):
        calibration_data.feeds(exact, path)


def test_arrays_of_images_are_channels_first_or_last(tmp_path):
    """What `leangen generate -o x.npy` writes has them last."""
    exact, path = BUILDERS["diffusion"](tmp_path / "exact"), tmp_path / "x.npy"
    images = np.random.default_rng(0).uniform(size=(3, 8, 8, 1)).astype(np.float32)
    np.save(path, images)
    last, _ = calibration_data.feeds(exact, path)
    np.save(path, np.moveaxis(images, -1, 1))
    first, _ = calibration_data.feeds(exact, path)
    for a, b in zip(last["model"], first["model"], strict=True):
        np.testing.assert_array_equal(a["noisy"], b["noisy"])
    np.save(path, images[..., 0])
    with pytest.raises(RequestError, match="expected images"):
        calibration_data.feeds(exact, path)


def test_rows_that_a_flow_gives_no_density_are_refused(tmp_path):
    exact = BUILDERS["flow/density"](tmp_path / "exact")
    bound = exact.config["latent"]["bound"]
    rows = np.zeros((4, len(exact.config["columns"])))
    rows[2] = 1e9 * bound
    np.save(tmp_path / "rows.npy", rows)
    with pytest.raises(RequestError, match="1 of 4 rows of .* no density, row 2 first"):
        calibration_data.feeds(exact, tmp_path / "rows.npy")


def test_text_is_cut_to_what_a_model_reads_at_once(lm, tmp_path):
    context = lm.config["context_length"]
    np.save(tmp_path / "x.npy", np.zeros((2, context + 1), np.int64))
    with pytest.raises(RequestError, match=f"rows of {context + 1} tokens, .* reads {context}"):
        calibration_data.feeds(lm, tmp_path / "x.npy")
    (tmp_path / "x.txt").write_text("a " * 4 * context)
    for data in (None, tmp_path / "x.txt"):
        found, _ = calibration_data.feeds(lm, data)
        assert {feed["input_ids"].shape for feed in found["model"]} == {(1, context)}


@pytest.mark.parametrize("scheme", ["int4", "fp16"])
@pytest.mark.parametrize("family", ["language", "oneshot"])
def test_weights_that_are_no_numbers_are_named(family, scheme, tmp_path):
    """Also those that no treatment touches, such as a table of positions."""
    exact = BUILDERS[family](tmp_path / "exact")
    graph = Graph(exact.graph("model"))
    for name in graph.float_parameters():
        spoilt = graph.array(name).copy()
        spoilt.flat[-1] = np.nan
        graph = Graph(exact.graph("model"))
        graph.change(name, lambda _, spoilt=spoilt: spoilt)
        folder = tmp_path / "spoilt"
        with create(folder, replace=True) as draft:
            graph.save(draft.folder / "model.onnx")
            draft.name, draft.family, draft.scheme = exact.name, exact.family, exact.scheme
            draft.graphs, draft.config = {"model": "model.onnx"}, dict(exact.config)
            draft.source, draft.quantization = dict(exact.source), dict(exact.quantization)
        with pytest.raises(BundleError, match=f"{re.escape(repr(name))} .* holds NaN"):
            quantize(open_bundle(folder), scheme, tmp_path / "q")
        assert not (tmp_path / "q").exists()


# Names


@pytest.mark.parametrize(
    "text", ["int8", "int4-asym-g64-wo-e4-gptq", "nf4-g32", "int8-wo", "int2-hqq", "fp16"]
)
def test_a_precision_is_written_as_it_is_read(text):
    assert str(precision.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int5", "'int5' is unknown: expected one of fp16, bf16"),
        ("int4-g100", "100 weights to a scale: expected one of 16, 32"),
        ("int4-sideways", "method 'sideways' is unknown: expected one of rtn"),
        ("int4-gptq-g32", "is not a precision: expected SCHEME"),
        ("nf4-asym", "nf4 has no -asym: only int4, int3 and int2"),
        ("int8-g64", "int8 has no -g64: its blocks are fixed; use int8"),
        ("fp16-wo", "fp16 has no -wo"),
        ("nf4-r8", "nf4 has no -r8: that is for int4, int3 and int2"),
        ("int4-r999", "rank is 999, expected at most 256"),
        ("int8-e4", "int8 has no -e4"),
        ("nf4-gptq", "nf4 has no -gptq: methods are for int4, int3 and int2"),
    ],
)
def test_a_precision_that_cannot_be_says_why(text, message):
    with pytest.raises(UnknownSchemeError, match=message):
        precision.parse(text)


def test_a_method_is_named_once():
    assert str(precision.parse("int4", method="rtn")) == "int4-rtn"
    with pytest.raises(UnknownSchemeError, match="names its method already"):
        precision.parse("int4-gptq", method="awq")
