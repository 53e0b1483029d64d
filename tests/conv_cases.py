"""Convolution operators against their NumPy twins, in the variant that this process is forced to.

    LEANGEN_KERNELS=avx2 python tests/conv_cases.py

A process runs one variant only, so the tests run this file once for each.
"""

from __future__ import annotations

import draws
import leangen_kernels
import numpy as np
import onnxruntime as ort
from leangen_kernels import conv_layout, reference
from onnx import TensorProto, helper, numpy_helper

ACTIVATIONS = (("", 0.0), ("silu", 0.0), ("leaky_relu", 0.1), ("leaky_relu", 0.0))

# n, channels, height (0: one dimension), width, kernel, pads, dilations
SHAPES = (
    (1, 1, 1, 1, (1, 1), (0, 0, 0, 0), (1, 1)),
    (8, 16, 4, 16, (1, 1), (0, 0, 0, 0), (1, 1)),
    (17, 5, 7, 9, (3, 3), (1, 1, 1, 1), (1, 1)),
    (6, 3, 5, 32, (3, 5), (0, 2, 1, 4), (2, 1)),
    (33, 32, 16, 16, (3, 3), (1, 1, 1, 1), (1, 1)),
    (4, 8, 40, 40, (3, 3), (1, 1, 1, 1), (1, 1)),
    (97, 96, 8, 8, (3, 3), (1, 1, 1, 1), (1, 1)),
    (32, 24, 66, 48, (3, 3), (1, 1, 1, 1), (1, 1)),
    (40, 3, 5, 6, (3, 3), (2, 2, 2, 2), (2, 2)),
    (9, 4, 6, 7, (2, 4), (0, 1, 1, 2), (1, 1)),
    (8, 2, 3, 2, (7, 7), (3, 3, 3, 3), (1, 1)),
    (5, 3, 0, 1, (3,), (1, 1), (1,)),
    (9, 4, 0, 131, (7,), (9, 9), (3,)),
    (16, 8, 0, 3000, (5,), (8, 0), (2,)),
)


def session(proto: bytes, threads: int = 2) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(leangen_kernels.library()))
    return ort.InferenceSession(proto, options)


def model(op_type, given, constants, **attributes):
    """One operator: `given` names its inputs, empty ones are absent; `constants` holds some."""
    node = helper.make_node(op_type, given, ["y"], domain="leangen", **attributes)
    info = helper.make_tensor_value_info
    inputs = [info(name, TensorProto.FLOAT, None) for name in given if name not in ("", *constants)]
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    outputs = [info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph([node], "one", inputs, outputs, stored)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("leangen", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10).SerializeToString()


def weights(rng, bits, n, k, block):
    """Codes and scales [n, k], what they stand for, and the bytes."""
    fours = -(-k // 4) * 4
    block = min(block, fours)
    low, high = (-127, 128) if bits == 8 else (-8, 8)
    codes = rng.integers(low, high, (n, k)).astype(np.int8)
    scales = (rng.random((n, -(-fours // block))) / 50).astype(np.float32)
    spread = np.repeat(scales, block, 1)[:, :k].astype(np.float64)
    return codes * spread, conv_layout.pack(bits, codes, scales, block), block


def close(y, expected, step, places=1e-5):
    """Rounding of sums, and a code that may fall on either side of a half now and then."""
    allowed = places * (np.abs(expected).max() + 1e-30)
    off = np.abs(y - expected) - allowed
    assert np.isfinite(y).all()
    assert (off <= 2 * step).all(), (off / step).max()
    pixels = y.size // y.shape[1]  # one code on the other side moves all outputs of its pixel
    assert (off <= 0).mean() > 0.98 - 8 / pixels, (off <= 0).mean()


def check_conv(rng, shape, bits, block, scale=1.0):
    """Plain, then with everything that can be drawn in."""
    n, c, height, width, kernel, pads, dilations = shape
    spatial = (height, width) if height else (width,)
    w, packed, block = weights(rng, bits, n, c * int(np.prod(kernel)), block)
    w = w.reshape(n, c, *kernel)
    x = (scale * rng.standard_normal((2, c, *spatial))).astype(np.float32)
    attributes = {"n": n, "bits": bits, "block": block, "kernel_shape": kernel, "pads": pads}
    attributes["dilations"] = dilations
    expected, step = reference.conv(w, x, pads=pads, dilations=dilations)
    y = session(model("Conv", ["x", "w"], {"w": packed}, **attributes)).run(None, {"x": x})[0]
    assert y.shape == expected.shape
    close(y, expected, step)
    bias = rng.standard_normal(n).astype(np.float32)
    gain, shift = (rng.random(c).astype(np.float32) for _ in range(2))
    film = rng.standard_normal((2, 2 * c)).astype(np.float32)
    residual = rng.standard_normal(expected.shape).astype(np.float32)
    for activation, alpha in ACTIVATIONS:
        expected, step = reference.conv(
            w, x, pads=pads, dilations=dilations, bias=bias, residual=residual,
            norm=(1, gain, shift, 1e-4), film=film, activation=activation, alpha=alpha,
        )  # fmt: skip
        proto = model(
            "Conv",
            ["x", "w", "bias", "residual", "gain", "shift", "film"],
            {"w": packed, "bias": bias, "gain": gain, "shift": shift},
            norm_groups=1, epsilon=1e-4, activation=activation, alpha=alpha, **attributes,
        )  # fmt: skip
        y = session(proto).run(None, {"x": x, "residual": residual, "film": film})[0]
        close(y, expected, step)


def check_transposed(rng, n, c, width, kernel, stride, crop, bits):
    """Against the definition: x[i] * w[t] lands on i * stride + t - crop."""
    w = rng.integers(-8, 8, (n, c, kernel)).astype(np.int8)
    phases = conv_layout.transposed(w, stride).reshape(n * stride, -1)
    packed = conv_layout.pack(bits, phases, np.full((len(phases), 1), 0.5, np.float32), 4096)
    x = rng.integers(0, 253, (1, c, width)).astype(np.float32)
    x[:, :, :] = np.where(x > 0, x, 1)
    whole = np.zeros((n, (width - 1) * stride + kernel))
    for i in range(width):
        whole[:, i * stride : i * stride + kernel] += np.einsum("nct,c->nt", w * 0.5, x[0, :, i])
    expected = whole[:, crop : whole.shape[1] - crop]
    bias = rng.standard_normal(n).astype(np.float32)
    attributes = {"n": n, "bits": bits, "block": 4096, "kernel_shape": [kernel]}
    proto = model(
        "ConvTranspose", ["x", "w", "bias"], {"w": packed, "bias": bias},
        pads=[crop, crop], strides=[stride], **attributes,
    )  # fmt: skip
    y = session(proto).run(None, {"x": x})[0]
    assert y.shape == (1, *expected.shape)
    taps = -(-kernel // stride)
    bound = 0.5 * 8 * c * taps * 252 / 252 + 1e-3  # half a step of each of a patch's values
    assert np.abs(y[0] - expected - bias[:, None]).max() <= bound
    off = np.linalg.norm(y[0] - expected - bias[:, None]) / np.linalg.norm(expected)
    assert off < 0.01, off


def check_attention(rng, heads, width, spatial, scale):
    """Against the twin, and against attention that rounds nothing."""
    qkv = rng.standard_normal((2, 3 * heads * width, *spatial)).astype(np.float32)
    proto = model("PixelAttention", ["x"], {}, heads=heads, scale=scale)
    y = session(proto).run(None, {"x": qkv})[0]
    flat = qkv.reshape(2, 3 * heads * width, -1)
    expected = reference.pixel_attention(flat, heads, scale).reshape(y.shape)
    assert np.linalg.norm(y - expected) <= 2e-3 * np.linalg.norm(expected)
    q, k, v = flat.astype(np.float64).reshape(2, 3, heads, width, -1).swapaxes(0, 1)
    scores = np.einsum("bhct,bhcs->bhts", q, k) * scale
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    exact = np.einsum("bhts,bhcs->bhct", shares / shares.sum(-1, keepdims=True), v)
    assert np.linalg.norm(y - exact.reshape(y.shape)) <= 0.02 * np.linalg.norm(exact)


def check_all() -> None:
    """Every operator on odd shapes and extremes."""
    rng = draws.rng()
    for shape in SHAPES:
        check_conv(rng, shape, 8, 32)
        check_conv(rng, shape, 4, 4)
    check_conv(rng, SHAPES[4], 4, 1 << 20)
    for scale in (0.0, 1e-42, 1e-20, 1e20):
        check_conv_alone(rng, scale)
    for n, c, width, kernel, stride, crop, bits in (
        (3, 2, 1, 4, 2, 1, 8), (8, 16, 50, 16, 8, 4, 8), (2, 3, 700, 5, 3, 1, 4),
        (1, 1, 9, 2, 4, 0, 8),
    ):  # fmt: skip
        check_transposed(rng, n, c, width, kernel, stride, crop, bits)
    check_attention(rng, 1, 1, (1,), 1.0)
    check_attention(rng, 2, 32, (8, 9), 0.2)
    check_attention(rng, 3, 5, (131,), 0.5)


def check_conv_alone(rng, scale):
    """Zeros, denormals, tiny and huge values."""
    w, packed, block = weights(rng, 8, 12, 36, 32)
    x = (scale * rng.standard_normal((1, 4, 6, 7))).astype(np.float32)
    attributes = {"n": 12, "bits": 8, "block": block, "kernel_shape": [3, 3], "pads": [1] * 4}
    y = session(model("Conv", ["x", "w"], {"w": packed}, **attributes)).run(None, {"x": x})[0]
    expected, step = reference.conv(w.reshape(12, 4, 3, 3), x, pads=(1, 1, 1, 1), dilations=(1, 1))
    close(y, expected, step)


if __name__ == "__main__":
    print(leangen_kernels.status())
    check_all()
