"""Each rule against ORT on graphs made for it: what fits is replaced, the rest is left alone."""

import leangen_kernels
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from leangen.lowering import FP32_MODEL, RULES, _lower

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
        self.rng = np.random.default_rng()

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
        lowered = folder / "l" / FP32_MODEL
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.register_custom_ops_library(str(leangen_kernels.library()))
        got, expected = (
            ort.InferenceSession(str(p), options).run(outputs, feeds) for p in (lowered, path)
        )
        for mine, theirs in zip(got, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=atol)
        return [node.op_type for node in onnx.load(lowered, load_external_data=False).graph.node]


def rows(*shape):
    return np.random.default_rng().standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block", [32, 64, 128, 256])
@pytest.mark.parametrize("k", [32, 100, 160, 320])
def test_group_sizes_and_odd_rows(tmp_path, bits, block, k):
    graph = Graph(x=(TensorProto.FLOAT, ["m", k]))
    y = graph.nbits("x", 21, k, bits=bits, block=block, bias=True)
    assert graph.check(tmp_path, [y], {"x": rows(3, k)}) == ["Linear"]


@pytest.mark.parametrize("zeros", ["packed", "float"])
@pytest.mark.parametrize("k", [32, 96, 100])
def test_zero_points(tmp_path, zeros, k):
    graph = Graph(x=(TensorProto.FLOAT, ["m", k]))
    y = graph.nbits("x", 20, k, zeros=zeros)
    assert graph.check(tmp_path, [y], {"x": rows(3, k)}) == ["Linear"]


def test_what_no_layout_holds_stays(tmp_path):
    graph = Graph(x=(TensorProto.FLOAT, ["m", 64]))
    y = graph.nbits("x", 32, 64, bits=8, zeros="packed")
    assert graph.check(tmp_path, [y], {"x": rows(3, 64)}) == ["MatMulNBits"]


def test_weights_that_are_computed_stay(tmp_path):
    graph = Graph(
        x=(TensorProto.FLOAT, ["m", 64]), scales=(TensorProto.FLOAT, [16, 2])
    )  # fmt: skip
    y = graph.nbits("x", 16, 64)
    graph.nodes[0].input[2] = "scales"
    feeds = {"x": rows(3, 64), "scales": rows(16, 2)}
    assert graph.check(tmp_path, [y], feeds) == ["MatMulNBits"]


def norm(graph, x, residual, width):
    y, _, _, total = graph.node(
        "SkipSimplifiedLayerNormalization", [x, residual, graph.floats(width)], 4,
        domain="com.microsoft", epsilon=1e-3,
    )  # fmt: skip
    graph.nodes[-1].output[1] = graph.nodes[-1].output[2] = ""
    return y, total


def test_a_norm_and_a_residual_are_drawn_in(tmp_path):
    graph = Graph(x=(TensorProto.FLOAT, ["m", 64]))
    y, total = norm(graph, graph.nbits("x", 64, 64), "x", 64)
    y, total = norm(graph, total, graph.nbits(y, 64, 64), 64)
    found = graph.check(tmp_path, [graph.nbits(y, 64, 64), total], {"x": rows(3, 64)})
    assert found == ["Linear"] * 3


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
def test_gate_and_up(tmp_path, bias, swapped, mlp):
    graph = Graph(x=(TensorProto.FLOAT, ["m", 64]))
    both = graph.nbits("x", 2 * mlp, 64, bias=bias)
    gate, up = graph.node("Split", [both], 2, axis=-1, num_outputs=2)
    silu = graph.node("QuickGelu", [gate], domain="com.microsoft", alpha=1.0)
    y = graph.node("Mul", [up, silu] if swapped else [silu, up])
    found = graph.check(tmp_path, [y], {"x": rows(3, 64)})
    fits = not bias and mlp % 16 == 0
    assert found == (["Linear"] if fits else ["Linear", "Split", "QuickGelu", "Mul"])


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


@pytest.mark.parametrize("other", [{"softcap": 5.0}, {"rotary_interleaved": 1}, {"do_rotary": 0}])
def test_other_attention_stays(tmp_path, other):
    graph = attention(**other)
    found = graph.check(tmp_path, graph.outputs, prompt())
    assert found == ["Linear", "GroupQueryAttention"]


def test_rules_are_modules_with_one_function():
    from importlib import import_module

    for module in RULES.values():
        assert callable(import_module(module).rewrite)
