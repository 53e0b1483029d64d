"""Each treatment of each kind of node: ONNX Runtime computes what the packed weight stands for."""

import re

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from leangen import plan
from leangen.graph_edit import Graph, Range
from leangen.sites import find_sites
from leangen.treatments import STANDARD, Treatments, code_bits, read

LAYERS = {
    # op, attributes, shape of the weight, of the input, of the bias
    "conv 2-D": ("Conv", {"pads": [1, 1, 1, 1]}, (33, 32, 3, 3), (1, 32, 7, 7), (33,)),
    "conv 1-D": ("Conv", {"strides": [2]}, (40, 64, 5), (2, 64, 31), None),
    "conv grouped": ("Conv", {"group": 4}, (64, 16, 2, 2), (1, 64, 5, 5), (64,)),
    "deconv 2-D": ("ConvTranspose", {"strides": [2, 2]}, (32, 24, 2, 2), (1, 32, 4, 4), (24,)),
    "deconv 1-D": ("ConvTranspose", {"strides": [3]}, (48, 20, 4), (1, 48, 9), None),
    "matmul": ("MatMul", {}, (96, 33), (5, 96), None),
    "matmul with a tail": ("MatMul", {}, (50, 64), (2, 3, 50), None),
    "gemm": ("Gemm", {}, (64, 40), (5, 64), (40,)),
    "gemm transposed": ("Gemm", {"transB": 1}, (40, 64), (5, 64), (40,)),
    "embedding": ("Gather", {}, (70, 64), (2, 6), None),
}
# Half a step of the weight's (and, with static int8, the activations') rounding, as a share of an
# output's RMS, with room for chance.
LARGEST = {"16": 1e-3, "bf16": 5e-3, "8": 0.02, "8a8": 0.04, "4": 0.15, "3": 0.3, "2": 0.6}
LARGEST |= {"nf4": 0.15, "fp4": 0.2}
OPTIONS = ("w4-asym", "w3-asym-g64", "matmul4-asym-g16", "matmul4-wo", "matmul2-asym")
OPTIONS += ("w4-g64-r4", "w3-asym-r2", "matmul4-r4-wo", "matmul4-asym-g16-r2")
OPTIONS += ("matmul3-asym-g64", "matmul4-g128", "matmulnf4-g32")


def layer(name, path):
    """The file of one layer with random weights, and an input for it."""
    op, options, weight, shape, bias = LAYERS[name]
    rng = np.random.default_rng(len(name))
    constants = [("w", weight)] + ([("b", bias)] if bias else [])
    tensors = [
        numpy_helper.from_array(rng.normal(0, 1, s).astype(np.float32), n) for n, s in constants
    ]
    x = rng.normal(0, 1, shape).astype(np.float32)
    inputs = ["x", *(tensor.name for tensor in tensors)]
    if op == "Gather":
        x, inputs = rng.integers(0, weight[0], shape), ["w", "x"]
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    graph = helper.make_graph(
        [helper.make_node(op, inputs, ["y"], "layer", **options)],
        "g",
        [helper.make_tensor_value_info("x", kind, list(shape))],
        [helper.make_tensor_value_info("y", 1, None)],
        tensors,
    )
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return x


def run(path, x):
    (y,) = ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    return y


def span(name, values):
    return {name: Range(float(values.min()), float(values.max()), values.shape)}


def offered(name, tmp_path):
    """What fits the layer: its graph and site, an input, and the exact output."""
    path = tmp_path / "exact.onnx"
    x = layer(name, path)
    exact = run(path, x)
    graph = Graph(path)
    (site,) = find_sites(graph)
    treatments = Treatments(graph, span("x", x) | span("y", exact))
    return graph, site, treatments, x, exact


@pytest.mark.parametrize("name", LAYERS)
def test_each_treatment_is_close_and_counts_its_bits(name, tmp_path):
    _, site, treatments, _, _ = offered(name, tmp_path)
    seen = [t for t in (*STANDARD, *OPTIONS) if treatments.fits(site, t)]
    assert len(seen) > 3
    for treatment in seen:
        graph, site, treatments, x, exact = offered(name, tmp_path)
        treated = treatments.apply(site, treatment)
        assert treated.code_bits == code_bits(treatment)
        assert site.weights == np.prod(LAYERS[name][2])
        assert treated.stored_bits >= treated.code_bits * site.weights
        assert treated.stored_bits <= treatments.stored_bits(site, treatment) + 16 * site.rows
        graph.replace({"layer": treated.nodes})
        graph.save(tmp_path / "low.onnx")
        ours = run(tmp_path / "low.onnx", x)
        assert ours.shape == exact.shape
        error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
        code = re.match("(?:w|matmul|gather)([^-]+)", treatment)[1]
        assert 0 < error < LARGEST[code], treatment
        stored = sum(t.dims and len(t.raw_data) or 0 for t in low_constants(tmp_path, site.weight))
        assert stored * 8 == treated.stored_bits, treatment


def low_constants(tmp_path, weight):
    """The constants that hold the low-bit weight."""
    graph = onnx.load(tmp_path / "low.onnx").graph
    return [tensor for tensor in graph.initializer if tensor.name.startswith(f"{weight}/")]


@pytest.mark.parametrize("treatment", ["w8a8", "w4", "w16"])
@pytest.mark.parametrize(
    "tensor", ["/c/x", "/c/w", "/c/b", "/c/w_scale", "/c/unrounded", "/c/x/u8"]
)
def test_a_tensor_may_be_called_as_a_stand_ins_would_be(tensor, treatment, tmp_path):
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "weight", "bias"], [tensor], "/c", pads=[1] * 4),
        helper.make_node("Conv", [tensor, "/d/w"], ["y"], "/d", pads=[1] * 4),
    ]
    shapes = {"weight": (16, 8, 3, 3), "bias": (16,), "/d/w": (8, 16, 3, 3)}
    constants = [
        numpy_helper.from_array(rng.standard_normal(shape, np.float32), name)
        for name, shape in shapes.items()
    ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "two", [info("x", 1, [1, 8, 6, 6])], [info("y", 1, None)], constants
    )
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "m.onnx")
    x = rng.standard_normal((1, 8, 6, 6), np.float32)
    exact, opened = run(tmp_path / "m.onnx", x), Graph(tmp_path / "m.onnx")
    sites = find_sites(opened)
    treatments = Treatments(opened, plan.spans(opened, sites, [{"x": x}]))
    opened.replace({site.node.name: treatments.apply(site, treatment).nodes for site in sites})
    opened.save(tmp_path / "low.onnx")
    ours = run(tmp_path / "low.onnx", x)
    assert np.linalg.norm(ours - exact) < 0.2 * np.linalg.norm(exact)


def test_the_kinds_together_use_every_treatment(tmp_path):
    seen = set()
    for name in LAYERS:
        _, site, treatments, _, _ = offered(name, tmp_path)
        seen.update(treatments.offered(site))
    assert seen == set(STANDARD)


def test_small_and_computed_weights_are_no_sites(tmp_path):
    layer("matmul", tmp_path / "g.onnx")
    model = onnx.load(tmp_path / "g.onnx")
    small = numpy_helper.from_array(np.ones((31, 33), np.float32), "w")
    model.graph.initializer[0].CopyFrom(small)
    onnx.save(model, tmp_path / "small.onnx")
    assert find_sites(Graph(tmp_path / "small.onnx")) == []
    model = onnx.load(tmp_path / "g.onnx")
    model.graph.node[0].input[1] = "x"
    onnx.save(model, tmp_path / "computed.onnx")
    assert find_sites(Graph(tmp_path / "computed.onnx")) == []


def test_a_name_that_is_no_treatment_is_refused():
    with pytest.raises(ValueError, match="'w5' is no treatment"):
        read("w5")
