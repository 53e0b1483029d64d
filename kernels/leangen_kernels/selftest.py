"""Runs every operator of the library in ONNX Runtime, on a little data, against its NumPy twin.

    python -m leangen_kernels.selftest        prints JSON: operator -> null, or what is wrong

In a process of its own, so that kernels that this CPU cannot run after all, or that crash, end that
process and not the one that asks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import leangen_kernels
from leangen_kernels import conv_layout, layout, reference
from leangen_kernels.layout import Array

TOLERANCE = 3e-3
"""Largest difference over the largest value: a convolution's activation that is rounded the other
way for a sum in fp32 stays below it, a wrong lane far above."""

N, K = 40, 100
FLOAT = {"y": np.float32}

TIMEOUT_S = 120.0


def linear() -> tuple[Array, Array]:
    """All forms of weights, one token and several, both kinds of activations."""
    rng, found, expected = np.random.default_rng(1), [], []
    for form in layout.FORMS.values():
        packed = weights(rng, form)
        kinds = ((2, "fp32"),) if form.table else ((1, "int8"), (5, "int8"), (2, "fp32"))
        for tokens, activations in kinds:
            x = rng.standard_normal((tokens, K)).astype(np.float32)
            attributes = {"form": form.name, "n": N, "k": K, "activations": activations}
            (y,) = _run("Linear", {"x": x, "weights": packed}, FLOAT, **attributes)
            found.append(y)
            expected.append(reference.linear(form, packed, N, x, activations=activations))
    return np.concatenate(found), np.concatenate(expected)


def argmax_linear() -> tuple[Array, Array]:
    """The largest of the products, and its place."""
    rng, form = np.random.default_rng(3), layout.FORMS["q8"]
    packed, x = weights(rng, form), rng.standard_normal((3, K)).astype(np.float32)
    outputs = {"index": np.int64, "most": np.float32}
    attributes = {"form": form.name, "n": N, "k": K}
    index, most = _run("ArgmaxLinear", {"x": x, "weights": packed}, outputs, **attributes)
    y = reference.linear(form, packed, N, x)
    return np.concatenate([index, most]), np.concatenate([y.argmax(-1), y.max(-1)])


def weights(rng: np.random.Generator, form: layout.Form, n: int = N, k: int = K) -> Array:
    """A packed matrix [n, k] at random."""
    codes = rng.integers(0, 1 << form.bits, (n, k), dtype=np.uint8)
    scales = rng.integers(1, 64, (n, -(-k // form.block))).astype(np.float32)
    scales /= 1024  # any form holds these
    return layout.pack(form, codes, scales, -8 * scales if form.minimum else None)


def conv() -> tuple[Array, Array]:
    """Three by three, with a norm, SiLU, bias and residual."""
    rng, n, channels, size = np.random.default_rng(4), 9, 8, (7, 20)
    block = 24
    codes = rng.integers(-127, 128, (n, channels * 9)).astype(np.int8)
    scales = (rng.random((n, channels * 9 // block)) / 50).astype(np.float32)
    w = (codes * np.repeat(scales, block, 1).astype(np.float64)).reshape(n, channels, 3, 3)
    feeds = {
        "x": rng.standard_normal((1, channels, *size)).astype(np.float32),
        "weights": conv_layout.pack(8, codes, scales, block),
        "bias": rng.standard_normal(n).astype(np.float32),
        "residual": rng.standard_normal((1, n, *size)).astype(np.float32),
        "gain": rng.random(channels).astype(np.float32),
        "shift": rng.random(channels).astype(np.float32),
    }
    attributes: dict[str, Any] = {
        "pads": (1, 1, 1, 1),
        "dilations": (1, 1),
        "activation": "silu",
    }
    packing = {"n": n, "bits": 8, "block": block, "kernel_shape": (3, 3)}
    (y,) = _run("Conv", feeds, FLOAT, norm_groups=2, epsilon=1e-5, **attributes, **packing)
    expected, _ = reference.conv(
        w,
        feeds["x"],
        bias=feeds["bias"],
        residual=feeds["residual"],
        norm=(2, feeds["gain"], feeds["shift"], 1e-5),
        **attributes,
    )
    return y, expected


def conv_transpose() -> tuple[Array, Array]:
    """Against the definition: x[i] * w[t] lands on i * stride + t."""
    rng, n, channels, width, kernel, stride = np.random.default_rng(5), 5, 4, 21, 4, 2
    w = rng.integers(-127, 128, (n, channels, kernel)).astype(np.int8)
    phases = conv_layout.transposed(w, stride).reshape(n * stride, -1)
    scales = np.full((len(phases), 1), 0.5, np.float32)
    x = rng.integers(0, 253, (1, channels, width)).astype(np.float32)
    feeds = {"x": x, "weights": conv_layout.pack(8, phases, scales, 4096)}
    attributes = {"n": n, "bits": 8, "block": 4096, "kernel_shape": (kernel,)}
    (y,) = _run("ConvTranspose", feeds, FLOAT, pads=(0, 0), strides=(stride,), **attributes)
    expected = np.zeros((1, n, (width - 1) * stride + kernel))
    for i in range(width):
        made = np.einsum("nct,c->nt", w * 0.5, x[0, :, i])
        expected[0, :, i * stride : i * stride + kernel] += made
    return y, expected


def pixel_attention() -> tuple[Array, Array]:
    """Two heads of eight channels over 45 pixels."""
    qkv = np.random.default_rng(6).standard_normal((1, 3 * 16, 45)).astype(np.float32)
    (y,) = _run("PixelAttention", {"qkv": qkv}, FLOAT, heads=2, scale=0.35)
    return y, reference.pixel_attention(qkv, 2, float(np.float32(0.35)))


def attention() -> tuple[Array, Array]:
    """A prompt of 19 tokens into an empty cache, with a window."""
    rng, tokens, heads, kv_heads, width, capacity = np.random.default_rng(2), 19, 4, 2, 32, 32
    columns = (heads + 2 * kv_heads) * width
    angles = np.outer(np.arange(capacity), 1e4 ** (-np.arange(width // 2) / (width // 2)))
    qkv = rng.standard_normal((1, tokens, columns)).astype(np.float32)
    cache = np.zeros((1, kv_heads, capacity, width), np.float32)
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    feeds = {
        "qkv": qkv,
        "past_key": cache,
        "past_value": cache,
        "seqlens_k": np.array([tokens - 1], np.int32),
        "cosines": cosines,
        "sines": sines,
    }
    attributes = {"heads": heads, "kv_heads": kv_heads, "window": 7}
    outputs = dict.fromkeys(("y", "present_key", "present_value"), np.float32)
    y, _, _ = _run("Attention", feeds, outputs, **attributes)
    lengths = np.array([tokens])
    expected, _, _ = reference.attention(
        qkv, cache, cache, lengths, cosines, sines, heads=heads, window=7
    )
    return y, expected


def chain() -> tuple[Array, Array]:
    """Two linear layers, the second on what the first makes, with a residual."""
    rng, form = np.random.default_rng(7), layout.FORMS["q4"]
    first, second = weights(rng, form), weights(rng, form, N, N)
    feeds = {"x": rng.standard_normal((3, K)).astype(np.float32), "first": first, "second": second}
    feeds["residual"] = rng.standard_normal((3, N)).astype(np.float32)
    steps: dict[str, Any] = {"inputs_0": (0, 1, -1, -1, -1, -1), "inputs_1": (4, 2, -1, -1, 3, -1)}
    for i, k in enumerate((K, N)):
        steps |= {f"form_{i}": form.name, f"n_{i}": N, f"k_{i}": k}
    (y,) = _run("Chain", feeds, FLOAT, kinds=(0, 0), results=(1,), given=4, **steps)
    between = reference.linear(form, first, N, feeds["x"])
    return y, reference.linear(form, second, N, between) + feeds["residual"]


OPERATORS: dict[str, Callable[[], tuple[Array, Array]]] = {
    "Linear": linear,
    "ArgmaxLinear": argmax_linear,
    "Attention": attention,
    "Chain": chain,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "PixelAttention": pixel_attention,
}
"""What each operator gave, and its twin."""


def _run(
    operator: str, feeds: Mapping[str, Array], outputs: Mapping[str, type], **attributes: Any
) -> Any:
    import onnx
    import onnxruntime as ort

    def info(name: str, dtype: Any, shape: Any = None) -> Any:
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        return onnx.helper.make_tensor_value_info(name, kind, shape)

    node = onnx.helper.make_node(operator, [*feeds], [*outputs], domain="leangen", **attributes)
    inputs = [info(name, value.dtype, value.shape) for name, value in feeds.items()]
    made = [info(name, dtype) for name, dtype in outputs.items()]
    graph = onnx.helper.make_graph([node], "one", inputs, made)
    domains = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("leangen", 1)]
    model = onnx.helper.make_model(graph, opset_imports=domains, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(leangen_kernels.library()))
    return ort.InferenceSession(model.SerializeToString(), options).run(None, dict(feeds))


def results() -> dict[str, str | None]:
    """Operator -> None where it agrees with its twin, else what is wrong."""
    return {name: _wrong(check) for name, check in OPERATORS.items()}


def _wrong(check: Callable[[], tuple[Array, Array]]) -> str | None:
    try:
        found, expected = check()
    except Exception as error:  # ORT raises many unrelated types from its C++ side
        return str(error).splitlines()[0]
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    if difference <= TOLERANCE:
        return None
    return f"differs from its NumPy twin by {difference:.1e} of the largest value"


def results_apart() -> dict[str, str | None]:
    """`results` from another process; one entry, `process`, where that came to an end."""
    command = [sys.executable, "-m", "leangen_kernels.selftest"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"process": f"did not end within {TIMEOUT_S:g} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["nothing on standard error"]
        return {"process": f"ended with exit status {done.returncode}: {last[0]}"}
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    print(json.dumps(results()))
