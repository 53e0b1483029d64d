"""What is done to one row of activations before and after a linear layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from leangen_kernels.layout import BLOCK, ROWS
from leangen_kernels.simd import (
    exponential,
    larger_magnitude,
    largest_magnitude,
    load_first_floats,
    load_floats,
    multiply_add,
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
)
from leangen_kernels.unroll import unrolled

TINY = 1e-30
"""A block whose largest magnitude is below this counts as zero: its inverse would overflow."""


def quantize(x: int, row: int, stride: int, k: int, center: int) -> None:
    """An activation row of int8 blocks from k floats: codes are x / scale, ties to even.

    `stride` is the bytes from one block of the row to its next.
    """
    blocks = (k + BLOCK - 1) // BLOCK
    for block in range(blocks):
        at = x + 4 * BLOCK * block
        left = k - BLOCK * block
        if left >= BLOCK:
            first, second = load_floats(at, 0), load_floats(at, 4 * ROWS)
        else:
            first = load_first_floats(at, left)
            second = load_first_floats(at + 4 * ROWS, left - ROWS)
        largest = largest_magnitude(larger_magnitude(first, second))
        scale, inverse = largest / 127.0, 127.0 / largest
        if largest < TINY:
            scale, inverse = 0.0, 0.0
        codes = round_to_ints(first * splat(inverse))
        store_ints_as_bytes(row, codes)
        more = round_to_ints(second * splat(inverse))
        store_ints_as_bytes(row + ROWS, more)
        total = sum_ints(codes + more)
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
        if left >= BLOCK:
            first, second = load_floats(at, 0), load_floats(at, 4 * ROWS)
        else:
            first = load_first_floats(at, left)
            second = load_first_floats(at + 4 * ROWS, left - ROWS)
        store_floats(row, first)
        store_floats(row + 4 * ROWS, second)
        store_float(row + 4 * BLOCK, factor * sum_floats(first + second))
        row += stride


def rms_norm(x: int, gain: int, y: int, k: int, epsilon: float) -> None:
    """y = gain * x / sqrt(mean(x**2) + epsilon) (Zhang and Sennrich 2019)."""
    total, more = splat(0.0), splat(0.0)
    whole = k // BLOCK * BLOCK
    for i in range(0, whole, BLOCK):
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
    return {
        "quantize": (partial(unrolled, quantize), "iiiii"),
        "keep": (partial(unrolled, keep), "iiiii"),
        "rms_norm": (partial(unrolled, rms_norm), "iiiid"),
        "narrow_fp16": (partial(unrolled, narrow_fp16), "iii"),
        "narrow_int8": (partial(unrolled, narrow_int8), "iii"),
        "add": (partial(unrolled, add), "iii"),
        "rotate": (partial(unrolled, rotate), "iiiiid"),
        "silu_multiply": (partial(unrolled, silu_multiply), "iii"),
    }
