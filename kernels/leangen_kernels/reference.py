"""Plain NumPy twins of the kernels: same names, same meaning, float64 sums, no packing.

They say what a kernel computes; a kernel may differ by the rounding of its fp32 sums alone.
"""

from __future__ import annotations

import math

import numpy as np

from leangen_kernels.cache_layout import CACHES, Cache
from leangen_kernels.layout import BLOCK, Array, Form, unpack

TINY = np.float32(1e-30)


def quantize(x: Array, block: int = BLOCK) -> tuple[Array, Array]:
    """Rows of floats as int8 codes [m, k] and scales [m, ceil(k / block)], x = codes * scale.

    The scale is a block's largest magnitude over 127; codes round to nearest, ties to even. Blocks
    whose largest magnitude is below 1e-30 are zero.
    """
    codes, scales = quantize_rows(_in_blocks(x, block))
    return codes.reshape(x.shape[0], -1)[:, : x.shape[1]], scales


def quantize_rows(x: Array) -> tuple[Array, Array]:
    """The same with one scale for each row, the last axis."""
    largest = np.abs(x).max(-1)
    kept = largest >= TINY
    scales = np.where(kept, largest / np.float32(127), np.float32(0)).astype(np.float32)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=kept)
    return np.rint(x * inverse[..., None]).astype(np.int8), scales


def _in_blocks(x: Array, block: int) -> Array:
    m, k = x.shape
    padded = np.zeros((m, -(-k // block) * block), np.float32)
    padded[:, :k] = x
    return padded.reshape(m, -1, block)


def dequantize(codes: Array, scales: Array, block: int = BLOCK) -> Array:
    """The float64 rows that int8 codes and scales stand for."""
    scale: Array = np.repeat(scales, block, 1)[:, : codes.shape[1]]
    return np.multiply(codes, scale, dtype=np.float64)


def weight(form: Form, packed: Array, n: int, k: int) -> Array:
    """The float64 matrix [n, k] that packed weights stand for."""
    codes, scales, minima = unpack(form, packed, n, k)
    scale: Array = np.repeat(scales, form.block, 1)[:, :k].astype(np.float64)
    if form.table:
        # The values are fp32 numbers, as in the kernels.
        return np.array(form.table, np.float32).astype(np.float64)[codes] * scale
    w: Array = (codes.astype(np.float64) - form.center) * scale
    return w if minima is None else w + np.repeat(minima, form.block, 1)[:, :k]


def rms_norm(x: Array, gain: Array, epsilon: float) -> Array:
    """gain * x / sqrt(mean(x**2) + epsilon), rows of float64."""
    x = x.astype(np.float64)
    y: Array = gain * x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return y


def layer_norm(x: Array, gain: Array, shift: Array, epsilon: float) -> Array:
    """gain * (x - mean(x)) / sqrt(variance(x) + epsilon) + shift, rows of float64."""
    x = x.astype(np.float64)
    centred = x - x.mean(-1, keepdims=True)
    y: Array = gain * centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon) + shift
    return y


def gelu(x: Array) -> Array:
    """x / 2 * (1 + erf(x / sqrt(2))), float64."""
    half = np.vectorize(math.erfc, otypes=[np.float64])(-x.astype(np.float64) / math.sqrt(2)) / 2
    y: Array = x * half
    return y


def gelu_tanh(x: Array) -> Array:
    """The same with tanh(sqrt(2 / pi) * (x + 0.044715 x**3)) for erf."""
    x = x.astype(np.float64)
    y: Array = x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return y


def gelu_tanh_multiply(gate_up: Array) -> Array:
    """gelu_tanh(gate) * up, columns of gate and up by turns of 16."""
    gate, up = _gate_and_up(gate_up)
    return gelu_tanh(gate) * up


def relu(x: Array) -> Array:
    """max(x, 0)"""
    return np.maximum(x, 0)


def _gate_and_up(gate_up: Array) -> tuple[Array, Array]:
    pairs = gate_up.astype(np.float64).reshape(gate_up.shape[0], -1, 2, 16)
    gate, up = (pairs[:, :, i].reshape(len(gate_up), -1) for i in range(2))
    return gate, up


def silu_multiply(gate_up: Array) -> Array:
    """gate / (1 + exp(-gate)) * up, columns of gate and up by turns of 16."""
    gate, up = _gate_and_up(gate_up)
    # exp(-gate) overflows below about -709, where the quotient is zero anyway.
    y: Array = gate / (1 + np.exp(np.minimum(-gate, 700))) * up
    return y


def linear(
    form: Form,
    packed: Array,
    n: int,
    x: Array,
    *,
    activations: str = "int8",
    gain: Array | None = None,
    shift: Array | None = None,
    epsilon: float = 1e-5,
    bias: Array | None = None,
    residual: Array | None = None,
    gated: bool = False,
    activation: str = "none",
) -> Array:
    """The operator `Linear`: float64 [m, n], or [m, n / 2] when gated; a layer norm has a shift."""
    w = weight(form, packed, n, x.shape[1])
    if gain is not None and shift is not None:
        x = layer_norm(x, gain, shift, epsilon).astype(np.float32)
    elif gain is not None:
        x = rms_norm(x, gain, epsilon).astype(np.float32)
    rows = x.astype(np.float64)
    if activations == "int8":
        rows = dequantize(*quantize(x, form.block), form.block)
    y: Array = rows @ w.T
    if gated:
        y = gelu_tanh_multiply(y) if activation == "gelu_tanh" else silu_multiply(y)
    if bias is not None:
        y = y + bias
    if activation != "none" and not gated:
        y = {"gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu}[activation](y)
    return y if residual is None else y + residual


def rotate(x: Array, cosines: Array, sines: Array) -> Array:
    """Pairs (i, half + i) of the last axis turned by one angle each, float64."""
    first, second = np.split(x.astype(np.float64), 2, axis=-1)
    return np.concatenate([first * cosines - second * sines, second * cosines + first * sines], -1)


def held(x: Array, cache: Cache) -> Array:
    """What is left of rows [..., width] in a cache, float64."""
    if cache.scaled:
        codes, scales = quantize_rows(x.astype(np.float32))
        return np.multiply(codes, scales[..., None], dtype=np.float64)
    with np.errstate(over="ignore"):
        return x.astype(cache.dtype).astype(np.float64)


def attention(
    qkv: Array,
    past_key: Array,
    past_value: Array,
    lengths: Array,
    cosines: Array | None,
    sines: Array | None,
    query_gain: Array | None = None,
    key_gain: Array | None = None,
    *,
    heads: int,
    window: int = 0,
    cache: Cache = CACHES["fp32"],
    epsilon: float = 1e-5,
) -> tuple[Array, Array, Array]:
    """The operator `Attention` with its caches in plain order [batch, kv_heads, capacity, width].

    `lengths` [batch] counts the positions after this run. Returns y and the caches, float64.
    """

    def normed(rows: Array, gain: Array | None) -> Array:
        """Rows [heads, new, width], by stretches of heads as long as the gain."""
        if gain is None:
            return rows
        flat = rows.swapaxes(0, 1).reshape(-1, len(gain))
        return rms_norm(flat, gain, epsilon).reshape(rows.swapaxes(0, 1).shape).swapaxes(0, 1)

    batch, new, _ = qkv.shape
    kv_heads, width = past_key.shape[1], past_key.shape[3]
    keys, values = past_key.astype(np.float64), past_value.astype(np.float64)
    y = np.zeros((batch, new, heads, width))
    for b in range(batch):
        past = max(0, int(lengths[b]) - new)
        at = slice(past, past + new)
        rows = qkv[b].reshape(new, heads + 2 * kv_heads, width).swapaxes(0, 1)
        queries = normed(rows[:heads], query_gain)
        turned = np.concatenate([queries, normed(rows[heads : heads + kv_heads], key_gain)])
        if cosines is not None and sines is not None:
            turned = rotate(turned, cosines[at], sines[at])
        keys[b, :, at] = held(turned[heads:], cache)
        values[b, :, at] = held(rows[heads + kv_heads :], cache)
        for token in range(new):
            end = past + token + 1
            seen = slice(max(0, end - window) if window else 0, end)
            for head in range(heads):
                group = head // (heads // kv_heads)
                scores = keys[b, group, seen] @ turned[head, token] / np.sqrt(width)
                shares = np.exp(scores - scores.max())
                y[b, token, head] = shares / shares.sum() @ values[b, group, seen]
    return y.reshape(batch, new, heads * width), keys, values


def group_norm(x: Array, groups: int, gain: Array, shift: Array, epsilon: float) -> Array:
    """gain * (x - mean) / sqrt(variance + epsilon) + shift over groups of channels, float64."""
    flat = x.astype(np.float64).reshape(x.shape[0], groups, -1)
    mean, variance = flat.mean(-1, keepdims=True), flat.var(-1, keepdims=True)
    normed = ((flat - mean) / np.sqrt(variance + epsilon)).reshape(x.shape)
    by_channel = (-1, *(1,) * (x.ndim - 2))
    y: Array = normed * gain.reshape(by_channel) + shift.reshape(by_channel)
    return y


def round_patches(patches: Array) -> tuple[Array, Array]:
    """Columns [k, pixels] on 8-bit scales: the values that the codes stand for, and the scales.

    A column's step is its range, zero included, over 252, and at least 1e-30 / 252.
    """
    low, high = np.minimum(patches.min(0), 0), np.maximum(patches.max(0), 0)
    patches, low, high = (values.astype(np.float32) for values in (patches, low, high))
    span = np.maximum((high - low).astype(np.float32), TINY)
    inverse = np.float32(252) / span
    zero = np.rint(2 - (low * inverse).astype(np.float64))
    codes = np.rint(patches.astype(np.float64) * inverse + zero)
    scales = span.astype(np.float64) / 252
    return (codes - zero) * scales, scales


def conv(
    w: Array,
    x: Array,
    *,
    pads: tuple[int, ...],
    dilations: tuple[int, ...],
    bias: Array | None = None,
    residual: Array | None = None,
    norm: tuple[int, Array, Array, float] | None = None,
    film: Array | None = None,
    activation: str = "",
    alpha: float = 0.01,
) -> tuple[Array, Array]:
    """The operator `Conv` with weights [n, channels, ...], float64, and what its rounding may do.

    `norm` is groups, gain, shift, epsilon. The second array, shaped as the first, bounds how far
    off y may be where sums in fp32 move a value to be rounded across a half.
    """
    spatial = w.ndim - 2
    by_channel = (*x.shape[:2], *(1,) * spatial)
    x = x.astype(np.float64) if norm is None else group_norm(x, *norm)
    if film is not None:
        scale, shift = np.split(film.astype(np.float64), 2, axis=1)
        x = x * (1 + scale.reshape(by_channel)) + shift.reshape(by_channel)
    if activation == "silu":
        x = x / (1 + np.exp(np.minimum(-x, 700)))
    elif activation == "leaky_relu":
        x = np.maximum(x, alpha * x)
    around = list(zip(pads[:spatial], pads[spatial:], strict=True))
    x = np.pad(x.astype(np.float32), [(0, 0), (0, 0), *around])
    size = [
        length - step * (kernel - 1)
        for length, step, kernel in zip(x.shape[2:], dilations, w.shape[2:], strict=True)
    ]
    taps = [
        x[(slice(None), slice(None), *(
            slice(step * at, step * at + length)
            for step, at, length in zip(dilations, tap, size, strict=True)
        ))]
        for tap in np.ndindex(*w.shape[2:])
    ]  # fmt: skip
    flat = w.reshape(w.shape[0], -1)
    y, step = [], []
    for patches in np.stack(taps, 2).reshape(len(x), flat.shape[1], -1):
        rounded, scales = round_patches(patches)
        y.append((flat @ rounded).reshape(-1, *size))
        step.append((np.abs(flat).max(1)[:, None] * scales).reshape(-1, *size))
    result = np.stack(y)
    if bias is not None:
        result = result + bias.reshape(-1, *(1,) * spatial)
    return result if residual is None else result + residual, np.stack(step)


def pixel_attention(qkv: Array, heads: int, scale: float) -> Array:
    """The operator `PixelAttention` on [batch, 3 * channels, pixels], float64, rounded as it does.

    Keys have a scale each, values one for each channel of 32 pixels; queries and softmaxes are
    rounded as patches, the latter on the scale of their largest entry.
    """
    batch, all_channels, pixels = qkv.shape
    width = all_channels // 3 // heads
    parts = qkv.reshape(batch, 3, heads, width, pixels)
    y = np.zeros((batch, heads, width, pixels))
    for b, head in np.ndindex(batch, heads):
        q, k, v = parts[b, :, head]
        queries, _ = round_patches(q)
        keys = symmetric(k.T, width).T
        scores = (keys.T @ queries) * scale
        shares = np.exp(scores - scores.max(0))
        rounded = np.rint(shares * 252) / 252
        y[b, head] = symmetric(v, BLOCK) @ rounded / shares.sum(0)
    return y.reshape(batch, heads * width, pixels)


def symmetric(x: Array, block: int) -> Array:
    """Rows rounded to int8 in blocks of columns, as what the codes stand for."""
    rounded = []
    for at in range(0, x.shape[1], block):
        part = x[:, at : at + block]
        largest = np.maximum(np.abs(part).max(1, keepdims=True), TINY)
        codes = np.rint(part * (np.float32(127) / largest))
        rounded.append(codes * (largest.astype(np.float64) / 127))
    return np.concatenate(rounded, 1)
