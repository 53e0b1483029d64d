"""Convolution operators: every variant that runs here, shapes, threads, wrong inputs."""

import os
import subprocess
import sys
from pathlib import Path

import conv_cases
import draws
import leangen_kernels
import numpy as np
import onnxruntime as ort
import pytest
from kernels_machines import Emulated, Here, here
from leangen_kernels import conv_layout, reference

needs_kernels = pytest.mark.skipif(
    leangen_kernels.library() is None, reason="no kernels: " + leangen_kernels.status()[1]
)


@pytest.fixture
def rng():
    return draws.rng()


@pytest.mark.parametrize("variant", here())
def test_operators_match_their_twins(variant):
    Here(variant)  # skips where this CPU cannot run it
    tests = Path(__file__).parent
    environment = {
        **os.environ,
        "LEANGEN_KERNELS": variant,
        "PYTHONPATH": os.pathsep.join([str(tests), *sys.path]),
    }
    command = [sys.executable, str(tests / "conv_cases.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"('{variant}'" in done.stdout


def check_tile(machine, rng):
    """Patches of 16 pixels packed, multiplied and scaled back, kernel by kernel."""
    n, k, bits = 3, 10, 4
    w, packed, block = conv_cases.weights(rng, bits, n, k, 4)
    size, _ = conv_layout.packed_bytes(bits, n, k, block)
    codes = np.zeros(2 * size, np.uint8)
    machine.call("unpack_nibbles", packed[:size].copy(), codes, size // 64)
    image = rng.standard_normal((k, 16)).astype(np.float32)
    low, high = np.minimum(image.min(0), 0), np.maximum(image.max(0), 0)
    offsets = np.zeros(12, np.int32)
    offsets[:k] = np.arange(k) * 64
    patches, scales = np.zeros(3 * 64, np.uint8), np.zeros(32, np.float32)
    taps, bias = np.zeros(1, np.int32), rng.standard_normal(4).astype(np.float32)
    machine.call(
        "pack_patches", image, low, high, offsets, 3, taps, 1, patches, 64, scales
    )  # fmt: skip
    y = np.zeros((n, 16), np.float32)
    machine.call(
        "conv_1", patches, scales, codes, packed[size:].copy(), 3, block // 4, y, 64, 16, n, bias, 0
    )
    expected = w @ reference.round_patches(image)[0] + bias[:n, None]
    assert np.abs(y - expected).max() <= 1e-5 * np.abs(expected).max()


def check_attention_tile(machine, rng):
    """Attention of 32 pixels to 19 others, kernel by kernel."""
    width, keys, scale = 5, 19, 0.3
    q, k, v = (rng.standard_normal((width, n)).astype(np.float32) for n in (32, keys, keys))
    offsets, taps = np.zeros(8, np.int32), np.zeros(1, np.int32)
    offsets[:width] = np.arange(width) * 64
    patches, scales = np.zeros((2, 2, 64), np.uint8), np.zeros((2, 2, 16), np.float32)
    for i, some in enumerate(np.split(q, 2, 1)):
        low, high = np.minimum(some.min(0), 0), np.maximum(some.max(0), 0)
        packed, numbers = patches[:, i].copy(), scales[i].copy()
        given = (np.ascontiguousarray(some), low, high, offsets, 2, taps, 1)
        machine.call("pack_patches", *given, packed, 64, numbers)
        patches[:, i], scales[i] = packed, numbers
    codes, numbers = np.zeros(2 * 2 * 64, np.uint8), np.zeros(2 * 32, np.float32)
    machine.call("round_keys", k, 4 * keys, width, keys, codes, numbers, scale)
    scores, peak = np.zeros((20, 32), np.float32), np.zeros(32, np.float32)
    machine.call("scores", patches, scales, codes, numbers, 2, keys, scores, peak)
    queries, steps = reference.round_patches(q)
    expected = scale * reference.symmetric(k.T, width) @ queries
    assert np.abs(scores[:keys] * scales[:, 0].reshape(-1) - expected).max() < 1e-5
    assert np.array_equal(peak, scores[:keys].max(0)) and (scores[keys:] == -1e30).all()
    shares = np.zeros((5, 2, 16, 4), np.uint8)
    machine.call("shares", scores, peak, scales, 5, shares)
    zeros = scales[:, 1, :, None]
    signed = shares if zeros.flat[0] == 2 else shares.view(np.int8)
    found = ((signed - zeros) * scales[:, 0, :, None]).transpose(0, 3, 1, 2).reshape(20, 32)
    exact = np.exp(expected - expected.max(0))
    assert np.abs(found[:keys] - exact / exact.sum(0)).max() <= 0.51 / 252
    assert not found[keys:].any()
    size, rest = conv_layout.packed_bytes(8, width, keys, 32)
    codes, numbers, room = (np.zeros(count, np.uint8) for count in (size, rest, 32))
    machine.call("round_values", v, 4 * keys, width, keys, codes, numbers, room)
    got, step = conv_layout.unpack(8, np.concatenate([codes, numbers]), width, keys, 32)
    assert np.allclose(got * step, reference.symmetric(v, 32), atol=1e-6)


@pytest.mark.parametrize("variant", here())
def test_kernels_of_one_tile(variant, rng):
    check_tile(Here(variant), rng)
    check_attention_tile(Here(variant), rng)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["neon", "portable"])
def test_kernels_on_emulated_arm(variant, rng, tmp_path_factory):
    with Emulated(variant, tmp_path_factory.getbasetemp()) as machine:
        check_tile(machine, rng)
        check_attention_tile(machine, rng)


def test_weights_pack_and_unpack_without_loss(rng):
    for bits, low, high in ((8, -127, 128), (4, -8, 8)):
        for n, k, block in ((1, 1, 4), (4, 32, 32), (17, 33, 36), (40, 288, 32)):
            codes = rng.integers(low, high, (n, k)).astype(np.int8)
            blocks = -(-(-(-k // 4) * 4) // block)
            scales = rng.standard_normal((n, blocks)).astype(np.float32)
            packed = conv_layout.pack(bits, codes, scales, block)
            assert packed.size == sum(conv_layout.packed_bytes(bits, n, k, block))
            got_codes, got_scales = conv_layout.unpack(bits, packed, n, k, block)
            assert np.array_equal(got_codes, codes)
            assert np.array_equal(got_scales, scales)


def test_weights_that_do_not_fit_are_refused(rng):
    codes = np.full((4, 8), -128, np.int8)
    with pytest.raises(ValueError, match="expected -127 to 127"):
        conv_layout.pack(8, codes, np.ones((4, 1), np.float32), 8)
    with pytest.raises(ValueError, match="do not fit codes"):
        conv_layout.pack(8, codes + 1, np.ones((4, 2), np.float32), 8)
    with pytest.raises(ValueError, match="side by side differ"):
        conv_layout.scale_blocks(rng.random((2, 8)))


def test_scales_are_kept_in_the_largest_blocks_that_hold_them(rng):
    for block, k in ((4, 64), (8, 64), (32, 96), (100, 98)):
        given = np.repeat(rng.random((3, -(-k // block))), block, 1)[:, :k].astype(np.float32)
        found, scales = conv_layout.scale_blocks(given)
        assert found == block
        assert np.array_equal(np.repeat(scales, block, 1)[:, :k], given)


def small(rng, **changes):
    _, packed, block = conv_cases.weights(rng, 8, 12, 36, 32)
    attributes = {"n": 12, "bits": 8, "block": block, "kernel_shape": [3, 3], "pads": [1] * 4}
    constants = {"w": packed, **changes.pop("constants", {})}
    inputs = ["x", "w", *changes.pop("inputs", [])]
    return conv_cases.model("Conv", inputs, constants, **{**attributes, **changes})


@needs_kernels
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "n 0"),
        ({"bits": 5}, "bits 5"),
        ({"block": 6}, "blocks of a multiple of 4"),
        ({"kernel_shape": [3, 3, 3]}, "kernel_shape of rank"),
        ({"pads": [-1, 0, 0, 0]}, "out of range"),
        ({"activation": "gelu"}, "expected silu or leaky_relu"),
        ({"activation": "leaky_relu", "alpha": 2.0}, "alpha 2"),
    ],
)
def test_wrong_attributes_are_an_error(rng, changes, message):
    with pytest.raises(Exception, match=message):
        conv_cases.session(small(rng, **changes))


@needs_kernels
@pytest.mark.parametrize(
    ("shape", "changes", "message"),
    [
        ((1, 4, 8), {}, "rank 3, expected 4"),
        ((1, 5, 8, 8), {}, "bytes, expected"),
        ((1, 4, 0, 8), {}, "dimension of 0"),
        ((1, 4, 1, 1), {"pads": [0] * 4}, "smaller than the kernel"),
        ((1, 4, 8, 8), {"n": 13}, "bytes, expected"),
        (
            (1, 4, 8, 8),
            {"inputs": ["bias"], "constants": {"bias": np.zeros(3, np.float32)}},
            "bias has 3",
        ),
        (
            (1, 4, 8, 8),
            {"inputs": ["", "more"], "constants": {"more": np.zeros((1, 12, 8, 1), np.float32)}},
            "residual is not shaped",
        ),
        (
            (1, 4, 8, 8),
            {"inputs": ["", "", "gain", "gain"], "constants": {"gain": np.ones(4, np.float32)}},
            "norm_groups",
        ),
    ],
)
def test_wrong_inputs_are_an_error(rng, shape, changes, message):
    running = conv_cases.session(small(rng, **changes))
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument, match=message):
        running.run(None, {"x": np.zeros(shape, np.float32)})


@needs_kernels
def test_any_number_of_threads_gives_the_same_bits(rng):
    n, c = 96, 96
    _, packed, block = conv_cases.weights(rng, 8, n, 9 * c, 32)
    gain = rng.random(c).astype(np.float32)
    proto = conv_cases.model(
        "Conv", ["x", "w", "", "", "gain", "gain"], {"w": packed, "gain": gain},
        n=n, bits=8, block=block, kernel_shape=[3, 3], pads=[1] * 4, norm_groups=8,
    )  # fmt: skip
    attention = conv_cases.model("PixelAttention", ["x"], {}, heads=2, scale=0.3)
    for size in (8, 16, 40, 64):
        x = rng.standard_normal((1, c, size, size)).astype(np.float32)
        qkv = rng.standard_normal((1, 48, size, 3)).astype(np.float32)
        for model, given in ((proto, x), (attention, qkv)):
            one, two, four = (
                conv_cases.session(model, threads).run(None, {"x": given})[0]
                for threads in (1, 2, 4)
            )
            assert np.array_equal(one, two)
            assert np.array_equal(one, four)


@needs_kernels
def test_no_images_give_no_images(rng):
    y = conv_cases.session(small(rng)).run(None, {"x": np.zeros((0, 4, 5, 6), np.float32)})[0]
    assert y.shape == (0, 12, 5, 6)
