"""Matrix products with low-bit weights on the tensor core, for any number of rows.

One warp makes 16 or 32 rows of weights times 8, 16 or 32 tokens. The warps of a block share out the
units along k (few tokens: the weights are read once, by as many loads in flight as there are) or
take tiles of their own (many tokens).

What moves, for W4 at M = 1 on an H100: 16 weights' rows are K / 2 bytes each plus scales, once, in
16-byte loads that a warp's lanes make of one 512-byte stretch (four sectors of each of four lines,
none wasted). To keep 3.35 TB/s over ~700 ns busy each of 132 multiprocessors must have 18 kB on the
way; 16 warps that hold one unit and wait for two have 41 kB. The activations come from L1 and L2:
2 K bytes for each block, where the weights are 8 K. Lanes of absent tokens read the last one's
address, so that costs no more. A unit of 2048 weights is 131 instructions of a warp (`sm_90`'s
machine code; 137 with int8, 120 and 124 with a gate): 2 lane instructions a weight, where memory
speed leaves time for about 5.

Weights become halves exactly (codes less their center); scales multiply fp32 sums of blocks.
Products of 8-bit codes and activations are exact in int32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numba import cuda, float32, uint32

from leangen_kernels.cuda.instructions import (
    Kernel,
    add_block_a8,
    add_block_a16,
    as_float,
    byte,
    bytes_of_nibbles,
    floats_of_halves,
    fused,
    gelu_tanh,
    half_pair,
    halves_of_bytes,
    halves_of_nibbles,
    halves_of_nibbles_0,
    most,
    read4f,
    read8,
    read16,
    read16f,
    read_scale_sum,
    read_scales_sums,
    silu,
    stream8,
    stream16,
    to_float,
    write4f,
    write16,
)
from leangen_kernels.unroll import inlined, registers, static, unrolled

KINDS = {
    "q4": (4, 0, 0, 8, 0), "q4_wide": (4, 0, 0, 8, 1), "q4_min": (4, 1, 0, 0, 0),
    "q4_min_wide": (4, 1, 0, 0, 1), "q8": (8, 0, 0, 128, 0), "q8_wide": (8, 0, 0, 128, 1),
    "table": (4, 0, 1, 0, 1),
}  # fmt: skip
"""Bits, whether there are minima, whether codes index a table, the code that stands for 0, and
whether scales are fp32."""

SHAPES = ((1, 1, 8, 3), (2, 1, 4, 3), (2, 2, 4, 2), (2, 4, 4, 1))
"""Tiles of 16 rows, and of 8 tokens, of a warp; warps of a block; how many units a warp has asked
for or holds. The last, for many tokens, is bound by arithmetic: it asks for none ahead."""


def _linear(
    x: Any, x_scales: Any, x_sums: Any, w: Any, table: Any, y: Any, bias: Any, residual: Any,
    tokens: Any, n: Any, units: Any, row_shift: Any, parts: Any, stride: Any, gated: Any,
    curve: Any,
) -> None:  # fmt: skip
    """What one warp makes of y.

    A block's warps lie along 2^row_shift tiles of rows; the `parts` of one tile share out its units
    along k, each next one `stride` bytes on.
    """
    T = C = BITS = MIN = WIDE = TABLE = HALF = WARPS = DEPTH = registers()
    word, raw, low = registers()
    a, b, total, s, m, xs, xi, w_at, x_at, number_at = registers()
    lane = np.int64(cuda.threadIdx.x) & 31
    warp = np.int64(cuda.threadIdx.x) >> 5
    g = lane >> 2
    t = lane & 3
    part = warp >> row_shift
    tiles = (n + 15) >> 4
    first = ((np.int64(cuda.blockIdx.x) << row_shift) + (warp & ((1 << row_shift) - 1))) * T
    token0 = np.int64(cuda.blockIdx.y) * (8 * C)
    unit = 256 * BITS + (128 << (MIN + WIDE))
    to_scales = 256 * BITS + (g << (3 + WIDE)) - lane * 16
    if TABLE == 1:
        pairs = cuda.shared.array(8192, uint32)
        _tabulate(pairs, table)
    # Addresses go along with the loops: nothing in there is multiplied.
    for q in static(C):
        token = min(token0 + 8 * q + g, tokens - 1)
        x_at[q] = x + ((token * units + part) * 128 + 8 * t) * (1 + HALF)
        for i in static(2):
            block = (min(token0 + 8 * q + 2 * t + i, tokens - 1) * units + part) * 4
            number_at[q, i] = x_scales + block * 8
            if HALF == 1:
                number_at[q, i] = x_sums + block * 4
    for r in static(T):
        w_at[r] = w + (min(first + r, tiles - 1) * units + part) * unit + lane * 16
        for q in static(C):
            for i in static(4):
                total[r, q, i] = np.float32(0)
        for d in static(DEPTH):
            for h in static(2):
                for i in static(BITS):
                    word[d, r, h, i] = uint32(0)
                for i in static(4):
                    raw[d, r, h, i] = uint32(0)
                    low[d, r, h, i] = uint32(0)
    left = units - part
    for d in static(DEPTH):
        if left > d * parts:
            _ask(word, raw, low, w_at, to_scales, stride, d)
    while left > 0:
        for d in static(DEPTH):
            if left > 0:
                _read_scales(s, m, raw, low, d)
                for j in static(4):
                    _unpack(a, word, pairs, j, lane, d)
                    for q in static(C):
                        _read_activations(b, xs, xi, x_at, number_at, j, q)
                        for r in static(T):
                            _add_block(total, a, b, s, m, xs, xi, j, q, r)
                _advance(x_at, number_at, parts)
                if left > DEPTH * parts:
                    _ask(word, raw, low, w_at, to_scales, stride, d)
            left -= parts
    sums = cuda.shared.array(T * C * WARPS * 128, float32)
    _keep(sums, total, warp, lane)
    _finish(
        sums, x_scales, y, bias, residual, warp, part, lane, g, t, first, token0, tokens, n, parts,
        row_shift, gated, curve,
    )  # fmt: skip


@inlined
def _tabulate(pairs: Any, table: Any) -> None:
    """The values of both nibbles of every byte, a copy for each lane in a bank of its own."""
    entry = np.int64(cuda.threadIdx.x)
    while entry < 8192:
        code = entry >> 5
        pairs[entry] = half_pair(
            read4f(table + ((code & 15) << 2)), read4f(table + ((code >> 4) << 2))
        )
        entry += np.int64(cuda.blockDim.x)
    cuda.syncthreads()


@inlined
def _ask(word: Any, raw: Any, low: Any, w_at: Any, to_scales: Any, stride: Any, d: Any) -> None:
    """Load this warp's next unit into place `d`."""
    T = BITS = MIN = WIDE = registers()
    for r in static(T):
        for h in static(2):
            for p in static(BITS // 4):
                (
                    word[d, r, h, 4 * p],
                    word[d, r, h, 4 * p + 1],
                    word[d, r, h, 4 * p + 2],
                    word[d, r, h, 4 * p + 3],
                ) = stream16(w_at[r] + (h * BITS // 4 + p) * 512)
            scales = w_at[r] + to_scales + (64 << WIDE) * h
            minima = scales + (128 << WIDE)
            if WIDE == 1:
                raw[d, r, h, 0], raw[d, r, h, 1], raw[d, r, h, 2], raw[d, r, h, 3] = stream16(
                    scales
                )
                if MIN == 1:
                    low[d, r, h, 0], low[d, r, h, 1], low[d, r, h, 2], low[d, r, h, 3] = stream16(
                        minima
                    )
            else:
                raw[d, r, h, 0], raw[d, r, h, 1] = stream8(scales)
                if MIN == 1:
                    low[d, r, h, 0], low[d, r, h, 1] = stream8(minima)
        w_at[r] += stride


@inlined
def _advance(x_at: Any, number_at: Any, parts: Any) -> None:
    """The addresses of the activations that go with a warp's next unit."""
    C = HALF = registers()
    for q in static(C):
        x_at[q] += parts * (128 * (1 + HALF))
        for i in static(2):
            number_at[q, i] += parts * (32 - 16 * HALF)


@inlined
def _read_scales(s: Any, m: Any, raw: Any, low: Any, d: Any) -> None:
    """Scales and minima of a unit's four blocks as floats."""
    T = MIN = WIDE = registers()
    for r in static(T):
        for h in static(2):
            if WIDE == 1:
                for j in static(4):
                    s[r, h, j] = as_float(raw[d, r, h, j])
                    if MIN == 1:
                        m[r, h, j] = as_float(low[d, r, h, j])
            else:
                for j in static(2):
                    s[r, h, 2 * j], s[r, h, 2 * j + 1] = floats_of_halves(raw[d, r, h, j])
                    if MIN == 1:
                        m[r, h, 2 * j], m[r, h, 2 * j + 1] = floats_of_halves(low[d, r, h, j])


@inlined
def _unpack(a: Any, word: Any, pairs: Any, j: Any, lane: Any, d: Any) -> None:
    """The weights of block `j` as the tensor core takes them."""
    T = BITS = TABLE = CENTER = HALF = registers()
    for r in static(T):
        for h in static(2):
            if TABLE == 1:
                for i in static(4):
                    a[r, h, i] = pairs[np.uint32((byte(word[d, r, h, j], i) << 5) + lane)]
            elif HALF == 0:
                if BITS == 4:
                    a[r, h, 0], a[r, h, 1] = bytes_of_nibbles(word[d, r, h, j])
                else:
                    a[r, h, 0] = word[d, r, h, 2 * j]
                    a[r, h, 1] = word[d, r, h, 2 * j + 1]
            elif BITS == 8:
                a[r, h, 0], a[r, h, 2] = halves_of_bytes(word[d, r, h, 2 * j])
                a[r, h, 1], a[r, h, 3] = halves_of_bytes(word[d, r, h, 2 * j + 1])
            elif CENTER == 8:
                a[r, h, 0], a[r, h, 1], a[r, h, 2], a[r, h, 3] = halves_of_nibbles(word[d, r, h, j])
            else:
                a[r, h, 0], a[r, h, 1], a[r, h, 2], a[r, h, 3] = halves_of_nibbles_0(
                    word[d, r, h, j]
                )


@inlined
def _read_activations(b: Any, xs: Any, xi: Any, x_at: Any, number_at: Any, j: Any, q: Any) -> None:
    """Block `j` of 8 tokens, with its scales and sums."""
    C = MIN = HALF = registers()
    here = x_at[q] + 32 * j * (1 + HALF)
    if HALF == 1:
        b[0], b[1], b[2], b[3] = read16(here)
    else:
        b[0], b[1] = read8(here)
    # One eight of tokens has registers for a unit's numbers, in few wide loads.
    for i in static(2):
        if HALF == 0:
            if C > 1:
                xs[j, i], xi[j, i] = read_scale_sum(number_at[q, i] + j * 8)
            elif j == 0:
                for p in static(2):
                    xs[2 * p, i], xi[2 * p, i], xs[2 * p + 1, i], xi[2 * p + 1, i] = (
                        read_scales_sums(number_at[q, i] + p * 16)
                    )
        elif MIN == 1:
            if C > 1:
                xs[j, i] = read4f(number_at[q, i] + j * 4)
            elif j == 0:
                xs[0, i], xs[1, i], xs[2, i], xs[3, i] = read16f(number_at[q, i])


@inlined
def _add_block(
    total: Any, a: Any, b: Any, s: Any, m: Any, xs: Any, xi: Any, j: Any, q: Any, r: Any
) -> None:
    """The products of a block of 16 rows with one of 8 tokens."""
    MIN = CENTER = HALF = registers()
    if HALF == 1:
        total[r, q, 0], total[r, q, 1], total[r, q, 2], total[r, q, 3] = add_block_a16(
            a[r, 0, 0], a[r, 1, 0], a[r, 0, 1], a[r, 1, 1],
            a[r, 0, 2], a[r, 1, 2], a[r, 0, 3], a[r, 1, 3],
            b[0], b[1], b[2], b[3], s[r, 0, j], s[r, 1, j],
            total[r, q, 0], total[r, q, 1], total[r, q, 2], total[r, q, 3],
        )  # fmt: skip
        if MIN == 1:
            for i in static(4):
                total[r, q, i] = fused(m[r, i // 2, j], xs[j, i % 2], total[r, q, i])
    else:
        total[r, q, 0], total[r, q, 1], total[r, q, 2], total[r, q, 3] = add_block_a8(
            a[r, 0, 0], a[r, 1, 0], a[r, 0, 1], a[r, 1, 1], b[0], b[1],
            -CENTER * xi[j, 0], -CENTER * xi[j, 1],
            s[r, 0, j], s[r, 1, j], xs[j, 0], xs[j, 1],
            total[r, q, 0], total[r, q, 1], total[r, q, 2], total[r, q, 3],
        )  # fmt: skip
        if MIN == 1:
            for i in static(4):
                total[r, q, i] = fused(
                    m[r, i // 2, j] * xs[j, i % 2], to_float(xi[j, i % 2]), total[r, q, i]
                )


@inlined
def _keep(sums: Any, total: Any, warp: Any, lane: Any) -> None:
    """One word of each lane side by side: no two lanes meet in a bank."""
    T = C = registers()
    mine = warp * (T * C * 128) + lane
    for r in static(T):
        for q in static(C):
            for i in static(4):
                sums[np.uint32(mine + ((r * C + q) * 4 + i) * 32)] = total[r, q, i]
    cuda.syncthreads()


@inlined
def _finish(
    sums: Any, x_scales: Any, y: Any, bias: Any, residual: Any, warp: Any, part: Any, lane: Any,
    g: Any, t: Any, first: Any, token0: Any, tokens: Any, n: Any, parts: Any, row_shift: Any,
    gated: Any, curve: Any,
) -> None:  # fmt: skip
    """Add up what the warps of a tile have summed, then gate, bias, curve, residual.

    They share out that too.
    """
    T = C = HALF = registers()
    most_r = np.int64(T)
    width = n
    if gated:
        most_r = np.int64(1)
        width = n >> 1
    own = warp - (part << row_shift)
    item = part
    while item < most_r * (C * 4):
        value = np.float32(0)
        up = np.float32(0)
        other = np.int64(0)
        while other < parts:
            mine = np.uint32((own + (other << row_shift)) * (T * C * 128) + lane + item * 32)
            value += sums[mine]
            if gated:
                up += sums[mine + np.uint32((T - 1) * C * 128)]
            other += 1
        token = token0 + ((item >> 2) & (C - 1)) * 8 + 2 * t + (item & 1)
        row = first * 16 + g + ((item >> 1) & 1) * 8 + item // (4 * C) * 16
        if gated:
            row = (first >> 1) * 16 + g + ((item >> 1) & 1) * 8
        if token < tokens and row < width:
            if HALF == 1:
                by = read4f(x_scales + token * 4)
                value *= by
                up *= by
            if gated:
                value = gelu_tanh(value) * up if curve == 1 else silu(value) * up
            if bias != 0:
                value += read4f(bias + row * 4)
            if not gated:
                if curve == 1:
                    value = gelu_tanh(value)
                elif curve == 2:
                    half = np.float32(0.5) * value
                    wave = np.float32(math.erf(value * np.float32(0.70710678)))
                    value = fused(half, wave, half)
                elif curve == 3:
                    value = most(value, np.float32(0))
            at = (token * width + row) * 4
            if residual != 0:
                value += read4f(residual + at)
            write4f(y + at, value)
        item += parts


def _dequantize(w: Any, table: Any, y: Any, n: Any, units: Any) -> None:
    """Rows of halves [n, 128 units]: a warp a unit, four lanes write 64 bytes of a row."""
    BITS = MIN = WIDE = TABLE = CENTER = registers()
    word, raw, low, v, s, m = registers()
    lane = np.int64(cuda.threadIdx.x) & 31
    g = lane >> 2
    step = np.int64(cuda.blockIdx.x) * (np.int64(cuda.blockDim.x) >> 5) + (
        np.int64(cuda.threadIdx.x) >> 5
    )
    tile = np.int64(cuda.blockIdx.y)
    unit = 256 * BITS + (128 << (MIN + WIDE))
    if step < units:
        at = w + (tile * units + step) * unit
        for h in static(2):
            row = tile * 16 + g + 8 * h
            if row < n:
                for p in static(BITS // 4):
                    word[4 * p], word[4 * p + 1], word[4 * p + 2], word[4 * p + 3] = stream16(
                        at + (h * BITS // 4 + p) * 512 + lane * 16
                    )
                here = at + 256 * BITS + ((g + 8 * h) << (3 + WIDE))
                if WIDE == 1:
                    raw[0], raw[1], raw[2], raw[3] = stream16(here)
                    for j in static(4):
                        s[j] = as_float(raw[j])
                else:
                    raw[0], raw[1] = stream8(here)
                    for j in static(2):
                        s[2 * j], s[2 * j + 1] = floats_of_halves(raw[j])
                for j in static(4):
                    m[j] = np.float32(0)
                if MIN + WIDE == 2:
                    low[0], low[1], low[2], low[3] = stream16(here + 256)
                    for j in static(4):
                        m[j] = as_float(low[j])
                elif MIN == 1:
                    low[0], low[1] = stream8(here + 128)
                    for j in static(2):
                        m[2 * j], m[2 * j + 1] = floats_of_halves(low[j])
                for j in static(4):
                    if TABLE == 1:
                        for i in static(4):
                            code = np.int64(byte(word[j], i))
                            v[2 * i] = read4f(table + ((code & 15) << 2))
                            v[2 * i + 1] = read4f(table + ((code >> 4) << 2))
                    elif BITS == 8:
                        for i in static(2):
                            first, second = halves_of_bytes(word[2 * j + i])
                            v[2 * i], v[2 * i + 1] = floats_of_halves(first)
                            v[2 * i + 4], v[2 * i + 5] = floats_of_halves(second)
                    else:
                        if CENTER == 8:
                            q0, q1, q2, q3 = halves_of_nibbles(word[j])
                        else:
                            q0, q1, q2, q3 = halves_of_nibbles_0(word[j])
                        v[0], v[1] = floats_of_halves(q0)
                        v[2], v[3] = floats_of_halves(q1)
                        v[4], v[5] = floats_of_halves(q2)
                        v[6], v[7] = floats_of_halves(q3)
                    for i in static(8):
                        v[i] = fused(v[i], s[j], m[j])
                    write16(
                        y + ((row * units + step) * 128 + 32 * j + 8 * (lane & 3)) * 2,
                        half_pair(v[0], v[1]), half_pair(v[2], v[3]),
                        half_pair(v[4], v[5]), half_pair(v[6], v[7]),
                    )  # fmt: skip


def kernels() -> dict[str, Kernel]:
    """The kernels by name."""
    found: dict[str, Kernel] = {}
    for kind, (bits, minimum, table, center, wide) in KINDS.items():
        weight = {"BITS": bits, "MIN": minimum, "WIDE": wide, "TABLE": table, "CENTER": center}
        make = partial(_made, _dequantize, weight)
        found[f"dequantize_{kind}"] = Kernel(make, "i" * 5, 256)
        for half in (1,) if table else (1, 0):
            for tiles, eights, warps, depth in SHAPES:
                if bits == 8 or minimum + wide == 2:
                    depth = min(depth, 2)  # a unit has more bytes, and more registers
                shape = {"T": tiles, "C": eights, "HALF": half, "WARPS": warps, "DEPTH": depth}
                name = f"linear_{kind}_{'a16' if half else 'a8'}_{tiles}x{eights}"
                make = partial(_made, _linear, {**weight, **shape})
                found[name] = Kernel(make, "i" * 16, 32 * warps)
    return found


def _made(function: Callable[..., Any], constants: dict[str, int]) -> Any:
    return unrolled(function, **constants)
