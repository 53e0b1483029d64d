"""What holds of every scheme: close, exact on its own output, and the same in ONNX Runtime."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from leangen import schemes
from leangen.errors import BundleError, UnknownSchemeError
from leangen.graph_edit import Graph
from leangen.treatments import Treatments, find_sites

TINY = float(np.finfo(np.float32).smallest_subnormal)

every_scheme = pytest.mark.parametrize("name", schemes.SCHEMES)


def q_max(scheme):
    """The largest code of a symmetric scheme."""
    return 2 ** (scheme.BITS - 1) - 1


@st.composite
def matrices(draw):
    """[n, k] with tails along both axes and rows of every odd kind."""
    n, k = draw(st.integers(1, 9)), draw(st.integers(1, 100))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    w = rng.standard_normal((n, k)).astype(np.float32)
    w *= np.float32(10.0) ** rng.integers(-4, 4, (n, 1)).astype(np.float32)
    kinds = {
        "zero": lambda: np.zeros(k),
        "constant": lambda: np.full(k, rng.normal()),
        "one spike": lambda: np.where(np.arange(k) == k // 2, -30.0, 1e-3),
        "huge": lambda: rng.uniform(-1e38, 1e38, k),
        "denormal": lambda: rng.integers(-300, 300, k) * TINY,
    }
    for row in range(n):
        kind = draw(st.sampled_from(["plain", *kinds]))
        if kind in kinds:
            w[row] = kinds[kind]()
    return w


def by_block(w, size):
    """The blocks [n, blocks, size] of a matrix as float64, tails filled with zeros."""
    n, k = w.shape
    blocks = -(-k // size)
    padded = np.zeros((n, blocks * size))
    padded[:, :k] = w
    return padded.reshape(n, blocks, size)


@every_scheme
@settings(max_examples=60, deadline=None)
@given(w=matrices())
def test_a_block_is_off_by_half_a_step_at_most(name, w):
    """RMS error per block <= half the step that spans its largest weight."""
    scheme = schemes.get(name)
    packed = scheme.quantize(w, threads=1)
    size = packed.block_size
    exact, ours = by_block(w, size), by_block(scheme.dequantize(packed), size)
    filled = by_block(np.ones_like(w), size).sum(axis=2)
    rms = np.linalg.norm(ours - exact, axis=2) / np.sqrt(filled)
    half_step = np.abs(exact).max(axis=2) / q_max(scheme) / 2
    # A scale is a float32: of denormal weights it may be off by half the smallest number.
    assert (rms <= half_step * (1 + 1e-4) + q_max(scheme) * TINY).all()


@every_scheme
@settings(max_examples=60, deadline=None)
@given(w=matrices())
def test_what_dequantize_returns_is_q_minus_zero_times_scale(name, w):
    scheme = schemes.get(name)
    packed = scheme.quantize(w, threads=1)
    n, k = w.shape
    assert packed.scheme == name
    assert packed.shape == packed.q.shape == (n, k)
    assert packed.scales.shape == (n, -(-k // packed.block_size))
    assert packed.q.max() < 2**scheme.BITS
    zero = packed.zero_points
    expected = np.empty((n, k))
    for row in range(n):
        for column in range(k):
            block = column // packed.block_size
            middle = 2 ** (packed.bits - 1) if zero is None else int(zero[row, block])
            code = int(packed.q[row, column]) - middle
            expected[row, column] = code * float(packed.scales[row, block])
    ours = scheme.dequantize(packed)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=TINY)


@every_scheme
@settings(max_examples=60, deadline=None)
@given(w=matrices())
def test_quantizing_again_changes_nothing(name, w):
    scheme = schemes.get(name)
    once = scheme.dequantize(scheme.quantize(w, threads=1))
    twice = scheme.dequantize(scheme.quantize(once, threads=1))
    np.testing.assert_allclose(twice, once, rtol=2e-6, atol=TINY)


@every_scheme
def test_threads_do_not_change_the_result(name):
    w = np.random.default_rng(0).standard_normal((700, 300)).astype(np.float32)
    one, four = (schemes.get(name).quantize(w, threads=count) for count in (1, 4))
    np.testing.assert_array_equal(one.q, four.q)
    np.testing.assert_array_equal(one.scales, four.scales)


@every_scheme
def test_float16_weights_are_taken_as_the_numbers_they_are(name):
    scheme = schemes.get(name)
    w = np.random.default_rng(0).standard_normal((5, 70)).astype(np.float16)
    half, single = (scheme.quantize(form) for form in (w, w.astype(np.float32)))
    np.testing.assert_array_equal(half.q, single.q)
    np.testing.assert_array_equal(half.scales, single.scales)


@every_scheme
def test_bits_per_weight_count_codes_and_scales(name):
    scheme = schemes.get(name)
    packed = scheme.quantize(np.ones((8, 128), np.float32), block_size=32)
    assert packed.bits_per_weight == scheme.BITS + 32 / 32


@every_scheme
@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0), (4,), (2, 2, 2)])
def test_what_is_not_a_matrix_is_refused(name, shape):
    with pytest.raises(BundleError, match=r"cannot be quantized: expected a non-empty matrix"):
        schemes.get(name).quantize(np.ones(shape, np.float32))


@every_scheme
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers_are_refused(name, bad):
    w = np.ones((3, 40), np.float32)
    w[1, 39] = bad
    with pytest.raises(BundleError, match=r"\[3, 40\] hold NaN or infinity"):
        schemes.get(name).quantize(w)


def test_an_unknown_scheme_is_an_error_that_lists_what_there_is():
    with pytest.raises(UnknownSchemeError, match=r"'int3' is unknown: expected .*int8, int4"):
        schemes.get("int3")


@every_scheme
@pytest.mark.parametrize(("n", "k"), [(64, 64), (33, 50), (70, 96), (65, 17)])
def test_onnx_runtime_reads_the_packed_bytes_as_dequantize_does(name, n, k, tmp_path):
    """MatMulNBits with fp32 activations gives x @ dequantize(packed).T."""
    scheme = schemes.get(name)
    rng = np.random.default_rng(n * k)
    w = rng.standard_normal((n, k)).astype(np.float32)
    x = rng.standard_normal((4, k)).astype(np.float32)
    graph = Graph(_matmul(w, tmp_path / "fp32.onnx"))
    (site,) = find_sites(graph)
    treated = Treatments(graph).apply(site, f"matmul{scheme.BITS}")
    (node,) = treated.nodes
    options = {a.name: a for a in node.attribute}
    assert node.op_type == "MatMulNBits"
    assert options["accuracy_level"].i == 4
    options["accuracy_level"].i = 1
    graph.replace({site.node.name: treated.nodes})
    graph.save(tmp_path / "low.onnx")
    session = ort.InferenceSession(tmp_path / "low.onnx", providers=["CPUExecutionProvider"])
    (ours,) = session.run(None, {"x": x})

    packed = scheme.quantize(w, block_size=options["block_size"].i)
    expected = x.astype(np.float64) @ scheme.dequantize(packed).astype(np.float64).T
    np.testing.assert_allclose(ours, expected, atol=1e-5 * np.sqrt(k))
    assert treated.stored_bits == packed.stored_bits


def _matmul(w, path):
    """A file of y = x w^T, with the weight stored as MatMul wants it."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "layer")],
        "linear",
        [helper.make_tensor_value_info("x", 1, ["rows", w.shape[1]])],
        [helper.make_tensor_value_info("y", 1, ["rows", w.shape[0]])],
        [numpy_helper.from_array(np.ascontiguousarray(w.T), "w")],
    )
    opsets = [helper.make_opsetid("", 21)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path
