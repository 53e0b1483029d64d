"""Each rule against ORT on graphs made for it: what fits is replaced, the rest is left alone."""

import draws
import leangen_kernels
import lowered_graphs
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from leangen.lowering import RULES, _lower, file_of

pytestmark = pytest.mark.skipif(
    leangen_kernels.library() is None, reason="no kernels: " + leangen_kernels.status()[1]
)


class Graph:
    """A graph being written for a test."""

    def __init__(self, **inputs):
        info = helper.make_tensor_value_info
        self.inputs = [info(name, kind, shape) for name, (kind, shape) in inputs.items()]
        self.nodes, self.constants = [], []
        self.caches = []  # outputs that are not compared: each side has an order of its own
        self.rng = draws.rng()

    def constant(self, value):
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def floats(self, *shape):
        return self.constant(self.rng.standard_normal(shape).astype(np.float32))

    def node(self, op, inputs, outputs=1, domain="", **attributes):
        name = f"n{len(self.nodes)}"
        names = [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name, domain=domain, **attributes))
        return names[0] if outputs == 1 else names

    def nbits(self, x, n, k, *, bits=4, block=32, zeros=None, bias=False, **attributes):
        """A MatMulNBits; zeros: None, "packed" or "float"."""
        blocks = -(-k // block)
        size = block * bits // 8
        inputs = [
            x,
            self.constant(self.rng.integers(0, 256, (n, blocks, size), dtype=np.uint8)),
            self.constant((self.rng.random((n, blocks)) / (8 << bits)).astype(np.float32)),
            "", "", "",
        ]  # fmt: skip
        if zeros == "packed":
            packed = (n, -(-blocks * bits // 8))
            inputs[3] = self.constant(self.rng.integers(0, 256, packed, dtype=np.uint8))
        if zeros == "float":
            inputs[3] = self.constant((self.rng.random((n, blocks)) * 15).astype(np.float32))
        if bias:
            inputs[5] = self.floats(n)
        attributes = {"accuracy_level": 1} | attributes
        return self.node(
            "MatMulNBits", inputs, domain="com.microsoft",
            N=n, K=k, bits=bits, block_size=block, **attributes,
        )  # fmt: skip

    def check(self, folder, outputs, feeds, atol=1e-4):
        """Lower it, compare with ORT on the graph as it is; the operators of the lowered one."""
        info = helper.make_tensor_value_info
        graph = helper.make_graph(
            self.nodes, "g", self.inputs,
            [info(name, TensorProto.FLOAT, None) for name in [*outputs, *self.caches]],
            self.constants,
        )  # fmt: skip
        domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=domains, ir_version=10)
        (folder / "g").mkdir()
        path = folder / "g" / "g.onnx"
        onnx.save(model, path)
        (folder / "l").mkdir()
        if not _lower(path, folder / "l"):
            return [node.op_type for node in self.nodes]
        lowered = folder / "l" / file_of(True, None)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.register_custom_ops_library(str(leangen_kernels.library()))
        got, expected = (
            ort.InferenceSession(str(p), options).run(outputs, feeds) for p in (lowered, path)
        )
        for mine, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=atol)
        return lowered_graphs.operators(lowered)


def rows(*shape):
    return draws.rng().standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("k", [16, 32, 100, 160, 320])
def test_group_sizes_and_odd_rows(tmp_path, bits, block, k):
    graph = Graph(x=(TensorProto.FLOAT, ["m", k]))
    y = graph.nbits("x", 21, k, bits=bits, block=block, bias=True)
    assert graph.check(tmp_path, [y], {"x": rows(3, k)}) == ["Linear"]


@pytest.mark.parametrize(("bits", "zeros"), [(4, "packed"), (4, "float"), (8, "packed")])
@pytest.mark.parametrize("k", [32, 96, 100])
def test_zero_points(tmp_path, bits, zeros, k):
    graph = Graph(x=(TensorProto.FLOAT, ["m", k]))
    y = graph.nbits("x", 20, k, bits=bits, zeros=zeros)
    assert graph.check(tmp_path, [y], {"x": rows(3, k)}) == ["Linear"]


@pytest.mark.parametrize("quant_type", [0, 1])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_four_bit_floats(tmp_path, quant_type, block):
    n, k = 21, 256
    graph = Graph(x=(TensorProto.FLOAT, ["m", k]))
    codes = graph.constant(graph.rng.integers(0, 256, n * k // 2, dtype=np.uint8))
    scales = graph.constant((graph.rng.random(n * k // block) / 8).astype(np.float32))
    y = graph.node(
        "MatMulBnb4", ["x", codes, scales], domain="com.microsoft",
        N=n, K=k, block_size=block, quant_type=quant_type,
    )  # fmt: skip
    assert graph.check(tmp_path, [y], {"x": rows(3, k)}) == ["Linear"]


def test_what_no_layout_holds_stays(tmp_path):
    graph = Graph(x=(TensorProto.FLOAT, ["m", 64]))
    y = graph.nbits("x", 32, 64, bits=8, block=16, zeros="packed")
    assert graph.check(tmp_path, [y], {"x": rows(3, 64)}) == ["MatMulNBits"]


def test_weights_that_are_computed_stay(tmp_path):
    graph = Graph(
        x=(TensorProto.FLOAT, ["m", 64]), scales=(TensorProto.FLOAT, [16, 2])
    )  # fmt: skip
    y = graph.nbits("x", 16, 64)
    graph.nodes[0].input[2] = "scales"
    feeds = {"x": rows(3, 64), "scales": rows(16, 2)}
    assert graph.check(tmp_path, [y], feeds) == ["MatMulNBits"]


def norm(graph, x, residual, width, *, layer=False):
    simplified, shift = ("", [graph.floats(width)]) if layer else ("Simplified", [])
    y, _, _, total = graph.node(
        f"Skip{simplified}LayerNormalization", [x, residual, graph.floats(width), *shift], 4,
        domain="com.microsoft", epsilon=1e-3,
    )  # fmt: skip
    graph.nodes[-1].output[1] = graph.nodes[-1].output[2] = ""
    return y, total


@pytest.mark.parametrize("layer", [False, True])
def test_a_norm_and_a_residual_are_drawn_in(tmp_path, layer):
    graph = Graph(x=(TensorProto.FLOAT, ["m", 64]))
    y, total = norm(graph, graph.nbits("x", 64, 64), "x", 64, layer=layer)
    y, total = norm(graph, total, graph.nbits(y, 64, 64), 64, layer=layer)
    found = graph.check(tmp_path, [graph.nbits(y, 64, 64), total], {"x": rows(3, 64)})
    assert found == ["Linear"] * 3


@pytest.mark.parametrize("shift", [False, True])
def test_a_layer_norm_on_its_own(tmp_path, shift):
    graph = Graph(x=(TensorProto.FLOAT, ["m", 64]))
    inputs = ["x", graph.floats(64), *[graph.floats(64)] * shift]
    y = graph.node("LayerNormalization", inputs, axis=-1, epsilon=1e-3)
    assert graph.check(tmp_path, [graph.nbits(y, 64, 64)], {"x": rows(3, 64)}) == ["Linear"]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("curve", "options"),
    [("Gelu", {}), ("Gelu", {"approximate": "tanh"}), ("Relu", {}), ("Tanh", {})],
)
def test_a_bias_and_an_activation(tmp_path, curve, options, swapped):
    graph = Graph(x=(TensorProto.FLOAT, ["m", 64]))
    pair = [graph.nbits("x", 40, 64), graph.floats(40)]
    y = graph.node(curve, [graph.node("Add", pair[::-1] if swapped else pair)], **options)
    found = graph.check(tmp_path, [y], {"x": rows(3, 64)})
    assert found == ["Linear", *["Tanh"] * (curve == "Tanh")]


def test_what_is_no_bias_or_not_only_activated_stays(tmp_path):
    graph = Graph(x=(TensorProto.FLOAT, ["m", 64]))
    one = graph.node("Add", [graph.nbits("x", 40, 64), graph.floats(1)])
    product = graph.nbits("x", 40, 64)
    active = graph.node("Gelu", [product])
    found = graph.check(tmp_path, [one, product, active], {"x": rows(3, 64)})
    assert sorted(found) == ["Add", "Gelu", "Linear", "Linear"]


def test_a_norm_that_others_read_stays(tmp_path):
    graph = Graph(x=(TensorProto.FLOAT, ["m", 64]))
    y, total = norm(graph, graph.nbits("x", 64, 64), "x", 64)
    found = graph.check(tmp_path, [y, graph.nbits(y, 64, 64), total], {"x": rows(3, 64)})
    assert found == ["Linear", "SimplifiedLayerNormalization", "Linear"]


def test_a_product_that_others_read_takes_no_residual(tmp_path):
    graph = Graph(x=(TensorProto.FLOAT, ["m", 64]))
    product = graph.nbits("x", 64, 64)
    y, total = norm(graph, product, "x", 64)
    found = graph.check(tmp_path, [product, graph.nbits(y, 64, 64)], {"x": rows(3, 64)})
    assert found == ["Linear", "Add", "Linear"]


def test_an_addition_that_may_broadcast_stays(tmp_path):
    graph = Graph(x=(TensorProto.FLOAT, ["m", 64]), r=(TensorProto.FLOAT, [1, 64]))
    z = graph.node("Add", [graph.nbits("x", 64, 64), "r"])
    feeds = {"x": rows(3, 64), "r": rows(1, 64)}
    assert graph.check(tmp_path, [z], feeds) == ["Linear", "Add"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("mlp", [32, 48, 40])
@pytest.mark.parametrize("curve", ["silu", "tanh", "none"])
def test_gate_and_up(tmp_path, bias, swapped, mlp, curve):
    graph = Graph(x=(TensorProto.FLOAT, ["m", 64]))
    both = graph.nbits("x", 2 * mlp, 64, bias=bias)
    gate, up = graph.node("Split", [both], 2, axis=-1, num_outputs=2)
    if curve == "silu":
        gate = graph.node("QuickGelu", [gate], domain="com.microsoft", alpha=1.0)
    else:
        gate = graph.node("Gelu", [gate], approximate=curve)
    y = graph.node("Mul", [up, gate] if swapped else [gate, up])
    found = graph.check(tmp_path, [y], {"x": rows(3, 64)})
    fits = not bias and mlp % 16 == 0 and curve != "none"
    name = "QuickGelu" if curve == "silu" else "Gelu"
    assert found == (["Linear"] if fits else ["Linear", "Split", name, "Mul"])


def attention(heads=4, kv_heads=2, width=32, capacity=48, **attributes):
    caches = (TensorProto.FLOAT, [1, kv_heads, capacity, width])
    graph = Graph(
        x=(TensorProto.FLOAT, [1, "new", 64]), key=caches, value=caches,
        lengths=(TensorProto.INT32, [1]), total=(TensorProto.INT32, []),
    )  # fmt: skip
    qkv = graph.nbits("x", (heads + 2 * kv_heads) * width, 64)
    angles = np.outer(np.arange(capacity), 100 ** -np.linspace(0, 1, width // 2))
    tables = [graph.constant(f(angles).astype(np.float32)) for f in (np.cos, np.sin)]
    inputs = [qkv, "", "", "key", "value", "lengths", "total", *tables]
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": 1} | attributes
    y, *_ = graph.node("GroupQueryAttention", inputs, 3, domain="com.microsoft", **attributes)
    outputs = graph.nodes[-1].output
    graph.outputs, graph.caches = [y], list(outputs[1:])
    return graph


def prompt(new=40, width=32, kv_heads=2, capacity=48):
    empty = np.zeros((1, kv_heads, capacity, width), np.float32)
    return {
        "x": rows(1, new, 64), "key": empty, "value": empty,
        "lengths": np.array([new - 1], np.int32), "total": np.array(new, np.int32),
    }  # fmt: skip


@pytest.mark.parametrize("window", [None, 1, 7, 16, 100])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention(tmp_path, window, scale):
    given = {"local_window_size": window, "scale": scale}
    graph = attention(**{name: value for name, value in given.items() if value is not None})
    found = graph.check(tmp_path, graph.outputs, prompt())
    assert found == ["Linear", "Attention"]


def test_attention_without_rotations(tmp_path):
    graph = attention(do_rotary=0)
    del graph.nodes[-1].input[7:]
    assert graph.check(tmp_path, graph.outputs, prompt()) == ["Linear", "Attention"]


def normed_attention(graph, how, heads=4, kv_heads=2, width=32):
    """Let a graph's attention take queries and keys apart and normed: by head, all, or one only."""
    last = len(graph.nodes) - 1
    gqa = graph.nodes[last]
    sizes = [heads * width, kv_heads * width, kv_heads * width]
    flat = graph.node("Reshape", [gqa.input[0], graph.constant([-1, sum(sizes)])])
    parts = graph.node("Split", [flat, graph.constant(sizes)], 3, axis=-1)
    batched = graph.constant([1, 40, -1])
    for i, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        if i < 2 and not (how == "one" and i):
            gain = width if how == "heads" else size
            if how == "heads":
                part = graph.node("Reshape", [part, graph.constant([-1, width])])
            part = graph.node(
                "SimplifiedLayerNormalization", [part, graph.floats(gain)], axis=-1, epsilon=1e-3
            )
        gqa.input[i] = graph.node("Reshape", [part, batched])
    graph.nodes.append(graph.nodes.pop(last))


@pytest.mark.parametrize("how", ["heads", "all", "one"])
def test_attention_of_normed_queries_and_keys(tmp_path, how):
    graph = attention()
    normed_attention(graph, how)
    found = graph.check(tmp_path, graph.outputs, prompt())
    assert found.count("GroupQueryAttention") == (how == "one")
    assert found.count("SimplifiedLayerNormalization") == (how == "one")


@pytest.mark.parametrize("other", [{"softcap": 5.0}, {"rotary_interleaved": 1}])
def test_other_attention_stays(tmp_path, other):
    graph = attention(**other)
    found = graph.check(tmp_path, graph.outputs, prompt())
    assert found == ["Linear", "GroupQueryAttention"]


def test_rules_are_modules_with_one_function():
    from importlib import import_module

    for module in RULES.values():
        assert callable(import_module(module).rewrite)
