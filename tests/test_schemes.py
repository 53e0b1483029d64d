"""Laws that every scheme obeys; bitsandbytes, torch and ONNX Runtime as independent readers."""

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
from leangen.treatments.packing import bnb_layout, nbits_layout, nbits_zero_points

INTEGERS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
TABLES = ("nf4", "fp4")
HALVES = ("fp16", "bf16")
SYMMETRIC = [(name, {}) for name in SCHEMES]
FORMS = SYMMETRIC + [(name, {"asymmetric": True}) for name in INTEGERS]
ids = [name + ("-asym" if options else "") for name, options in FORMS]
every_form = pytest.mark.parametrize(("name", "options"), FORMS, ids=ids)
every_scheme = pytest.mark.parametrize("name", SCHEMES)

shapes = st.tuples(st.integers(1, 9), st.integers(1, 100))
weights = shapes.flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.floats(-100, 100, width=32))
)
blocks = st.sampled_from([None, 16, 32, 64, 128])


def largest_error(name, options, largest):
    """What rounding a weight may cost at most, by the largest magnitude of its block (float64)."""
    if name in INTEGERS:
        levels = 1 << INTEGERS[name]
        # Asymmetric: the zero point is rounded too, and the span is at most twice the largest.
        return 2 * largest / (levels - 1) if options else largest / (levels // 2 - 1) / 2
    if name in TABLES:  # half the widest gap between neighbours, next to the ends
        return largest * {"nf4": 0.152, "fp4": 1 / 6}[name] + 1e-38
    return (
        largest * {"fp16": 2.0**-11, "bf16": 2.0**-8}[name]
        + {"fp16": 2.0**-25, "bf16": 2.0**-134}[name]
    )


def per_block(values, size):
    """Values [n, k] padded with zeros and folded to [n, blocks, size], in float64."""
    n, k = values.shape
    padded = np.zeros((n, -(-k // size) * size))
    padded[:, :k] = values
    return padded.reshape(n, -1, size)


@every_form
@settings(max_examples=60)
@given(w=weights, block_size=blocks)
def test_round_trip_is_within_the_bound(name, options, w, block_size):
    scheme = schemes.get(name)
    packed = scheme.quantize(w, block_size=block_size, **options)
    back = scheme.dequantize(packed)
    assert back.shape == w.shape and back.dtype == np.float32
    size = packed.block_size
    error = (per_block(back.astype(np.float64) - w, size) ** 2).sum(axis=2)
    bound = largest_error(name, options, np.abs(per_block(w, size)).max(axis=2))
    assert np.all(error <= size * bound**2 * (1 + 1e-3) + 1e-30)


@every_form
@settings(max_examples=40)
@given(w=weights, block_size=blocks)
def test_quantizing_again_changes_nothing(name, options, w, block_size):
    scheme = schemes.get(name)
    if name in ("nf4", "fp4"):  # bitsandbytes takes a subnormal scale for 1e-38
        w = np.where(np.abs(w) < 1e-37, np.float32(0), w)
    once = scheme.dequantize(scheme.quantize(w, block_size=block_size, **options))
    packed = scheme.quantize(once, block_size=block_size, **options)
    again = scheme.dequantize(packed)
    if packed.scales.size:
        step = np.abs(schemes.spread(packed.scales.astype(np.float32), packed))
        # With zero points the search may settle on a neighbouring pair of scale and zero point.
        assert np.all(np.abs(again - once) <= (0.5 if options else 1e-4) * step)
    else:
        assert np.array_equal(again, once)


@every_form
def test_same_input_same_bytes_whatever_the_threads(name, options):
    w = np.random.default_rng(0).standard_normal((300, 700), np.float32)
    quantize = schemes.get(name).quantize
    one, two = (quantize(w, threads=threads, **options) for threads in (1, 2))
    assert np.array_equal(one.q, two.q) and np.array_equal(one.scales, two.scales)


@every_form
def test_zero_rows_stay_zero_and_constant_rows_exact(name, options):
    w = np.zeros((4, 64), np.float32)
    w[1], w[2] = 0.37, -5.0
    scheme = schemes.get(name)
    tolerance = {"fp16": 2**-11, "bf16": 2**-8}.get(name, 1e-6)
    assert np.allclose(scheme.dequantize(scheme.quantize(w, **options)), w, rtol=tolerance, atol=0)


@every_form
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-20, 1e20, 3e38])
def test_extreme_rows_stay_finite_and_in_scale(name, options, size):
    w = np.random.default_rng(1).uniform(-1, 1, (3, 64)).astype(np.float32)
    w[1] *= np.float32(size)
    scheme = schemes.get(name)
    if name == "fp16" and size > 1e5:
        with pytest.raises(BundleError, match="beyond half precision's 65504: use bf16"):
            scheme.quantize(w)
        return
    back = scheme.dequantize(scheme.quantize(w, block_size=32, **options))
    assert np.isfinite(back).all()
    bound = largest_error(name, options, np.abs(per_block(w, 32)).max(axis=2)) * 32**0.5
    bound = np.maximum(bound * (1 + 1e-3), 2 * np.finfo(np.float32).smallest_subnormal)
    assert np.all(np.abs(per_block(back.astype(np.float64) - w, 32)).max(axis=2) <= bound)


@every_form
def test_half_precision_input_is_its_float32_value(name, options):
    w = np.random.default_rng(2).standard_normal((5, 48)).astype(np.float16)
    quantize = schemes.get(name).quantize
    wide = quantize(w.astype(np.float32), **options)
    assert np.array_equal(quantize(w, **options).q, wide.q)


@every_scheme
@pytest.mark.parametrize("w", [np.zeros((0, 4)), np.zeros((4, 0)), np.zeros(4)])
def test_empty_or_flat_weights_are_refused(name, w):
    with pytest.raises(BundleError, match="non-empty matrix"):
        schemes.get(name).quantize(w.astype(np.float32))


@every_scheme
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(name, bad):
    w = np.ones((3, 40), np.float32)
    w[2, 39] = bad
    with pytest.raises(BundleError, match="NaN or infinity"):
        schemes.get(name).quantize(w)


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("options", [{}, {"asymmetric": True}], ids=["", "asym"])
def test_importance_moves_the_error_to_where_it_matters_less(name, options):
    rng = np.random.default_rng(4)
    w = rng.standard_normal((64, 128), np.float32)
    importance = rng.exponential(size=128) ** 3
    scheme = schemes.get(name)

    def weighted(**given):
        back = scheme.dequantize(scheme.quantize(w, block_size=32, **options, **given))
        return ((back - w) ** 2 * importance).sum()

    assert weighted(importance=importance) < weighted()


@pytest.mark.parametrize("name", ["int4", "int3", "int2"])
def test_zero_points_help_where_weights_lean_to_one_side(name):
    w = np.random.default_rng(5).uniform(-0.2, 1, (32, 64)).astype(np.float32)
    scheme = schemes.get(name)
    plain, zeros = (
        ((scheme.dequantize(scheme.quantize(w, asymmetric=a)) - w) ** 2).sum()
        for a in (False, True)
    )
    assert zeros < 0.65 * plain


def test_seven_bit_codes_leave_the_top_bit_free():
    w = np.random.default_rng(3).standard_normal((8, 90), np.float32)
    codes = schemes.get("int8").quantize(w, q_max=63).q.astype(int) - 128
    assert np.abs(codes).max() == 63


def test_bits_per_weight_counts_scales_and_zero_points():
    w = np.ones((4, 256), np.float32)

    def bits(name, **options):
        return schemes.get(name).quantize(w, **options).bits_per_weight

    assert bits("int4") == 5.0
    assert bits("int4", scale_dtype=np.float16) == 4.5
    assert bits("int4", block_size=128, asymmetric=True) == 4 + 32 / 128 + 4 / 128
    assert bits("int3") == 4.0 and bits("int2", block_size=128) == 2.25
    assert bits("int8") == 8 + 32 / 256 and bits("int8", block_size=32) == 9.0
    assert bits("nf4") == 4.5 and bits("fp16") == 16


def test_unknown_scheme_names_the_known_ones():
    with pytest.raises(UnknownSchemeError, match="int5.*one of fp16, bf16, int8, int4"):
        schemes.get("int5")


# Independent readers


def linear(node, constants, k, n):
    """An ORT session of one low-bit product x [5, k] -> y [5, n]."""
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, n])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", ["int8", "int4", "int2"])
@pytest.mark.parametrize("asymmetric", [False, True], ids=["", "asym"])
@pytest.mark.parametrize("k", [16, 32, 96, 100])
def test_ort_computes_with_the_weights_that_dequantize_gives(name, asymmetric, k):
    rng = np.random.default_rng(k)
    w, x = rng.standard_normal((24, k), np.float32), rng.standard_normal((5, k), np.float32)
    scheme = schemes.get(name)
    packed = scheme.quantize(w, block_size=16, asymmetric=asymmetric)
    constants = {"q": nbits_layout(packed), "s": packed.scales}
    if asymmetric:
        constants["z"] = nbits_zero_points(packed, scheme.BITS)
    node = helper.make_node(
        "MatMulNBits",
        ["x", *constants],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=24,
        bits=scheme.BITS,
        block_size=16,
        accuracy_level=1,  # fp32 activations: only the weights are in question
    )
    y = linear(node, constants, k, 24).run(None, {"x": x})[0]
    exact = x.astype(np.float64) @ scheme.dequantize(packed).astype(np.float64).T
    assert np.allclose(y, exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("block_size", [16, 64])
def test_ort_reads_the_tables_as_we_do(name, block_size):
    rng = np.random.default_rng(block_size)
    w, x = rng.standard_normal((24, 128), np.float32), rng.standard_normal((5, 128), np.float32)
    scheme = schemes.get(name)
    packed = scheme.quantize(w, block_size=block_size)
    node = helper.make_node(
        "MatMulBnb4",
        ["x", "q", "s"],
        ["y"],
        domain="com.microsoft",
        K=128,
        N=24,
        block_size=block_size,
        quant_type=TABLES.index(name) ^ 1,  # 0 is fp4, 1 is nf4
    )
    constants = {"q": bnb_layout(packed), "s": packed.scales.reshape(-1)}
    y = linear(node, constants, 128, 24).run(None, {"x": x})[0]
    exact = x.astype(np.float64) @ scheme.dequantize(packed).astype(np.float64).T
    assert np.allclose(y, exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_tables_equal_bitsandbytes_bit_for_bit(name, block_size):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    rng = np.random.default_rng(block_size)
    w = rng.standard_normal((64, 256)).astype(np.float32)
    scheme = schemes.get(name)
    # Weights halfway between two codes, a block of zeros, tiny and huge blocks.
    middles = (np.sort(scheme.TABLE)[1:] + np.sort(scheme.TABLE)[:-1]) / 2
    w[0, : middles.size], w[0, 31] = middles, 1.0
    w[1] = 0
    w[2] *= np.float32(1e-30)
    w[3] *= np.float32(1e30)
    codes, state = functional.quantize_4bit(
        torch.from_numpy(w), blocksize=block_size, quant_type=name
    )
    packed = scheme.quantize(w, block_size=block_size)
    assert np.array_equal(bnb_layout(packed), codes.numpy().reshape(-1))
    assert np.array_equal(packed.scales.reshape(-1), state.absmax.numpy())
    theirs = functional.dequantize_4bit(codes, state).numpy()
    assert np.array_equal(scheme.dequantize(packed), theirs)


@pytest.mark.parametrize("name", HALVES)
def test_halves_equal_torch(name):
    torch = pytest.importorskip("torch")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[name]
    w = np.random.default_rng(0).standard_normal((40, 60)).astype(np.float32)
    w[0, :4] = 1 + 2.0**-8, 1 + 2.0**-9, 1 + 3 * 2.0**-9, 2.0**-130  # ties, and a subnormal
    scheme = schemes.get(name)
    theirs = torch.from_numpy(w).to(dtype).float().numpy()
    assert np.array_equal(scheme.dequantize(scheme.quantize(w)), theirs)
