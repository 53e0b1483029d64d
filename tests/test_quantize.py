"""Quantizing bundles: every treatment against NumPy, plans, manifests, errors."""

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_models import denoiser, model, value, weights
from onnx import TensorProto, helper, numpy_helper

from leangen import calibrate, schemes
from leangen.bundle import create, open_bundle, verify
from leangen.errors import UnknownSchemeError
from leangen.exporters import onnx_file
from leangen.families import diffusion
from leangen.family_recipes import RECIPES
from leangen.graph_edit import Graph
from leangen.quantize import quantize
from leangen.sensitivity import Probe, isolate
from leangen.session import Session
from leangen.sites import find_sites
from leangen.treatments import Treatments, code_bits, read

SCHEMES = ("int8", "int4")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize")
    return onnx_file.export(denoiser(folder / "tiny.onnx"), folder / "fp32", name="tiny")


@pytest.fixture(scope="module", params=SCHEMES)
def quantized(request, bundle, tmp_path_factory):
    return quantize(bundle, request.param, tmp_path_factory.mktemp("q") / request.param)


def sample(bundle, seed):
    steps = diffusion.run(Session(bundle, threads=1), diffusion.Request(seed=seed))
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value.array


def session(path):
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


# Treatments

LAYERS = {
    "conv1d": ("Conv", (24, 32, 5), (2, 32, 19), {"pads": [2, 2]}),
    "conv2d": ("Conv", (24, 16, 3, 3), (2, 16, 9, 8), {"pads": [1, 1, 1, 1], "strides": [2, 1]}),
    "grouped": ("Conv", (32, 16, 3, 3), (1, 32, 7, 7), {"group": 2}),
    "narrow": ("Conv", (64, 3, 3, 3), (1, 3, 7, 7), {}),
    "deconv": ("ConvTranspose", (32, 24, 4), (2, 32, 9), {"strides": [2]}),
    "deconv2d": ("ConvTranspose", (16, 24, 3, 3), (1, 16, 5, 5), {}),
    "matmul": ("MatMul", (96, 40), (3, 5, 96), {}),
    "matmul tail": ("MatMul", (100, 40), (5, 100), {}),
    "gemm": ("Gemm", (40, 96), (5, 96), {"transB": 1}),
    "gemm in out": ("Gemm", (64, 40), (5, 64), {}),
}


def layer(tmp_path, name, w_dtype=np.float32):
    """A graph of one layer with bias, its input, and its path."""
    op, w_shape, x_shape, options = LAYERS[name]
    rng = np.random.default_rng(0)
    w = weights(rng, *w_shape).astype(w_dtype)
    constants = {"w": w}
    inputs = ["x", "w"]
    if op != "MatMul":
        outputs = w_shape[1] if op == "ConvTranspose" else w_shape[0]
        if op == "Gemm" and not options:
            outputs = w_shape[1]
        constants["b"] = rng.standard_normal(outputs).astype(np.float32)
        inputs.append("b")
    node = helper.make_node(op, inputs, ["y"], "/layer", **options)
    graph = model(
        [node], [value("x", ["b", *x_shape[1:]])], [value("y", None)], constants, opset=15
    )
    onnx.save(graph, tmp_path / "layer.onnx")
    return tmp_path / "layer.onnx", rng.standard_normal(x_shape).astype(np.float32)


def dequantized(graph, site, treatment):
    """The layer's weight as the packed form stands for it, in its own layout."""
    w = graph.array(site.weight)
    matrix = (np.swapaxes(w, 0, 1) if site.swapped else w).reshape(site.rows, site.columns)
    form = read(treatment)
    scheme, options = schemes.get(form.scheme), {}
    if form.kind == "w8a8":
        options = {"q_max": 63}
    elif form.scheme == "int8":
        fits = site.columns % 32 == 0
        options["block_size"] = 32 if fits else site.columns if form.kind == "w" else 16
    if form.kind == "w" and form.scheme not in ("fp16", "bf16"):
        options["scale_dtype"] = np.float16
    if form.scheme in ("nf4", "fp4"):
        options["block_size"] = 64 if site.columns % 64 == 0 else 32
    back = scheme.dequantize(scheme.quantize(np.ascontiguousarray(matrix), **options))
    if site.swapped:
        return np.swapaxes(back.reshape(w.shape[1], w.shape[0], *w.shape[2:]), 0, 1)
    return back.reshape(w.shape)


@pytest.mark.parametrize("name", LAYERS)
def test_every_treatment_offered_computes_with_its_packed_weight(tmp_path, name):
    path, x = layer(tmp_path, name)
    reference = Graph(path)
    site = find_sites(reference)[0]
    ranges = calibrate.ranges(reference, ["x", "y"], [{"x": x}])
    offered = Treatments(reference, ranges).offered(site)
    assert {"w8", "w16"} <= set(offered)
    for treatment in offered:
        graph = Graph(path)
        site = find_sites(graph)[0]
        exact = Graph(path)
        exact.add("w", np.ascontiguousarray(dequantized(graph, site, treatment)))
        exact.save(tmp_path / "exact.onnx")
        treated = Treatments(graph, ranges).apply(site, treatment)
        graph.replace({"/layer": treated.nodes})
        graph.save(tmp_path / "treated.onnx")
        wanted = session(tmp_path / "exact.onnx").run(None, {"x": x})[0]
        y = session(tmp_path / "treated.onnx").run(None, {"x": x})[0]
        # Where activations are rounded too, half a step of 1/255 or 1/127 of their range shows.
        rounded = treatment in ("w8a8", "matmul8", "matmul4", "matmul3", "matmul2")
        tolerance = 0.02 * np.abs(wanted).max() if rounded else 1e-4
        assert np.abs(y - wanted).max() < tolerance, treatment
        assert treated.code_bits == code_bits(treatment)
        assert treated.stored_bits >= treated.code_bits * site.weights


def test_int4_stores_four_bits_and_half_a_scale(tmp_path):
    path, _ = layer(tmp_path, "conv1d")
    graph = Graph(path)
    site = find_sites(graph)[0]
    assert Treatments(graph).apply(site, "w4").stored_bits == 4.5 * site.weights


def test_int4_scales_that_half_precision_cannot_hold_stay_float32(tmp_path):
    path, x = layer(tmp_path, "conv1d")
    graph = Graph(path)
    graph.add("w", graph.array("w") * np.float32(1e-7))
    site = find_sites(graph)[0]
    assert Treatments(graph).apply(site, "w4").stored_bits == 5 * site.weights


def test_layers_without_constant_or_large_weights_are_left_alone(tmp_path):
    nodes = [
        helper.make_node("MatMul", ["x", "x"], ["a"], "/attention"),
        helper.make_node("MatMul", ["a", "small"], ["b"], "/small"),
        helper.make_node("Gemm", ["b", "w"], ["y"], "/scaled", alpha=0.5),
    ]
    constants = {"small": np.eye(16, dtype=np.float32), "w": np.ones((16, 128), np.float32)}
    onnx.save(
        model(nodes, [value("x", [16, 16])], [value("y", [16, 128])], constants),
        tmp_path / "m.onnx",
    )
    assert find_sites(Graph(tmp_path / "m.onnx")) == []


# Whole bundles


def test_a_quantized_bundle_is_whole_smaller_and_close(bundle, quantized):
    verify(quantized)
    assert quantized.name == "tiny" and quantized.config == bundle.config
    assert quantized.size_bytes < bundle.size_bytes
    for seed in range(3):
        exact = sample(bundle, seed)
        error = np.sqrt(((sample(quantized, seed) - exact) ** 2).mean() / (exact**2).mean())
        assert error < 0.2


def test_the_manifest_gives_every_node_its_treatment_bits_and_reason(bundle, quantized):
    record = quantized.quantization
    sites = find_sites(Graph(bundle.graph("model")))
    assert record["scheme"] == quantized.scheme
    assert set(record["nodes"]) == {site.node.name for site in sites}
    assert all(len(entry["reason"]) > 10 for entry in record["nodes"].values())
    assert all(entry["bits"] <= 32 for entry in record["nodes"].values())
    assert 0.8 < record["weights_8bit_or_fewer"] <= 1
    assert record["calibration"]["requests"]
    assert 0 < record["calibration"]["relative_rmse"]["model"] < 0.25


def test_the_stated_bits_are_those_on_disk(bundle, quantized):
    graph = onnx.load(quantized.graph("model"))
    parameters = sum(Graph(bundle.graph("model")).float_parameters().values())
    stated = quantized.quantization["bits_per_weight"] * parameters / 8
    stored = sum(len(tensor.raw_data) for tensor in graph.graph.initializer)
    assert stated <= stored * 1.02 and stored < stated * 1.3  # shapes, int8 biases beside them


def test_only_standard_operators_and_no_slow_ones(quantized):
    ops = {(node.domain, node.op_type) for node in Graph(quantized.graph("model")).nodes}
    assert {domain for domain, _ in ops} <= {"", "com.microsoft"}
    assert not {"ConvInteger", "MatMulInteger", "DynamicQuantizeLinear"} & {op for _, op in ops}


def test_quantizing_twice_gives_the_same_bytes(bundle, quantized, tmp_path):
    again = quantize(bundle, quantized.scheme, tmp_path / "again")
    assert again.digest == quantized.digest


def test_progress_runs_from_nothing_to_all(bundle, tmp_path):
    seen = []
    quantize(bundle, "int8", tmp_path / "q", progress=lambda *step: seen.append(step))
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1]
    assert all(a[0] <= b[0] for a, b in zip(seen, seen[1:], strict=False))


def test_unknown_and_repeated_schemes_are_refused(bundle, quantized, tmp_path):
    with pytest.raises(UnknownSchemeError, match="'int5' is unknown"):
        quantize(bundle, "int5", tmp_path / "q")
    with pytest.raises(UnknownSchemeError, match=f"is {quantized.scheme} already.*fp32"):
        quantize(quantized, "int8", tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_without_weights_to_quantize_says_so(tmp_path):
    from image_models import gaussian_denoiser

    plain = onnx_file.export(gaussian_denoiser(tmp_path / "g.onnx", 0, 1), tmp_path / "b")
    with pytest.raises(UnknownSchemeError, match="int4 fits no weight"):
        quantize(plain, "int4", tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_an_interrupt_leaves_nothing_and_the_next_try_succeeds(bundle, tmp_path):
    def interrupt(done, total, what):
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(bundle, "int8", tmp_path / "q", progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert quantize(bundle, "int8", tmp_path / "q").scheme == "int8"


def test_assets_come_along(bundle, tmp_path):
    with create(tmp_path / "with") as draft:
        for name in bundle.files:
            (draft.folder / name).write_bytes((bundle.path / name).read_bytes())
        (draft.folder / "sub").mkdir()
        (draft.folder / "sub" / "notes.txt").write_text("kept")
        draft.name, draft.family = bundle.name, bundle.family
        draft.graphs, draft.config = dict(bundle.graphs), dict(bundle.config)
    small = quantize(open_bundle(tmp_path / "with"), "int8", tmp_path / "q")
    assert small.asset("sub/notes.txt").read_text() == "kept"
    assert set(small.files) == {"model.onnx", "model.onnx.data", "sub/notes.txt"}


# Language graphs


def language_bundle(folder, vocab=512, width=64):
    """Embedding, two linear layers, a tied head: what an exported language model looks like."""
    rng = np.random.default_rng(0)
    node = helper.make_node
    nodes = [
        node("Gather", ["embed", "ids"], ["x"], "/embed"),
        node("MatMul", ["x", "up"], ["h"], "/layers.0/mlp/up"),
        node("Relu", ["h"], ["a"]),
        node("MatMul", ["a", "down"], ["d"], "/layers.0/mlp/down"),
        node("MatMul", ["d", "mix"], ["m"], "/layers.1/attn/o"),
        node("Add", ["m", "x"], ["y"]),
        node("FusedMatMul", ["y", "embed"], ["logits"], "/head", domain="com.microsoft", transB=1),
    ]
    constants = {
        "embed": rng.standard_normal((vocab, width)).astype(np.float32),
        "up": weights(rng, width, 128),
        "down": weights(rng, 128, width),
        "mix": weights(rng, width, width),
    }
    ids = value("ids", ["b", "t"], TensorProto.INT64)
    graph = model(nodes, [ids], [value("logits", ["b", "t", vocab])], constants)
    with create(folder) as draft:
        onnx.save(graph, draft.folder / "model.onnx")
        draft.name, draft.family, draft.graphs = "lm", "language", {"model": "model.onnx"}
    return open_bundle(folder)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_language_graphs_take_the_recipe(tmp_path, scheme):
    lm = language_bundle(tmp_path / "lm")
    small = quantize(lm, scheme, tmp_path / "q")
    treatments = {k: v["treatment"] for k, v in small.quantization["nodes"].items()}
    assert treatments["/embed"] == "gather8" and treatments["/head"] == "matmul8"
    assert treatments["/layers.0/mlp/up"] == f"matmul{scheme[-1]}"
    ids = np.arange(40).reshape(2, 20)
    exact, ours = (
        session(b.graph("model")).run(None, {"ids": ids})[0].astype(np.float64) for b in (lm, small)
    )
    assert np.sqrt(((ours - exact) ** 2).mean() / (exact**2).mean()) < 0.1
    for node in Graph(small.graph("model")).nodes:
        if node.op_type == "MatMulNBits":
            options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            assert options["accuracy_level"] == 4
            assert len(node.input) == 3  # symmetric: no zero points of any type


def test_embedding_and_tied_head_share_one_place_in_the_file(tmp_path):
    small = quantize(language_bundle(tmp_path / "lm"), "int8", tmp_path / "q")
    graph = onnx.load(small.graph("model"), load_external_data=False).graph
    by_name = {node.name: node for node in graph.node}
    place = {
        t.name: {entry.key: entry.value for entry in t.external_data} for t in graph.initializer
    }
    embed, head = place[by_name["/embed"].input[0]], place[by_name["/head"].input[1]]
    assert embed == head and int(embed["length"]) == 512 * 64


def test_the_last_mlp_of_int8_keeps_fp32_activations(tmp_path):
    rng = np.random.default_rng(0)
    node = helper.make_node
    nodes = [
        node("MatMul", ["x", "w0"], ["h"], "/layers.0/mlp/down"),
        node("MatMul", ["h", "w1"], ["y"], "/layers.1/mlp/down"),
    ]
    constants = {"w0": weights(rng, 64, 64), "w1": weights(rng, 64, 64)}
    with create(tmp_path / "lm") as draft:
        graph = model(nodes, [value("x", [1, 64])], [value("y", [1, 64])], constants)
        onnx.save(graph, draft.folder / "model.onnx")
        draft.name, draft.family, draft.graphs = "lm", "language", {"model": "model.onnx"}
    small = quantize(open_bundle(tmp_path / "lm"), "int8", tmp_path / "q")
    assert [v["treatment"] for v in small.quantization["nodes"].values()] == ["matmul8", "w8"]


# Recipes, probes, graphs


def test_recipes_say_why_a_node_is_spared():
    speech = RECIPES["flow/speech"]
    assert "duration" in speech.kept("/dp/flows.3/proj/Conv") and speech.kept("/enc_p/x") is None
    assert "hiss" in speech.weights_only("/dec/conv_pre/Conv")
    assert RECIPES["flow/density"].weights_only("/coupling.0/dense.1/MatMul")


@given(
    harm=st.lists(st.floats(0, 1), min_size=1, max_size=40),
    negligible=st.sampled_from([0.0, 1e-3, 0.1]),
)
def test_isolate_finds_what_each_node_does_where_errors_add(harm, negligible):
    names = [str(index) for index in range(len(harm))]
    truth = dict(zip(names, harm, strict=True))
    calls = []

    def error(group):
        calls.append(group)
        return sum(truth[name] for name in group)

    found = isolate(names, error, negligible)
    assert list(found) == names
    assert all(abs(found[name] - truth[name]) <= negligible + 1e-9 for name in names)
    assert len(calls) <= 2 * len(names)


def test_a_probe_switches_nodes_one_by_one(bundle):
    graph = Graph(bundle.graph("model"))
    feeds = calibrate.record(bundle)[0]["model"]
    sites = {site.node.name: site for site in find_sites(graph)}
    treatments = Treatments(graph)
    probe = Probe(graph, {n: treatments.apply(s, "w8") for n, s in sites.items()}, feeds)
    assert probe.error([]) == 0
    alone = {name: probe.error([name]) for name in sites}
    assert all(0 < error < 1e-2 for error in alone.values())
    assert probe.error(list(sites)) == pytest.approx(sum(alone.values()), rel=0.8)


def test_ranges_are_those_of_the_tensors(tmp_path):
    path, x = layer(tmp_path, "conv1d")
    found = calibrate.ranges(Graph(path), ["x", "y"], [{"x": x}, {"x": 2 * x[:1]}])
    assert found["x"].low == np.minimum(x.min(), 2 * x[:1].min())
    assert found["x"].high == np.maximum(x.max(), 2 * x[:1].max())
    assert found["y"].shape == (2, 24, 19)


def test_a_saved_graph_drops_what_no_node_reads(tmp_path):
    path, x = layer(tmp_path, "matmul")
    graph = Graph(path)
    graph.add("unused", np.ones(4000, np.float32))
    graph.save(tmp_path / "again.onnx")
    assert [t.name for t in onnx.load(tmp_path / "again.onnx").graph.initializer] == ["w"]
    first, second = (session(p).run(None, {"x": x})[0] for p in (path, tmp_path / "again.onnx"))
    assert np.array_equal(first, second)


def test_the_manifest_is_plain_json(quantized):
    text = (quantized.path / "leangen.json").read_text()
    assert json.loads(text)["quantization"] == quantized.quantization


def test_numpy_helper_reads_the_stored_weights(quantized):
    graph = onnx.load(quantized.graph("model"))
    assert all(numpy_helper.to_array(t).size for t in graph.graph.initializer)
