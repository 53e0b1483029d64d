"""Convolutions of every treatment, lowered: what ONNX Runtime computes, but for rounded patches."""

import leangen_kernels
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from leangen import calibrate, lowering
from leangen.graph_edit import Graph
from leangen.sites import find_sites
from leangen.treatments import Treatments

pytestmark = pytest.mark.skipif(
    leangen_kernels.library() is None, reason="no kernels: " + leangen_kernels.status()[1]
)

UNET = """
    unet (float[b, 32, 8, 8] x, float[b, 128] film) => (float[b, 32, 8, 8] y) {
        h = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
        flat = Reshape (h, groups)
        normal = InstanceNormalization <epsilon = 0.001> (flat, ones, zeros)
        shape = Shape (h)
        back = Reshape (normal, shape)
        scaled = Mul (back, gain)
        normed = Add (scaled, shift)
        wide = Unsqueeze (film, spatial)
        f0, f1 = Split <axis = 1, num_outputs = 2> (wide)
        more = Add (f0, one)
        turned = Mul (normed, more)
        moved = Add (turned, f1)
        gate = Sigmoid (moved)
        silu = Mul (moved, gate)
        c = Conv <pads = [1, 1, 1, 1]> (silu, w1, b1)
        r = Add (x, c)
        qkv = Conv (r, w2, b2)
        thirds = Reshape (qkv, merged)
        q0, k0, v0 = Split <axis = 1, num_outputs = 3> (thirds)
        q1 = Mul (q0, half)
        k1 = Mul (k0, half)
        q = Reshape (q1, heads)
        k = Reshape (k1, heads)
        v = Reshape (v0, heads)
        scores = Einsum <equation = "bct,bcs->bts"> (q, k)
        shares = Softmax <axis = -1> (scores)
        seen = Einsum <equation = "bts,bcs->bct"> (shares, v)
        together = Reshape (seen, joined)
        a = Reshape (together, image)
        p = Conv (a, w3, b3)
        y = Add (p, r)
    }"""
UNET_WEIGHTS = {
    "w0": (64, 32, 3, 3), "b0": (64,), "w1": (32, 64, 3, 3), "b1": (32,), "w2": (96, 32, 1, 1),
    "b2": (96,), "w3": (32, 32, 1, 1), "b3": (32,), "gain": (64, 1, 1), "shift": (64, 1, 1),
}  # fmt: skip

VOICE = """
    voice (float[1, 32, t] x) => (float[1, 1, s] y) {
        l = LeakyRelu <alpha = 0.1> (x)
        up = ConvTranspose <strides = [4], pads = [2, 2]> (l, w0, b0)
        u = LeakyRelu <alpha = 0.1> (up)
        c = Conv <pads = [9, 9], dilations = [3]> (u, w1, b1)
        d = Conv <pads = [2, 2], dilations = [1]> (u, w2, b2)
        r = Add (c, up)
        s = Add (r, d)
        e = Relu (s)
        y = Conv <pads = [3, 3]> (e, w3)
    }"""
VOICE_WEIGHTS = {
    "w0": (32, 48, 8), "b0": (48,), "w1": (48, 48, 7), "b1": (48,), "w2": (48, 48, 5), "b2": (48,),
    "w3": (1, 48, 7),
}  # fmt: skip

BROADCAST = UNET.replace(
    "r = Add (x, c)", "m = ReduceMean <keepdims = 1> (x, spatial)\n        r = Add (m, c)"
)

MODELS = {
    "broadcast": (BROADCAST, UNET_WEIGHTS, {"x": (2, 32, 8, 8), "film": (2, 128)}),
    "unet": (UNET, UNET_WEIGHTS, {"x": (2, 32, 8, 8), "film": (2, 128)}),
    "voice": (VOICE, VOICE_WEIGHTS, {"x": (1, 32, 101)}),
}
CONSTANTS = {
    "groups": np.array([0, 8, -1]), "spatial": np.array([2, 3]), "merged": np.array([-1, 96, 64]),
    "heads": np.array([-1, 16, 64]), "joined": np.array([-1, 32, 64]),
    "image": np.array([-1, 32, 8, 8]), "one": np.float32(1), "half": np.float32(0.5),
    "ones": np.ones(8, np.float32), "zeros": np.zeros(8, np.float32),
}  # fmt: skip


def build(name, path, treatment):
    """The model with its convolutions treated, its path, and an input."""
    text, shapes, inputs = MODELS[name]
    rng = np.random.default_rng(7)
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]>\n{text}')
    arrays = {
        key: rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]) if len(shape) > 1 else 8)
        for key, shape in shapes.items()
    }
    floats = {key: values.astype(np.float32) for key, values in arrays.items()}
    for key, values in (floats | CONSTANTS).items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(values), key))
    path.mkdir()
    onnx.save(proto, path / "exact.onnx")
    feeds = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in inputs.items()}
    graph = Graph(path / "exact.onnx")
    sites = find_sites(graph)
    around = [tensor for site in sites for tensor in (site.node.input[0], site.node.output[0])]
    treatments = Treatments(graph, calibrate.ranges(graph, around, [feeds]))
    new = {}
    for site in sites:
        offered = treatments.offered(site)
        chosen = treatment if treatment in offered else "w8"
        new[site.node.name] = treatments.apply(site, chosen).nodes
    graph.replace(new)
    graph.save(path / "model.onnx")
    return path / "model.onnx", feeds


def run(path, feeds):
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(leangen_kernels.library()))
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options).run(None, feeds)[0]


def lowered(path, folder):
    """The lowered model, what each rule did, its own operators and ORT's."""
    folder.mkdir()
    counts = lowering._lower(path, folder)
    nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
    own = sorted(node.op_type for node in nodes if node.domain == "leangen")
    stock = sorted(node.op_type for node in nodes if node.domain != "leangen")
    return folder / "model.onnx", counts, own, stock


def off(y, expected):
    return np.linalg.norm(y - expected) / np.linalg.norm(expected)


# Static QDQ rounds more than a lowered model does, and so is farther from it.
ALLOWED = {"w8": 0.012, "w4": 0.012, "w8a8": 0.05}


@pytest.mark.parametrize("treatment", ALLOWED)
def test_a_unet_block_becomes_five_operators(tmp_path, treatment):
    path, feeds = build("unet", tmp_path / "model", treatment)
    model, counts, own, stock = lowered(path, tmp_path / "lowered")
    assert counts == {"convolution": 4, "pixel_attention": 1}
    assert own == [*4 * ["Conv"], "PixelAttention"]
    assert stock == []
    assert off(run(model, feeds), run(path, feeds)) <= ALLOWED[treatment]


@pytest.mark.parametrize("treatment", ALLOWED)
def test_a_vocoder_keeps_its_last_convolution_with_ort(tmp_path, treatment):
    path, feeds = build("voice", tmp_path / "model", treatment)
    model, counts, own, stock = lowered(path, tmp_path / "lowered")
    assert counts == {"convolution": 3}
    assert own == ["Conv", "Conv", "ConvTranspose"]
    assert "Conv" in stock and not {"LeakyRelu", "Add"} & set(stock)
    assert off(run(model, feeds), run(path, feeds)) <= ALLOWED[treatment]


def test_a_sum_that_broadcasts_is_no_residual(tmp_path):
    path, feeds = build("broadcast", tmp_path / "model", "w8")
    model, _, _, stock = lowered(path, tmp_path / "lowered")
    assert "Add" in stock
    assert off(run(model, feeds), run(path, feeds)) <= ALLOWED["w8"]


@pytest.mark.parametrize("change", ["group = 2", "strides = [2, 2]", 'auto_pad = "SAME_UPPER"'])
def test_what_the_kernels_lack_stays_with_ort(tmp_path, change):
    weight = (32, 16, 3, 3) if "group" in change else (32, 32, 3, 3)
    text = f"""
    other (float[1, 32, 8, 8] x) => (float[1, 32, h, w] y) {{ y = Conv <{change}> (x, w0) }}"""
    MODELS["other"] = (text, {"w0": weight}, {"x": (1, 32, 8, 8)})
    try:
        path, _ = build("other", tmp_path / "model", "w8")
    finally:
        del MODELS["other"]
    (tmp_path / "lowered").mkdir()
    assert lowering._lower(path, tmp_path / "lowered") == {}
