"""`Chain` gives what its steps give one by one, to the bit, on any number of threads."""

import os
import shutil
import subprocess
import sys
import threading

import draws
import leangen_kernels
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from leangen_kernels import cache_layout, layout
from onnx import TensorProto, helper, numpy_helper

from leangen.lowering import chain

pytestmark = pytest.mark.skipif(
    leangen_kernels.library() is None, reason="no kernels: " + leangen_kernels.status()[1]
)
HEADS, KV_HEADS, HEAD, WIDTH, MLP, CAPACITY, LAYERS = 6, 2, 32, 192, 320, 144, 2
QKV = (HEADS + 2 * KV_HEADS) * HEAD
TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "int8": TensorProto.INT8}


class Layers:
    """Decoder layers; `linear` and `attention` nodes alone."""

    def __init__(self, rng, cache="fp16", activations="int8"):
        self.rng, self.activations = rng, activations
        self.nodes, self.constants = [], []
        held, info = cache_layout.CACHES[cache], helper.make_tensor_value_info
        shape = ["batch", KV_HEADS, CAPACITY, held.columns(HEAD)]
        self.inputs = [
            info("x", TensorProto.FLOAT, ["batch", "new", "width"]),
            info("last", TensorProto.INT32, ["batch"]),
        ]
        self.outputs = []
        angles = np.outer(np.arange(CAPACITY), 1e4 ** (-np.arange(HEAD // 2) / (HEAD // 2)))
        rotation = [self.constant("cos", np.cos(angles)), self.constant("sin", np.sin(angles))]
        h = "x"
        for i in range(LAYERS):
            x = self.linear(f"qkv{i}", h, QKV, WIDTH, norm=True, bias=True)
            pair = [f"key{i}", f"value{i}"]
            self.inputs += [info(name, TYPES[cache], shape) for name in pair]
            self.outputs += [info(f"new_{name}", TYPES[cache], shape) for name in pair]
            self.nodes.append(
                helper.make_node(
                    "Attention", [x, *pair, "last", *rotation],
                    [f"y{i}", *(f"new_{name}" for name in pair)], domain="leangen",
                    heads=HEADS, kv_heads=KV_HEADS, cache=cache,
                )
            )  # fmt: skip
            h = self.linear(f"o{i}", f"y{i}", WIDTH, WIDTH, residual=h)
            x = self.linear(f"gate_up{i}", h, 2 * MLP, WIDTH, norm=True, gated=1)
            h = self.linear(f"down{i}", x, WIDTH, MLP, residual=h)
        for name in (h, "y0"):  # one in the middle that others read too
            self.outputs.append(info(name, TensorProto.FLOAT, None))

    def constant(self, name, value):
        value = np.asarray(value, None if value.dtype == np.uint8 else np.float32)
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def linear(self, name, x, n, k, *, norm=False, bias=False, residual="", **attributes):
        form, blocks = layout.FORMS["q4_min"], k // 32
        codes = self.rng.integers(0, 16, (n, k), dtype=np.uint8)
        scales = (self.rng.random((n, blocks)) / 128).astype(np.float16).astype(np.float32)
        inputs = [x, self.constant(f"{name}.w", layout.pack(form, codes, scales, -8 * scales))]
        inputs.append(self.constant(f"{name}.g", self.rng.random(k)) if norm else "")
        inputs.append(self.constant(f"{name}.b", self.rng.random(n)) if bias else "")
        self.nodes.append(
            helper.make_node(
                "Linear", [*inputs, residual], [name], domain="leangen", form=form.name, n=n, k=k,
                activations=self.activations, **attributes,
            )
        )  # fmt: skip
        return name

    def model(self):
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.constants)
        domains = [helper.make_opsetid("", 21), helper.make_opsetid("leangen", 1)]
        return helper.make_model(graph, opset_imports=domains, ir_version=10)


def fused(model):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    chain.fuse(copy)
    assert [node.op_type for node in copy.graph.node] == ["Chain"]
    return copy


def session(model, threads=2):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(leangen_kernels.library()))
    return ort.InferenceSession(model.SerializeToString(), options)


def feeds(rng, cache, batch, new, past):
    held = cache_layout.CACHES[cache]
    shape = (batch, KV_HEADS, CAPACITY, held.columns(HEAD))
    given = {
        "x": rng.standard_normal((batch, new, WIDTH)).astype(np.float32),
        "last": np.full(batch, past + new - 1, np.int32),
    }
    for i in range(LAYERS):
        for kind in ("key", "value"):
            held_before = rng.random(shape) if cache != "int8" else np.zeros(shape)
            given[f"{kind}{i}"] = held_before.astype(held.dtype)
    return given


@pytest.fixture
def rng():
    return draws.rng()


@pytest.mark.parametrize("activations", ["int8", "fp32"])
@pytest.mark.parametrize("cache", cache_layout.CACHES)
def test_the_same_bits_as_one_by_one_on_any_number_of_threads(cache, activations, rng):
    model = Layers(rng, cache, activations).model()
    alone, together = session(model), [session(fused(model), n) for n in (1, 2, 4)]
    for batch, new, past in ((1, 1, 100), (1, 90, 0), (3, 2, 17), (2, 1, 0)):
        given = feeds(rng, cache, batch, new, past)
        expected = alone.run(None, given)
        for run in together:
            for mine, theirs in zip(run.run(None, given), expected, strict=True):
                np.testing.assert_array_equal(mine, theirs)


def test_shapes_and_types_are_inferred(rng):
    outputs = session(fused(Layers(rng).model())).get_outputs()
    shapes = {output.name: output.shape for output in outputs}
    assert shapes["down1"] == ["batch", "new", WIDTH]
    assert shapes["y0"] == ["batch", "new", HEADS * HEAD]
    assert shapes["new_key0"] == ["batch", KV_HEADS, CAPACITY, HEAD]
    assert {o.name: o.type for o in outputs}["new_value1"] == "tensor(float16)"


def test_no_rows_give_no_rows(rng):
    run = session(fused(Layers(rng).model())).run
    given = feeds(rng, "fp16", 1, 1, 0) | {"x": np.zeros((1, 0, WIDTH), np.float32)}
    assert run(["down1"], given)[0].shape == (1, 0, WIDTH)


def test_other_nodes_part_chains(rng):
    layers = Layers(rng)
    at = next(i for i, node in enumerate(layers.nodes) if node.name == "" and "o0" in node.output)
    layers.nodes[at].output[0] = "o0.before"
    layers.nodes.insert(at + 1, helper.make_node("Neg", ["o0.before"], ["o0"]))
    model = layers.model()
    parted = onnx.ModelProto()
    parted.CopyFrom(model)
    chain.fuse(parted)
    assert [node.op_type for node in parted.graph.node] == ["Chain", "Neg", "Chain"]
    given = feeds(rng, "fp16", 1, 5, 40)
    for mine, theirs in zip(
        session(parted).run(None, given), session(model).run(None, given), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_python_threads_share_two_models(rng):
    runs = [session(fused(Layers(rng).model())).run for _ in range(2)]
    inputs = [feeds(rng, "fp16", 1, new, 30) for new in (1, 2, 9, 33)]
    expected = [[run(["down1"], given)[0] for run in runs] for given in inputs]
    wrong = []

    def work(i):
        for turn in range(40):
            (y,) = runs[turn % 2](["down1"], inputs[i])
            if not np.array_equal(y, expected[i][turn % 2]):
                wrong.append((i, turn))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def changed(model, **attributes):
    node = model.graph.node[0]
    kept = [attribute for attribute in node.attribute if attribute.name not in attributes]
    del node.attribute[:]
    made = [helper.make_attribute(*item) for item in attributes.items() if item[1] is not None]
    node.attribute.extend(kept + made)
    return model


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"kinds": [0] * 1025}, "inputs and 0 steps, expected 1 to"),
        ({"kinds": [0, 3]}, "a step of kind 3, expected 0 or 1"),
        ({"inputs_0": [0, 1]}, "step 0, expected 6 inputs"),
        (
            {"inputs_0": [0, 99, -1, -1, -1, -1]},
            "input 1 of step 0 is value 99, expected one below",
        ),
        ({"inputs_1": [-1] * 8}, "input 0 of step 1 is value -1"),
        ({"form_2": "q3"}, "form 'q3' is unknown"),
        ({"cache_1": "fp8"}, "cache 'fp8', expected one of fp32, fp16, int8"),
        ({"results": [77, 9]}, "a result of step 77, expected one of 10"),
    ],
)
def test_a_bad_attribute_is_an_error_when_the_model_loads(attributes, message, rng):
    with pytest.raises(Exception, match=message):
        session(changed(fused(Layers(rng).model()), **attributes))


def test_a_bad_input_is_an_error_when_the_model_runs(rng):
    run = session(fused(Layers(rng).model())).run
    given = feeds(rng, "fp16", 1, 4, 0)
    for name, value, message in (
        ("x", np.zeros((1, 4, WIDTH - 1), np.float32), "last dimension of x is 191"),
        ("last", np.array([CAPACITY], np.int32), "145 positions, expected at most 144"),
        ("value1", np.zeros((1, KV_HEADS, CAPACITY, HEAD), np.float32), "type"),
    ):
        with pytest.raises(Exception, match=message):
            run(None, given | {name: value})


ALONE = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 2
options.register_custom_ops_library(sys.argv[1])
run = onnxruntime.InferenceSession(sys.argv[2], options).run
for name in sys.argv[3:]:
    run(None, dict(numpy.load(name)))
print("ran")
"""


@pytest.mark.slow
def test_memory_is_used_as_it_may_be(tmp_path, rng):
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")
    path = tmp_path / "model.onnx"
    path.write_bytes(fused(Layers(rng).model()).SerializeToString())
    names = []
    for batch, new, past in ((1, 1, 100), (2, 40, 0), (1, 3, 17)):
        names.append(str(tmp_path / f"{new}.npz"))
        np.savez(names[-1], **feeds(rng, "fp16", batch, new, past))
    # valgrind knows no AVX-512. ORT's own start is not clean, so look for our frames alone.
    tool = ["valgrind", "--leak-check=no", "--undef-value-errors=no", "--num-callers=30"]
    done = subprocess.run(
        [*tool, sys.executable, "-c", ALONE, str(leangen_kernels._LIBRARY), str(path), *names],
        env={**os.environ, "PYTHONMALLOC": "malloc", "LEANGEN_KERNELS": "avx2"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "ran\n", done.stderr[-3000:]
    assert f"(in {leangen_kernels._LIBRARY})" not in done.stderr
