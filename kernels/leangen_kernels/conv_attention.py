"""What attention between pixels needs besides convolution's kernels.

Queries and softmaxes are tiles of VECTORS times 16 pixels, rounded as patches are: lanes are the
pixels that attend. Keys and values are rounded as weights are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from leangen_kernels.conv import LEVELS, LOG2_E
from leangen_kernels.conv_layout import OUTPUTS
from leangen_kernels.conv_simd import (
    CENTER,
    activation_dot,
    exponential_of_2,
    join_bytes,
    join_codes,
    store_bytes,
)
from leangen_kernels.layout import ROWS
from leangen_kernels.rows import TINY
from leangen_kernels.simd import (
    ROUNDER,
    larger,
    larger_magnitude,
    largest_magnitude,
    load_bytes,
    load_first_floats,
    load_floats,
    load_for_all,
    load_int,
    multiply_add,
    round_to_ints,
    splat,
    splat_int,
    store_float,
    store_floats,
    store_int,
    store_ints_as_bytes,
    sum_ints,
    to_floats,
)
from leangen_kernels.unroll import registers, static, unrolled

VECTORS = 2
"""Vectors of 16 pixels side by side."""

BLOCK = 32
"""Pixels of a channel's values that share a scale."""


def round_keys(
    x: int, x_stride: int, width: int, keys: int, codes: int, numbers: int, factor: float
) -> None:
    """Keys on a scale each: 16 side by side as bytes [fours, 16, 4], then the next 16.

    `x` is [width, keys] with `x_stride` bytes from one row to the next. `numbers` gets the scales
    of each 16 keys, times `factor`, then what their codes sum to, times that.
    """
    value = registers()
    for first in range(0, keys, ROWS):
        left = keys - first
        most, at = splat(TINY), x + 4 * first
        for _ in range(width):
            most = larger_magnitude(most, load_first_floats(at, left))
            at += x_stride
        inverse, total, at = splat(127.0) / most, splat(0.0), x + 4 * first
        for c in range(0, width, 4):
            for i in static(4):
                value[i] = splat(ROUNDER)
                if c + i < width:
                    value[i] = load_first_floats(at, left) * inverse + splat(ROUNDER)
                total = total + (value[i] - splat(ROUNDER))
                at += x_stride
            store_bytes(codes, join_bytes(value[0], value[1], value[2], value[3]))
            codes += 4 * ROWS
        scale = most * splat(factor / 127.0)
        store_floats(numbers, scale)
        store_floats(numbers + 4 * ROWS, scale * total)
        numbers += 8 * ROWS


def round_values(
    x: int, x_stride: int, width: int, keys: int, codes: int, numbers: int, room: int
) -> None:
    """Values as the weights of a convolution with `width` outputs, as conv_layout.py says.

    `x` is as in `round_keys`, a block is BLOCK keys; `room` is for BLOCK bytes.
    """
    given = registers()
    fours, blocks = (keys + 3) // 4, (keys + BLOCK - 1) // BLOCK
    for c in range(width):
        group, within = c // OUTPUTS, c % OUTPUTS
        to = codes + (group * fours * OUTPUTS + within) * 4
        number = numbers + (group * (blocks + 1) * OUTPUTS + within) * 4
        total = 0.0
        for first in range(0, keys, BLOCK):
            most = splat(TINY)
            for i in static(BLOCK // ROWS):
                at = first + ROWS * i
                given[i] = load_first_floats(x + 4 * at, keys - at)
                most = larger_magnitude(most, given[i])
            largest = largest_magnitude(most)
            inverse, sums = splat(127.0 / largest), splat_int(0)
            for i in static(BLOCK // ROWS):
                rounded = round_to_ints(given[i] * inverse)
                sums = sums + rounded
                store_ints_as_bytes(room + ROWS * i, rounded)
            for i in range(min(BLOCK // 4, fours - first // 4)):
                store_int(to, load_int(room, 4 * i))
                to += 4 * OUTPUTS
            scale = largest / 127.0
            store_float(number, scale)
            number += 4 * OUTPUTS
            total += scale * sum_ints(sums)
        store_float(number, total)
        x += x_stride


def scores(
    queries: int, scales: int, codes: int, numbers: int, fours: int, keys: int, y: int, peak: int
) -> None:
    """Products of a tile of queries with each key, over the queries' scales, and the largest.

    `queries` and `scales` are as `pack_patches` left them, `codes` and `numbers` as `round_keys`
    did. `y` is [keys up to a multiple of 4, VECTORS * 16], its last rows are -1e30.
    """
    part, four, most, zero = registers(), registers(), registers(), registers()
    for v in static(VECTORS):
        most[v] = splat(-1e30)
        zero[v] = splat(0.0) - load_floats(scales, 8 * ROWS * v + 4 * ROWS)
    for first in range(0, keys, 4):
        at, code = queries, codes + first // ROWS * fours * 4 * ROWS + first % ROWS * 4
        number = numbers + 8 * ROWS * (first // ROWS) + first % ROWS * 4
        for k in static(4):
            for v in static(VECTORS):
                part[k, v] = splat_int(0)
        for _ in range(fours):
            for v in static(VECTORS):
                four[v] = load_bytes(at, 4 * ROWS * v)
            for k in static(4):
                for v in static(VECTORS):
                    part[k, v] = activation_dot(part[k, v], four[v], code, 4 * k)
            at += 4 * ROWS * VECTORS
            code += 4 * ROWS
        for k in static(4):
            scale, more = load_for_all(number, 4 * k), load_for_all(number, 4 * k + 4 * ROWS)
            for v in static(VECTORS):
                value = multiply_add(to_floats(part[k, v]), scale, zero[v] * more)
                if first + k >= keys:
                    value = splat(-1e30)
                most[v] = larger(value, most[v])
                store_floats(y + 4 * ROWS * (VECTORS * k + v), value)
        y += 4 * ROWS * VECTORS * 4
    for v in static(VECTORS):
        store_floats(peak + 4 * ROWS * v, most[v])


def shares(scores: int, peak: int, scales: int, fours: int, out: int) -> None:
    """Softmax down the columns of four times `fours` rows: exp(scale * (score - peak)) as patches.

    They stay over their sum: `scales`, those of the queries, become the scales of the patches
    divided by it and the codes that stand for zero.
    """
    factor, most, total, code = registers(), registers(), registers(), registers()
    zero = splat(2.0 + ROUNDER)
    for v in static(VECTORS):
        factor[v] = load_floats(scales, 8 * ROWS * v) * splat(LOG2_E)
        most[v] = load_floats(peak, 4 * ROWS * v)
        total[v] = splat(0.0)
    for _ in range(fours):
        for v in static(VECTORS):
            for k in static(4):
                score = load_floats(scores, 4 * ROWS * (VECTORS * k + v))
                share = exponential_of_2((score - most[v]) * factor[v])
                total[v] = total[v] + share
                code[k] = multiply_add(share, splat(LEVELS), zero)
            store_bytes(out + 4 * ROWS * v, join_codes(code[0], code[1], code[2], code[3]))
        scores += 4 * ROWS * VECTORS * 4
        out += 4 * ROWS * VECTORS
    for v in static(VECTORS):
        store_floats(scales + 8 * ROWS * v, splat(1.0 / LEVELS) / total[v])
        store_floats(scales + 8 * ROWS * v + 4 * ROWS, splat(2.0 - CENTER))


def kernels() -> dict[str, tuple[Callable[..., Any], str]]:
    """Name of each kernel -> what makes its function, and the C types of its arguments."""
    fixed = {
        "ROWS": ROWS, "VECTORS": VECTORS, "BLOCK": BLOCK, "OUTPUTS": OUTPUTS,
        "TINY": TINY, "LEVELS": LEVELS, "CENTER": CENTER, "LOG2_E": LOG2_E, "ROUNDER": ROUNDER,
    }  # fmt: skip
    return {
        "round_keys": (partial(unrolled, round_keys, **fixed), "i" * 6 + "d"),
        "round_values": (partial(unrolled, round_values, **fixed), "i" * 7),
        "scores": (partial(unrolled, scores, **fixed), "i" * 8),
        "shares": (partial(unrolled, shares, **fixed), "i" * 5),
    }
