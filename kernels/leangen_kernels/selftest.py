"""Runs every operator of the library in ONNX Runtime, on a little data, against its NumPy twin.

    python -m leangen_kernels.selftest        prints JSON: operator -> null, or what is wrong

In a process of its own, so that kernels that this CPU cannot run after all, or that crash, end that
process and not the one that asks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import leangen_kernels
from leangen_kernels import layout, reference
from leangen_kernels.layout import Array

TOLERANCE = 1e-4
"""Largest difference over the largest value: fp32 sums stay far below, a wrong lane far above."""

TIMEOUT_S = 120.0


def linear() -> tuple[Array, Array]:
    """All forms of weights, one token and several, both kinds of activations."""
    rng, found, expected = np.random.default_rng(1), [], []
    n, k = 40, 100
    for form in layout.FORMS.values():
        codes = rng.integers(0, 1 << form.bits, (n, k), dtype=np.uint8)
        scales = (rng.random((n, -(-k // layout.BLOCK))) / 16).astype(np.float16).astype(np.float32)
        packed = layout.pack(form, codes, scales, -8 * scales if form.minimum else None)
        for tokens, activations in ((1, "int8"), (5, "int8"), (2, "fp32")):
            x = rng.standard_normal((tokens, k)).astype(np.float32)
            attributes = {"form": form.name, "n": n, "k": k, "activations": activations}
            (y,) = _run("Linear", {"x": x, "weights": packed}, ["y"], **attributes)
            found.append(y)
            expected.append(reference.linear(form, packed, n, x, activations=activations))
    return np.concatenate(found), np.concatenate(expected)


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
    y, _, _ = _run("Attention", feeds, ["y", "present_key", "present_value"], **attributes)
    lengths = np.array([tokens])
    expected, _, _ = reference.attention(
        qkv, cache, cache, lengths, cosines, sines, heads=heads, window=7
    )
    return y, expected


OPERATORS: dict[str, Callable[[], tuple[Array, Array]]] = {
    "Linear": linear,
    "Attention": attention,
}
"""What each operator gave, and its twin."""


def _run(operator: str, feeds: dict[str, Array], outputs: Sequence[str], **attributes: Any) -> Any:
    import onnx
    import onnxruntime as ort

    def info(name: str, value: Array | None = None) -> Any:
        dtype = np.dtype(np.float32) if value is None else value.dtype
        shape = None if value is None else value.shape
        kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        return onnx.helper.make_tensor_value_info(name, kind, shape)

    node = onnx.helper.make_node(operator, [*feeds], [*outputs], domain="leangen", **attributes)
    inputs = [info(name, value) for name, value in feeds.items()]
    graph = onnx.helper.make_graph([node], "one", inputs, [info(name) for name in outputs])
    domains = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("leangen", 1)]
    model = onnx.helper.make_model(graph, opset_imports=domains, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(leangen_kernels.library()))
    return ort.InferenceSession(model.SerializeToString(), options).run(None, feeds)


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
