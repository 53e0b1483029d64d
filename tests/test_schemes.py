"""Laws that every scheme obeys, and ONNX Runtime as the independent reader of packed weights."""

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx import TensorProto, helper, numpy_helper

from leangen import schemes
from leangen.errors import BundleError, UnknownSchemeError
from leangen.schemes import SCHEMES
from leangen.treatments import _nbits_layout

shapes = st.tuples(st.integers(1, 9), st.integers(1, 100))
weights = shapes.flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.floats(-100, 100, width=32))
)
blocks = st.sampled_from([None, 16, 32])


def spread(packed):
    """Each weight's scale, [n, k]."""
    wide = np.repeat(np.abs(packed.scales.astype(np.float32)), packed.block_size, axis=1)
    return wide[:, : packed.shape[1]]


def absmax_error(w, packed):
    """Squared error bound per block of plain rounding at the full span, n times its worst case."""
    n, k = w.shape
    width = packed.scales.shape[1] * packed.block_size
    padded = np.zeros((n, width), np.float64)
    padded[:, :k] = w
    span = np.abs(padded.reshape(n, -1, packed.block_size)).max(axis=2)
    q_max = (1 << (packed.bits - 1)) - 1
    return packed.block_size * (span / q_max / 2) ** 2


@pytest.mark.parametrize("name", SCHEMES)
@settings(deadline=None, max_examples=60)
@given(w=weights, block_size=blocks)
def test_round_trip_is_no_worse_than_rounding_at_full_span(name, w, block_size):
    packed = schemes.get(name).quantize(w, block_size=block_size)
    back = schemes.get(name).dequantize(packed)
    assert back.shape == w.shape and back.dtype == np.float32
    width = packed.scales.shape[1] * packed.block_size
    rest = np.zeros((len(w), width), np.float64)
    rest[:, : w.shape[1]] = back.astype(np.float64) - w
    error = (rest.reshape(len(w), -1, packed.block_size) ** 2).sum(axis=2)
    assert np.all(error <= absmax_error(w, packed) * (1 + 1e-3) + 1e-30)


@pytest.mark.parametrize("name", SCHEMES)
@settings(deadline=None, max_examples=40)
@given(w=weights, block_size=blocks)
def test_quantizing_again_changes_nothing(name, w, block_size):
    scheme = schemes.get(name)
    once = scheme.dequantize(scheme.quantize(w, block_size=block_size))
    packed = scheme.quantize(once, block_size=block_size)
    assert np.all(np.abs(scheme.dequantize(packed) - once) <= 1e-4 * spread(packed))


@pytest.mark.parametrize("name", SCHEMES)
def test_same_input_same_bytes_whatever_the_threads(name):
    w = np.random.default_rng(0).standard_normal((300, 700), np.float32)
    one, two = (schemes.get(name).quantize(w, threads=threads) for threads in (1, 2))
    assert np.array_equal(one.q, two.q) and np.array_equal(one.scales, two.scales)


@pytest.mark.parametrize("name", SCHEMES)
def test_zero_rows_stay_zero_and_constant_rows_exact(name):
    w = np.zeros((4, 64), np.float32)
    w[1], w[2] = 0.37, -5.0
    scheme = schemes.get(name)
    assert np.allclose(scheme.dequantize(scheme.quantize(w)), w, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-20, 1e20, 3e38])
def test_extreme_rows_stay_finite_and_in_scale(name, size):
    w = np.random.default_rng(1).uniform(-1, 1, (3, 64)).astype(np.float32)
    w[1] *= np.float32(size)
    scheme = schemes.get(name)
    back = scheme.dequantize(scheme.quantize(w))
    assert np.isfinite(back).all()
    largest = np.abs(w).max(axis=1)
    bound = np.maximum(largest / 10, np.finfo(np.float32).smallest_subnormal)
    assert np.all(np.abs(back - w).max(axis=1) <= bound)


@pytest.mark.parametrize("name", SCHEMES)
def test_half_precision_input_is_its_float32_value(name):
    w = np.random.default_rng(2).standard_normal((5, 48)).astype(np.float16)
    scheme = schemes.get(name)
    assert np.array_equal(scheme.quantize(w).q, scheme.quantize(w.astype(np.float32)).q)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("w", [np.zeros((0, 4)), np.zeros((4, 0)), np.zeros(4)])
def test_empty_or_flat_weights_are_refused(name, w):
    with pytest.raises(BundleError, match="non-empty matrix"):
        schemes.get(name).quantize(w.astype(np.float32))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(name, bad):
    w = np.ones((3, 40), np.float32)
    w[2, 39] = bad
    with pytest.raises(BundleError, match="NaN or infinity"):
        schemes.get(name).quantize(w)


def test_seven_bit_codes_leave_the_top_bit_free():
    w = np.random.default_rng(3).standard_normal((8, 90), np.float32)
    codes = schemes.get("int8").quantize(w, q_max=63).q.astype(int) - 128
    assert np.abs(codes).max() == 63


def test_bits_per_weight_counts_scales():
    w = np.ones((4, 64), np.float32)
    int4, int8 = schemes.get("int4"), schemes.get("int8")
    assert int4.quantize(w).bits_per_weight == 5.0
    assert int4.quantize(w, scale_dtype=np.float16).bits_per_weight == 4.5
    assert int8.quantize(w).bits_per_weight == 8.5
    assert int8.quantize(w, block_size=32).bits_per_weight == 9.0


def test_unknown_scheme_names_the_known_ones():
    with pytest.raises(UnknownSchemeError, match="int3.*fp32, int8, int4"):
        schemes.get("int3")


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("k", [16, 32, 96, 100])
def test_ort_computes_with_the_weights_that_dequantize_gives(name, k):
    rng = np.random.default_rng(k)
    w, x = rng.standard_normal((24, k), np.float32), rng.standard_normal((5, k), np.float32)
    scheme = schemes.get(name)
    packed = scheme.quantize(w, block_size=16)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "q", "s"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=24,
        bits=scheme.BITS,
        block_size=16,
        accuracy_level=1,  # fp32 activations: only the weights are in question
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 24])],
        [
            numpy_helper.from_array(_nbits_layout(packed), "q"),
            numpy_helper.from_array(packed.scales, "s"),
        ],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
        ir_version=8,
    )
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y = session.run(None, {"x": x})[0]
    exact = x.astype(np.float64) @ scheme.dequantize(packed).astype(np.float64).T
    assert np.allclose(y, exact, rtol=1e-4, atol=1e-3)
