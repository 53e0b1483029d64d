"""What is done to one row of activations before and after a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from leangen_kernels.layout import BLOCKS, ROWS
from leangen_kernels.simd import (
    exponential,
    larger,
    larger_magnitude,
    largest_magnitude,
    load_first_floats,
    load_floats,
    magnitude,
    multiply_add,
    only_first,
    round_to_ints,
    splat,
    square_root,
    store_first_floats,
    store_float,
    store_floats,
    store_halves,
    store_int,
    store_ints_as_bytes,
    sum_floats,
    sum_ints,
    where_negative,
)
from leangen_kernels.unroll import registers, static, unrolled

TINY = 1e-30
"""A block whose largest magnitude is below this counts as zero: its inverse would overflow."""

# How many activations share a scale, see `kernels`.
BLOCK = 0


def quantize(x: int, row: int, stride: int, k: int, center: int) -> None:
    """An activation row of int8 blocks from k floats: codes are x / scale, ties to even.

    `stride` is the bytes from one block of the row to its next.
    """
    given, codes = registers(), registers()
    blocks = (k + BLOCK - 1) // BLOCK
    for block in range(blocks):
        at = x + 4 * BLOCK * block
        left = k - BLOCK * block
        for i in static(BLOCK // ROWS):
            if left >= BLOCK:
                given[i] = load_floats(at, 4 * ROWS * i)
            else:
                given[i] = load_first_floats(at + 4 * ROWS * i, left - ROWS * i)
        most = given[0]
        for i in static(1, BLOCK // ROWS):
            most = larger_magnitude(most, given[i])
        largest = largest_magnitude(most)
        scale, inverse = largest / 127.0, 127.0 / largest
        if largest < TINY:
            scale, inverse = 0.0, 0.0
        for i in static(BLOCK // ROWS):
            codes[i] = round_to_ints(given[i] * splat(inverse))
            store_ints_as_bytes(row + ROWS * i, codes[i])
        sums = codes[0]
        for i in static(1, BLOCK // ROWS):
            sums = sums + codes[i]
        total = sum_ints(sums)
        store_float(row + BLOCK, scale)
        if center == 0:
            store_float(row + BLOCK + 4, scale * total)
        else:
            store_int(row + BLOCK + 4, -center * total)
        row += stride


def keep(x: int, row: int, stride: int, k: int, center: int) -> None:
    """An activation row of floats, else like `quantize`."""
    blocks = (k + BLOCK - 1) // BLOCK
    factor = -center if center else 1
    for block in range(blocks):
        at = x + 4 * BLOCK * block
        left = k - BLOCK * block
        total = splat(0.0)
        for i in static(BLOCK // ROWS):
            if left >= BLOCK:
                given = load_floats(at, 4 * ROWS * i)
            else:
                given = load_first_floats(at + 4 * ROWS * i, left - ROWS * i)
            store_floats(row + 4 * ROWS * i, given)
            total = total + given
        store_float(row + 4 * BLOCK, factor * sum_floats(total))
        row += stride


def rms_norm(x: int, gain: int, y: int, k: int, epsilon: float) -> None:
    """y = gain * x / sqrt(mean(x**2) + epsilon) (Zhang and Sennrich 2019)."""
    total, more = splat(0.0), splat(0.0)
    whole = k // (2 * ROWS) * 2 * ROWS
    for i in range(0, whole, 2 * ROWS):
        first, second = load_floats(x + 4 * i, 0), load_floats(x + 4 * i, 4 * ROWS)
        total = multiply_add(first, first, total)
        more = multiply_add(second, second, more)
    for i in range(whole, k, ROWS):
        first = load_first_floats(x + 4 * i, k - i)
        total = multiply_add(first, first, total)
    factor = splat(1.0 / square_root(sum_floats(total + more) / k + epsilon))
    for i in range(0, k, ROWS):
        if k - i >= ROWS:
            value = load_floats(x + 4 * i, 0) * factor * load_floats(gain + 4 * i, 0)
            store_floats(y + 4 * i, value)
        else:
            value = load_first_floats(x + 4 * i, k - i) * factor
            value = value * load_first_floats(gain + 4 * i, k - i)
            store_first_floats(y + 4 * i, value, k - i)


def layer_norm(x: int, gain: int, shift: int, y: int, k: int, epsilon: float) -> None:
    """y = gain * (x - mean(x)) / sqrt(variance(x) + epsilon) + shift (Ba et al. 2016)."""
    total = splat(0.0)
    for i in range(0, k, ROWS):
        total = total + load_first_floats(x + 4 * i, k - i)
    mean = splat(sum_floats(total) / k)
    total = splat(0.0)
    for i in range(0, k, ROWS):
        value = only_first(load_first_floats(x + 4 * i, k - i) - mean, k - i)
        total = multiply_add(value, value, total)
    factor = splat(1.0 / square_root(sum_floats(total) / k + epsilon))
    for i in range(0, k, ROWS):
        value = (load_first_floats(x + 4 * i, k - i) - mean) * factor
        value = value * load_first_floats(gain + 4 * i, k - i)
        value = value + load_first_floats(shift + 4 * i, k - i)
        store_first_floats(y + 4 * i, value, k - i)


def add(x: int, y: int, n: int) -> None:
    """y += x"""
    for i in range(0, n, ROWS):
        if n - i >= ROWS:
            store_floats(y + 4 * i, load_floats(y + 4 * i, 0) + load_floats(x + 4 * i, 0))
        else:
            value = load_first_floats(y + 4 * i, n - i) + load_first_floats(x + 4 * i, n - i)
            store_first_floats(y + 4 * i, value, n - i)


def silu_multiply(gate_up: int, y: int, n: int) -> None:
    """y = gate / (1 + exp(-gate)) * up, gate and up by turns of 16 (see `interleave_gate_up`)."""
    for i in range(0, n, ROWS):
        gate, up = load_floats(gate_up + 8 * i, 0), load_floats(gate_up + 8 * i, 4 * ROWS)
        value = gate / (splat(1.0) + exponential(splat(0.0) - gate)) * up
        if n - i >= ROWS:
            store_floats(y + 4 * i, value)
        else:
            store_first_floats(y + 4 * i, value, n - i)


# erf(x) = 1 - (a_1 t + ... + a_5 t**5) exp(-x**2), t = 1 / (1 + p x), to 1.5e-7 for x >= 0
# (Abramowitz and Stegun 7.1.26).
_ERF_P = 0.3275911
_ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def gelu(y: int, n: int) -> None:
    """y = y / 2 * (1 + erf(y / sqrt(2))) (Hendrycks and Gimpel 2016)."""
    one = splat(1.0)
    for i in range(0, n, ROWS):
        x = load_first_floats(y + 4 * i, n - i)
        z = magnitude(x) * splat(0.7071067811865476)
        t = one / (one + splat(_ERF_P) * z)
        value = splat(0.0)
        for term in static(5):
            value = multiply_add(value, t, splat(_ERF[term]))
        tail = value * t * exponential(splat(0.0) - z * z) * splat(0.5)
        # One side of the bell has the tail, the other the rest.
        store_first_floats(y + 4 * i, x * where_negative(x, tail, one - tail), n - i)


def gelu_tanh(y: int, n: int) -> None:
    """The same with tanh(sqrt(2 / pi) * (y + 0.044715 y**3)) for erf."""
    one = splat(1.0)
    for i in range(0, n, ROWS):
        x = load_first_floats(y + 4 * i, n - i)
        inner = x * multiply_add(splat(0.044715) * x, x, one)
        value = x / (one + exponential(splat(-1.5957691216057308) * inner))
        store_first_floats(y + 4 * i, value, n - i)


def gelu_tanh_multiply(gate_up: int, y: int, n: int) -> None:
    """Like `silu_multiply`, with gelu_tanh of the gate (GEGLU, Shazeer 2020)."""
    one = splat(1.0)
    for i in range(0, n, ROWS):
        gate, up = load_floats(gate_up + 8 * i, 0), load_floats(gate_up + 8 * i, 4 * ROWS)
        inner = gate * multiply_add(splat(0.044715) * gate, gate, one)
        value = gate / (one + exponential(splat(-1.5957691216057308) * inner)) * up
        store_first_floats(y + 4 * i, value, n - i)


def relu(y: int, n: int) -> None:
    """y = max(y, 0)"""
    for i in range(0, n, ROWS):
        value = larger(load_first_floats(y + 4 * i, n - i), splat(0.0))
        store_first_floats(y + 4 * i, value, n - i)


def rotate(x: int, y: int, cosines: int, sines: int, half: int, factor: float) -> None:
    """y = factor * x rotated: pairs are (i, half + i), one angle each (Su et al. 2021)."""
    scale = splat(factor)
    for i in range(0, half, ROWS):
        left = half - i
        cosine = load_first_floats(cosines + 4 * i, left) * scale
        sine = load_first_floats(sines + 4 * i, left) * scale
        first = load_first_floats(x + 4 * i, left)
        second = load_first_floats(x + 4 * (half + i), left)
        store_first_floats(y + 4 * i, first * cosine - second * sine, left)
        store_first_floats(y + 4 * (half + i), second * cosine + first * sine, left)


def narrow_fp16(x: int, y: int, n: int) -> None:
    """y = x in fp16; n is a multiple of 16."""
    for i in range(0, n, ROWS):
        store_halves(y + 2 * i, load_floats(x + 4 * i, 0))


def narrow_int8(x: int, y: int, n: int) -> None:
    """y = int8 codes of x, then their one scale; n is a multiple of 16."""
    most = splat(0.0)
    for i in range(0, n, ROWS):
        most = larger_magnitude(most, load_floats(x + 4 * i, 0))
    largest = largest_magnitude(most)
    scale, inverse = largest / 127.0, 127.0 / largest
    if largest < TINY:
        scale, inverse = 0.0, 0.0
    for i in range(0, n, ROWS):
        store_ints_as_bytes(y + i, round_to_ints(load_floats(x + 4 * i, 0) * splat(inverse)))
    store_float(y + n, scale)


def kernels() -> dict[str, tuple[Callable[..., Any], str]]:
    """Name of each kernel -> what makes its function, and the C types of its arguments."""
    blocked = {
        kernel.__name__ + ("" if block == 32 else f"_{block}"): (
            partial(unrolled, kernel, BLOCK=block, ROWS=ROWS),
            "iiiii",
        )
        for kernel in (quantize, keep)
        for block in BLOCKS
    }
    return {
        **blocked,
        "layer_norm": (partial(unrolled, layer_norm), "iiiiid"),
        "gelu": (partial(unrolled, gelu, _ERF=_ERF), "ii"),
        "gelu_tanh": (partial(unrolled, gelu_tanh), "ii"),
        "gelu_tanh_multiply": (partial(unrolled, gelu_tanh_multiply), "iii"),
        "relu": (partial(unrolled, relu), "ii"),
        "rms_norm": (partial(unrolled, rms_norm), "iiiid"),
        "narrow_fp16": (partial(unrolled, narrow_fp16), "iii"),
        "narrow_int8": (partial(unrolled, narrow_int8), "iii"),
        "add": (partial(unrolled, add), "iii"),
        "rotate": (partial(unrolled, rotate), "iiiiid"),
        "silu_multiply": (partial(unrolled, silu_multiply), "iii"),
    }
