"""Linear layers on packed weights: y[m, n] = x[m, k] @ w[n, k]^T.

One kernel for each form of weights, kind of activations and tile. A tile is 16 rows of weights by
TOKENS rows of activations, all in registers: each weight is loaded and unpacked once a tile.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from leangen_kernels.dots import (
    byte_dot,
    byte_start,
    code_0,
    code_1,
    code_2,
    code_3,
    high_nibbles,
    low_nibbles,
    nibble_dot,
    nibble_finish,
    nibble_start,
)
from leangen_kernels.layout import BLOCK, FORMS, FP32_BLOCK_BYTES, INT8_BLOCK_BYTES, ROWS
from leangen_kernels.simd import (
    load_bytes,
    load_floats,
    load_for_all,
    load_halves,
    load_int,
    multiply_add,
    prefetch,
    splat,
    store_first_floats,
    store_floats,
    to_floats,
)
from leangen_kernels.unroll import registers, static, unrolled
from leangen_kernels.vectors import VARIANT

TILES = (1, 2, 4, 8)
FP32_TILES = (1, 4)
"""Tokens per tile. The caller chooses the tile, and need not fill the last one."""

# How far ahead of the codes being used to ask for more. One row of activations is over so fast
# that the prefetcher of older hardware does not keep memory busy; that of newer one does better.
_AHEAD = 1536
_PREFETCH = VARIANT.dot != "vnni512"

# What a form and a tile fix, see `_specialized`.
BITS = CODE_BYTES = TOKENS = 0
MINIMUM = False


def int8(
    x: int, w: int, blocks: int, y: int, y_stride: int, tokens: int, n: int, first: int,
    last: int, wide: int,
) -> None:  # fmt: skip
    """Groups `first` to `last` of the outputs, from activations of int8 blocks.

    `x` is the address of packed tiles of TOKENS rows, `w` that of the whole packed matrix, `y` that
    of output [0, 0]; `y_stride` is in bytes. `wide` is 1 where scales are fp32, else 0.
    """
    total, partial, start = registers(), registers(), registers()
    block_bytes = CODE_BYTES + (1 + MINIMUM) * 2 * ROWS * (1 + wide)
    for group in range(first, last):
        rows = n - ROWS * group
        for token in range(0, tokens, TOKENS):
            codes_at = w + group * blocks * block_bytes
            for t in static(TOKENS):
                total[t] = splat(0.0)
            x_at = x + token * blocks * INT8_BLOCK_BYTES
            for _ in range(blocks):
                if TOKENS == 1 and _PREFETCH:
                    for line in static((CODE_BYTES + 127) // 64):
                        prefetch(codes_at, _AHEAD + 64 * line)
                for t in static(TOKENS):
                    if MINIMUM:
                        start[t] = 0
                    else:
                        start[t] = load_int(x_at, INT8_BLOCK_BYTES * t + BLOCK + 4)
                    if BITS == 4:
                        partial[t] = nibble_start(start[t])
                    else:
                        partial[t] = byte_start(start[t])
                if BITS == 4:
                    for j in static(4):
                        codes = load_bytes(codes_at, 64 * j)
                        low, high = low_nibbles(codes), high_nibbles(codes)
                        for t in static(TOKENS):
                            partial[t] = nibble_dot(
                                partial[t], low, x_at, INT8_BLOCK_BYTES * t + 8 * j
                            )
                            partial[t] = nibble_dot(
                                partial[t], high, x_at, INT8_BLOCK_BYTES * t + 8 * j + 4
                            )
                else:
                    for j in static(8):
                        codes = load_bytes(codes_at, 64 * j)
                        for t in static(TOKENS):
                            partial[t] = byte_dot(
                                partial[t], codes, x_at, INT8_BLOCK_BYTES * t + 4 * j
                            )
                if wide:
                    scale = load_floats(codes_at, CODE_BYTES)
                else:
                    scale = load_halves(codes_at, CODE_BYTES)
                for t in static(TOKENS):
                    both = scale * load_for_all(x_at, INT8_BLOCK_BYTES * t + BLOCK)
                    if BITS == 4:
                        product = to_floats(nibble_finish(partial[t], start[t]))
                    else:
                        product = to_floats(partial[t])
                    total[t] = multiply_add(both, product, total[t])
                if MINIMUM:
                    if wide:
                        minimum = load_floats(codes_at, CODE_BYTES + 4 * ROWS)
                    else:
                        minimum = load_halves(codes_at, CODE_BYTES + 2 * ROWS)
                    for t in static(TOKENS):
                        sums = load_for_all(x_at, INT8_BLOCK_BYTES * t + BLOCK + 4)
                        total[t] = multiply_add(minimum, sums, total[t])
                codes_at += block_bytes
                x_at += INT8_BLOCK_BYTES * TOKENS
            for t in static(TOKENS):
                if token + t < tokens:
                    at = y + (token + t) * y_stride + 4 * ROWS * group
                    if rows >= ROWS:
                        store_floats(at, total[t])
                    else:
                        store_first_floats(at, total[t], rows)


def fp32(
    x: int, w: int, blocks: int, y: int, y_stride: int, tokens: int, n: int, first: int,
    last: int, wide: int,
) -> None:  # fmt: skip
    """The same from fp32 activations, which are not rounded at all."""
    total, product = registers(), registers()
    block_bytes = CODE_BYTES + (1 + MINIMUM) * 2 * ROWS * (1 + wide)
    for group in range(first, last):
        rows = n - ROWS * group
        for token in range(0, tokens, TOKENS):
            codes_at = w + group * blocks * block_bytes
            for t in static(TOKENS):
                total[t] = splat(0.0)
            x_at = x + token * blocks * FP32_BLOCK_BYTES
            for _ in range(blocks):
                for t in static(TOKENS):
                    if MINIMUM:
                        product[t] = splat(0.0)
                    else:
                        product[t] = load_for_all(x_at, FP32_BLOCK_BYTES * t + 4 * BLOCK)
                for j in static(8):
                    if BITS == 8:
                        four = load_bytes(codes_at, 64 * j)
                    elif j % 2 == 0:
                        four = low_nibbles(load_bytes(codes_at, 32 * j))
                    else:
                        four = high_nibbles(load_bytes(codes_at, 32 * j - 32))
                    w_0, w_1, w_2, w_3 = code_0(four), code_1(four), code_2(four), code_3(four)
                    for t in static(TOKENS):
                        at = x_at + FP32_BLOCK_BYTES * t
                        product[t] = multiply_add(w_0, load_for_all(at, 16 * j), product[t])
                        product[t] = multiply_add(w_1, load_for_all(at, 16 * j + 4), product[t])
                        product[t] = multiply_add(w_2, load_for_all(at, 16 * j + 8), product[t])
                        product[t] = multiply_add(w_3, load_for_all(at, 16 * j + 12), product[t])
                if wide:
                    scale = load_floats(codes_at, CODE_BYTES)
                else:
                    scale = load_halves(codes_at, CODE_BYTES)
                for t in static(TOKENS):
                    total[t] = multiply_add(scale, product[t], total[t])
                if MINIMUM:
                    if wide:
                        minimum = load_floats(codes_at, CODE_BYTES + 4 * ROWS)
                    else:
                        minimum = load_halves(codes_at, CODE_BYTES + 2 * ROWS)
                    for t in static(TOKENS):
                        sums = load_for_all(x_at, FP32_BLOCK_BYTES * t + 4 * BLOCK)
                        total[t] = multiply_add(minimum, sums, total[t])
                codes_at += block_bytes
                x_at += FP32_BLOCK_BYTES * TOKENS
            for t in static(TOKENS):
                if token + t < tokens:
                    at = y + (token + t) * y_stride + 4 * ROWS * group
                    if rows >= ROWS:
                        store_floats(at, total[t])
                    else:
                        store_first_floats(at, total[t], rows)


def kernels() -> dict[str, tuple[Callable[..., Any], str]]:
    """Name of each kernel -> what makes its function, and the C types of its arguments."""
    found: dict[str, tuple[Callable[..., Any], str]] = {}
    for form in FORMS.values():
        if form.wide:
            continue
        for kernel, tiles in ((int8, TILES), (fp32, FP32_TILES)):
            for tile in tiles:
                make = partial(
                    unrolled,
                    kernel,
                    BITS=form.bits,
                    MINIMUM=form.minimum,
                    CODE_BYTES=form.code_bytes,
                    TOKENS=tile,
                    _PREFETCH=_PREFETCH,
                    BLOCK=BLOCK,
                    ROWS=ROWS,
                    INT8_BLOCK_BYTES=INT8_BLOCK_BYTES,
                    FP32_BLOCK_BYTES=FP32_BLOCK_BYTES,
                )
                found[f"{kernel.__name__}_{form.kernel}_{tile}"] = (make, "i" * 10)
    return found
