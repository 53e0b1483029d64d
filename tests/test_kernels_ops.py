"""The operators as ONNX Runtime runs them, with no leangen in sight."""

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
from leangen_kernels import layout, reference
from leangen_kernels.selftest import weights as packed
from onnx import TensorProto, helper

pytestmark = pytest.mark.skipif(
    leangen_kernels.library() is None, reason="no kernels: " + leangen_kernels.status()[1]
)


def model(
    form, n, k, weights, *, gain=None, bias=None, shift=None, residual=False, x_shape=None,
    **attributes,
):  # fmt: skip
    """One `Linear`; optional inputs are constants, but the residual."""
    given = {"weights": weights, "gain": gain, "bias": bias, "shift": shift}
    names = ["x", *(name if given[name] is not None else "" for name in given)]
    names.insert(4, "residual" if residual else "")
    node = helper.make_node(
        "Linear",
        names,
        ["y"],
        domain="leangen",
        form=form.name if isinstance(form, layout.Form) else form,
        n=n,
        k=k,
        **attributes,
    )
    info = helper.make_tensor_value_info
    inputs = [info("x", TensorProto.FLOAT, ["batch", "new", None] if x_shape is None else x_shape)]
    if residual:
        inputs.append(info("residual", TensorProto.FLOAT, None))
    constants = [
        onnx.numpy_helper.from_array(value, name)
        for name, value in given.items()
        if value is not None
    ]
    graph = helper.make_graph(
        [node], "one", inputs, [info("y", TensorProto.FLOAT, None)], constants
    )
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("leangen", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()


def session(proto, threads=2):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.register_custom_ops_library(str(leangen_kernels.library()))
    return ort.InferenceSession(proto, options)


@pytest.fixture
def rng():
    return draws.rng()


def close(y, expected, places=1e-5):
    return np.abs(y - expected).max() <= places * np.abs(expected).max()


KINDS = [
    (form, kind)
    for form in layout.FORMS.values()
    for kind in ("int8", "fp32")
    if kind == "fp32" or not form.table
]


@pytest.mark.parametrize(("form", "kind"), KINDS, ids=lambda value: getattr(value, "name", value))
def test_linear_and_what_is_fused_around_it(form, kind, rng):
    for (batch, new), n, k in (((1, 1), 64, 96), ((2, 3), 40, 100), ((1, 70), 96, 576)):
        x = rng.standard_normal((batch, new, k)).astype(np.float32)
        weights = packed(rng, form, n, k)
        gain, bias = rng.random(k).astype(np.float32), rng.random(n).astype(np.float32)
        residual = rng.standard_normal((batch, new, n)).astype(np.float32)
        rows = x.reshape(-1, k)

        y = session(model(form, n, k, weights, activations=kind)).run(None, {"x": x})[0]
        assert y.shape == (batch, new, n)
        expected = reference.linear(form, weights, n, rows, activations=kind)
        assert close(y.reshape(-1, n), expected)

        proto = model(form, n, k, weights, bias=bias, residual=True, activations=kind)
        y = session(proto).run(None, {"x": x, "residual": residual})[0]
        assert close(y.reshape(-1, n), expected + bias + residual.reshape(-1, n))

        proto = model(form, n, k, weights, gain=gain, epsilon=1e-4, activations=kind)
        y = session(proto).run(None, {"x": x})[0].reshape(-1, n)
        more = {"gain": gain, "epsilon": 1e-4, "activations": kind}
        # A normed value that differs in its last bit may round to another int8 code.
        places = 1e-5 if kind == "fp32" else 2e-2
        assert close(y, reference.linear(form, weights, n, rows, **more), places)

        shift = rng.standard_normal(k).astype(np.float32)
        proto = model(
            form, n, k, weights, gain=gain, shift=shift, norm="layer", bias=bias,
            activation="gelu", activations=kind,
        )  # fmt: skip
        y = session(proto).run(None, {"x": x})[0].reshape(-1, n)
        more = {"gain": gain, "shift": shift, "bias": bias, "activation": "gelu"}
        expected = reference.linear(form, weights, n, rows, activations=kind, **more)
        assert close(y, expected, 1e-5 if kind == "fp32" else 2e-2)

        for activation in ("none", "gelu_tanh") if n % 32 == 0 else ():
            options = {"activations": kind, "activation": activation}
            y = session(model(form, n, k, weights, gated=1, **options)).run(None, {"x": x})[0]
            assert y.shape == (batch, new, n // 2)
            expected = reference.linear(form, weights, n, rows, gated=True, **options)
            assert close(y.reshape(-1, n // 2), expected)


@pytest.mark.parametrize("name", ["nf4_wide", "fp4_wide"])
def test_four_bit_tables_agree_with_onnxruntime(name, rng):
    """MatMulBnb4 keeps the first of two weights in the high nibble, and one scale for 64."""
    form, n, k = layout.FORMS[name], 48, 192
    codes = rng.integers(0, 16, (n, k), dtype=np.uint8)
    scales = rng.random((n, k // 64)).astype(np.float32)
    x = rng.standard_normal((1, 3, k)).astype(np.float32)
    ours = session(model(form, n, k, layout.pack(form, codes, scales), activations="fp32"))
    flat = codes.reshape(-1)
    constants = {"b": flat[0::2] << 4 | flat[1::2], "absmax": scales.reshape(-1)}
    node = helper.make_node(
        "MatMulBnb4", ["x", *constants], ["y"], domain="com.microsoft",
        N=n, K=k, block_size=64, quant_type=int(name == "nf4_wide"),
    )  # fmt: skip
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "one", [info("x", TensorProto.FLOAT, [1, 3, k])],
        [info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()
    assert close(ours.run(None, {"x": x})[0], session(proto).run(None, {"x": x})[0])


def argmax_model(form, n, k, weights, **given):
    """One `ArgmaxLinear` from the model of a `Linear`."""
    proto = onnx.load_from_string(model(form, n, k, weights, **given))
    node = proto.graph.node[0]
    node.op_type = "ArgmaxLinear"
    del node.input[4]
    node.output[:] = ["index", "most"]
    del proto.graph.output[:]
    info = helper.make_tensor_value_info
    proto.graph.output.append(info("index", TensorProto.INT64, None))
    proto.graph.output.append(info("most", TensorProto.FLOAT, None))
    return proto.SerializeToString()


@pytest.mark.parametrize("kind", ["int8", "fp32"])
def test_argmax_is_that_of_the_products(kind, rng):
    for name, m, n, k in (("q8", 1, 5000, 64), ("q4", 3, 33, 100), ("q8", 20, 1000, 32)):
        form = layout.FORMS[name]
        weights, gain = packed(rng, form, n, k), rng.random(k).astype(np.float32)
        bias = rng.standard_normal(n).astype(np.float32)
        x = rng.standard_normal((m, 1, k)).astype(np.float32)
        given = {"gain": gain, "bias": bias, "activations": kind}
        y = session(model(form, n, k, weights, **given)).run(None, {"x": x})[0]
        for threads in (1, 2, 4):
            run = session(argmax_model(form, n, k, weights, **given), threads).run
            index, most = run(None, {"x": x})
            assert index.shape == most.shape == (m, 1)
            assert np.array_equal(index, y.argmax(-1))
            assert np.array_equal(most, y.max(-1))


def test_argmax_takes_the_lowest_of_several_and_shows_not_a_number(rng):
    form, n, k = layout.FORMS["q8"], 3000, 32
    codes, scales = np.full((n, k), 129, np.uint8), np.ones((n, 1), np.float32)
    run = session(argmax_model(form, n, k, layout.pack(form, codes, scales))).run
    x = np.ones((1, 1, k), np.float32)
    assert run(None, {"x": x})[0] == 0
    bias = np.zeros(n, np.float32)
    bias[[700, 2999]] = 5
    weights = layout.pack(form, codes, scales)
    assert session(argmax_model(form, n, k, weights, bias=bias)).run(None, {"x": x})[0] == 700
    bias[[1500, 2000]] = np.nan
    index, most = session(argmax_model(form, n, k, weights, bias=bias)).run(None, {"x": x})
    assert index == 1500
    assert np.isnan(most)


def test_no_rows_give_no_rows(rng):
    form = layout.FORMS["q4"]
    y = session(model(form, 32, 64, packed(rng, form, 32, 64)))
    assert y.run(None, {"x": np.zeros((1, 0, 64), np.float32)})[0].shape == (1, 0, 32)


def test_shapes_are_inferred(rng):
    form = layout.FORMS["q4"]
    proto = model(form, 64, 96, packed(rng, form, 64, 96), gated=1)
    assert session(proto).get_outputs()[0].shape == ["batch", "new", 32]


@pytest.mark.parametrize("name", ["q4_min", "q5", "q6_g16"])
def test_any_number_of_threads_gives_the_same_bits(name, rng):
    form = layout.FORMS[name]
    n, k = 3072, 576
    gain = rng.random(k).astype(np.float32)
    proto = model(form, n, k, packed(rng, form, n, k), gain=gain, gated=1)
    for m in (1, 3, 8, 100):
        x = rng.standard_normal((1, m, k)).astype(np.float32)
        results = [session(proto, threads).run(None, {"x": x})[0] for threads in (1, 2, 4)]
        assert np.array_equal(results[0], results[1])
        assert np.array_equal(results[0], results[2])


def test_python_threads_share_sessions(rng):
    form = layout.FORMS["q4_min"]
    n, k = 576, 1536
    sessions = [session(model(form, n, k, packed(rng, form, n, k))) for _ in range(2)]
    inputs = [rng.standard_normal((1, m, k)).astype(np.float32) for m in (1, 2, 9, 33)]
    expected = [[s.run(None, {"x": x})[0] for s in sessions] for x in inputs]
    wrong = []

    def work(i):
        for turn in range(20):
            y = sessions[turn % 2].run(None, {"x": inputs[i]})[0]
            if not np.array_equal(y, expected[i][turn % 2]):
                wrong.append((i, turn))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"form": "q3"}, "form 'q3' is unknown"),
        ({"activations": "int4"}, "activations 'int4', expected one of int8, fp32"),
        ({"n": 0}, "n 0, k 64, expected 1 to"),
        ({"n": 48, "gated": 1}, "gated with n 48, expected a multiple of 32"),
        (
            {"gated": 1, "activation": "relu"},
            "'relu', expected none .SiLU. or gelu_tanh",
        ),
        ({"norm": "batch"}, "norm 'batch', expected one of rms, layer"),
        ({"activation": "elu"}, "activation 'elu', expected one of none, gelu_tanh"),
        ({"form": "nf4_wide"}, "form 'nf4_wide' with int8 activations, expected fp32"),
    ],
)
def test_a_bad_attribute_is_an_error_when_the_model_loads(changes, message, rng):
    form = layout.FORMS["q4"]
    given = {"form": form, "n": 32, "k": 64, "weights": packed(rng, form, 32, 64), **changes}
    with pytest.raises(Exception, match=message):
        session(model(**given))


@pytest.mark.parametrize(
    ("x_shape", "changes", "message"),
    [
        ((1, 1, 63), {}, "last dimension of x is 63, expected k = 64"),
        ((), {}, "last dimension of x is 0, expected k = 64"),
        ((1, 1, 64), {"n": 48}, "weights hold 1152 bytes, expected 1728 for n = 48, k = 64"),
        ((1, 1, 64), {"gain": np.ones(63, np.float32)}, "gain has 63 elements"),
        (
            (1, 1, 64),
            {"gain": np.ones(64, np.float32), "norm": "layer"},
            "shift has 0 elements, expected k = 64 with norm layer",
        ),
        ((1, 1, 64), {"bias": np.ones(33, np.float32)}, "bias has 33 elements, expected 32"),
        ((1, 1, 64), {"residual": True}, "residual has 31 elements, expected 32"),
    ],
)
def test_a_bad_shape_is_an_error_when_the_model_runs(x_shape, changes, message, rng):
    form = layout.FORMS["q4"]
    given = {"form": form, "n": 32, "k": 64, "weights": packed(rng, form, 32, 64), **changes}
    feeds = {"x": np.zeros(x_shape, np.float32)}
    if "residual" in changes:
        feeds["residual"] = np.zeros(31, np.float32)
    with pytest.raises(Exception, match=message):
        session(model(**given, x_shape=[None] * len(x_shape))).run(None, feeds)


ALONE = """
import sys, numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 2
options.register_custom_ops_library(sys.argv[1])
for turn in range(2):
    run = onnxruntime.InferenceSession(sys.argv[2], options).run
    for rows in (1, 2, 40):
        run(None, {"x": numpy.ones((1, rows, 576), "f4")})
assert not any(name.startswith(("leangen", "numba")) for name in sys.modules)
print("ran")
"""


def alone(tmp_path, rng, *command, **environment):
    """Run a model in a fresh process, by onnxruntime alone."""
    form = layout.FORMS["q4_min"]
    gain = np.ones(576, np.float32)
    path = tmp_path / "model.onnx"
    path.write_bytes(model(form, 1536, 576, packed(rng, form, 1536, 576), gain=gain, gated=1))
    library = str(leangen_kernels._LIBRARY)
    return subprocess.run(
        [*command, sys.executable, "-c", ALONE, library, str(path)],
        env={**os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip


def test_plain_onnxruntime_loads_the_library(tmp_path, rng):
    done = alone(tmp_path, rng)
    assert done.stdout == "ran\n", done.stderr


def test_a_variant_can_be_forced_and_switched_off(tmp_path, rng):
    assert alone(tmp_path, rng, LEANGEN_KERNELS="portable").stdout == "ran\n"
    for value, reason in (
        ("off", "switched off by LEANGEN_KERNELS=off"),
        ("mmx", "LEANGEN_KERNELS=mmx is none of "),
    ):
        done = alone(tmp_path, rng, LEANGEN_KERNELS=value)
        assert done.returncode != 0
        assert reason in done.stderr
        code = "import leangen_kernels; print(*leangen_kernels.status())"
        environment = {**os.environ, "LEANGEN_KERNELS": value}
        said = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert said.stdout.startswith("None " + reason)


@pytest.mark.slow
def test_memory_is_used_as_it_may_be(tmp_path, rng):
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")
    # valgrind knows no AVX-512. ORT's own start is not clean, so look for our frames alone.
    tool = ["valgrind", "--leak-check=no", "--undef-value-errors=no", "--num-callers=30"]
    done = alone(tmp_path, rng, *tool, PYTHONMALLOC="malloc", LEANGEN_KERNELS="avx2")
    assert done.stdout == "ran\n", done.stderr[-3000:]
    assert f"(in {leangen_kernels._LIBRARY})" not in done.stderr
