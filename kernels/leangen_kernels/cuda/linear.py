"""Matrix products with low-bit weights on the tensor core, for any number of rows.

One warp makes 16 rows of weights (two tiles in the wide forms) times 8, 16 or 32 tokens. The warps
of a block share out the units along k (few tokens: the weights are read once, by as many loads in
flight as there are) or take tiles of their own (many tokens).

What moves, for W4 at M = 1 on an H100: 16 weights' rows are K / 2 bytes each plus scales, once, in
16-byte loads that a warp's lanes make of one 512-byte stretch (four sectors of each of four lines,
none wasted); to keep 3.35 TB/s over ~700 ns busy each of 132 multiprocessors must have 18 kB on
the way: 16 warps with 1.1 kB asked for ahead do. The activations come from L1 and L2: 2 K bytes for
each block, where the weights are 8 K. Lanes of absent tokens read the last one's address, so that
costs no more. A block of 32 weights x 16 rows x 8 tokens takes 2 `mma` (one with int8), about 20
integer and half instructions to unpack and 4 fused multiply-adds for the scale: 1.6 lane
instructions a weight (1.0 with int8), where memory speed leaves time for about 4.

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
    read_scale_sum,
    silu,
    stream8,
    stream16,
    to_float,
    write4f,
    write16,
)
from leangen_kernels.unroll import inlined, registers, static, unrolled

KINDS = {"q4": (4, 0, 0, 8), "q4_min": (4, 1, 0, 0), "q8": (8, 0, 0, 128), "table": (4, 0, 1, 0)}
"""Bits, whether there are minima, whether codes index a table, and the code that stands for 0."""

SHAPES = ((1, 1, 8, 1), (2, 2, 4, 1), (2, 4, 4, 0))
"""Tiles of 16 rows, and of 8 tokens, of a warp; warps of a block; whether a warp asks for the unit
after the one that it computes. The last, for many tokens, is bound by arithmetic: it does not."""


def _linear(
    x: Any, x_scales: Any, x_sums: Any, w: Any, table: Any, y: Any, bias: Any, residual: Any,
    tokens: Any, n: Any, units: Any, row_shift: Any, wide: Any, gated: Any, curve: Any,
) -> None:  # fmt: skip
    """What one warp makes of y.

    `wide` is 1 where scales are fp32. A block's warps lie along 2^row_shift tiles of rows; those of
    one tile share out its units along k.
    """
    T = C = BITS = MIN = TABLE = HALF = WARPS = AHEAD = registers()
    word, ahead, raw, raw_next, low, low_next = registers()
    a, b, total, s, m, xs, xi, base, x_at, number_at = registers()
    lane = np.int64(cuda.threadIdx.x) & 31
    warp = np.int64(cuda.threadIdx.x) >> 5
    g = lane >> 2
    t = lane & 3
    parts = (np.int64(cuda.blockDim.x) >> 5) >> row_shift
    part = warp >> row_shift
    tiles = (n + 15) >> 4
    first = ((np.int64(cuda.blockIdx.x) << row_shift) + (warp & ((1 << row_shift) - 1))) * T
    token0 = np.int64(cuda.blockIdx.y) * (8 * C)
    k = units * 128
    unit = 256 * BITS + ((128 * (1 + MIN)) << wide)
    if TABLE == 1:
        pairs = cuda.shared.array(8192, uint32)
        _tabulate(pairs, table)
    for q in static(C):
        x_at[q] = x + (min(token0 + 8 * q + g, tokens - 1) * k + 8 * t) * (1 + HALF)
        for i in static(2):
            block = min(token0 + 8 * q + 2 * t + i, tokens - 1) * units * 4
            number_at[q, i] = x_scales + block * 8
            if HALF == 1:
                number_at[q, i] = x_sums + block * 4
    for r in static(T):
        base[r] = w + min(first + r, tiles - 1) * units * unit
        for q in static(C):
            for i in static(4):
                total[r, q, i] = np.float32(0)
        for h in static(2):
            for i in static(4):
                ahead[r, h, i] = uint32(0)
                ahead[r, h, i + 4] = uint32(0)
                raw_next[r, h, i] = uint32(0)
                low_next[r, h, i] = uint32(0)
    # The first turn only asks for the first unit, each later one for the next before it computes.
    step = part - parts * AHEAD
    while step < units:
        at = min(step + parts * AHEAD, units - 1)
        _ask(word, ahead, raw, raw_next, low, low_next, base, at, unit, lane, g, wide)
        if step >= 0:
            _read_scales(s, m, raw, low, wide)
            for j in static(4):
                _unpack(a, word, pairs, j, lane)
                for q in static(C):
                    _read_activations(b, xs, xi, x_at, number_at, step, j, q)
                    for r in static(T):
                        _add_block(total, a, b, s, m, xs, xi, j, q, r)
        step += parts
    sums = cuda.shared.array(T * C * WARPS * 128, float32)
    _keep(sums, total, warp, lane)
    if part == 0:
        _finish(
            sums, x_scales, y, bias, residual, warp, lane, g, t, first, token0, tokens, n, parts,
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
def _ask(
    word: Any, ahead: Any, raw: Any, raw_next: Any, low: Any, low_next: Any,
    base: Any, at: Any, unit: Any, lane: Any, g: Any, wide: Any,
) -> None:  # fmt: skip
    """Load the unit `at`, and make `word`, `raw` and `low` the unit that is computed now."""
    T = BITS = MIN = AHEAD = registers()
    for r in static(T):
        for h in static(2):
            if AHEAD == 1:
                for i in static(BITS):
                    word[r, h, i] = ahead[r, h, i]
                for i in static(4):
                    raw[r, h, i] = raw_next[r, h, i]
                    low[r, h, i] = low_next[r, h, i]
            for p in static(BITS // 4):
                (
                    ahead[r, h, 4 * p],
                    ahead[r, h, 4 * p + 1],
                    ahead[r, h, 4 * p + 2],
                    ahead[r, h, 4 * p + 3],
                ) = stream16(base[r] + at * unit + (h * BITS // 4 + p) * 512 + lane * 16)
            here = base[r] + at * unit + 256 * BITS + ((g + 8 * h) << (3 + wide))
            if wide:
                raw_next[r, h, 0], raw_next[r, h, 1], raw_next[r, h, 2], raw_next[r, h, 3] = (
                    stream16(here)
                )
            else:
                raw_next[r, h, 0], raw_next[r, h, 1] = stream8(here)
            if MIN == 1:
                here += 128 << wide
                if wide:
                    (
                        low_next[r, h, 0],
                        low_next[r, h, 1],
                        low_next[r, h, 2],
                        low_next[r, h, 3],
                    ) = stream16(here)
                else:
                    low_next[r, h, 0], low_next[r, h, 1] = stream8(here)
            if AHEAD == 0:
                for i in static(BITS):
                    word[r, h, i] = ahead[r, h, i]
                for i in static(4):
                    raw[r, h, i] = raw_next[r, h, i]
                    low[r, h, i] = low_next[r, h, i]


@inlined
def _read_scales(s: Any, m: Any, raw: Any, low: Any, wide: Any) -> None:
    """Scales and minima of a unit's four blocks as floats."""
    T = registers()
    for r in static(T):
        for h in static(2):
            if wide:
                for j in static(4):
                    s[r, h, j] = as_float(raw[r, h, j])
                    m[r, h, j] = as_float(low[r, h, j])
            else:
                for j in static(2):
                    s[r, h, 2 * j], s[r, h, 2 * j + 1] = floats_of_halves(raw[r, h, j])
                    m[r, h, 2 * j], m[r, h, 2 * j + 1] = floats_of_halves(low[r, h, j])


@inlined
def _unpack(a: Any, word: Any, pairs: Any, j: Any, lane: Any) -> None:
    """The weights of block `j` as the tensor core takes them."""
    T = BITS = TABLE = CENTER = HALF = registers()
    for r in static(T):
        for h in static(2):
            if TABLE == 1:
                for i in static(4):
                    a[r, h, i] = pairs[(np.int64(byte(word[r, h, j], i)) << 5) + lane]
            elif HALF == 0:
                if BITS == 4:
                    a[r, h, 0], a[r, h, 1] = bytes_of_nibbles(word[r, h, j])
                else:
                    a[r, h, 0] = word[r, h, 2 * j]
                    a[r, h, 1] = word[r, h, 2 * j + 1]
            elif BITS == 8:
                a[r, h, 0], a[r, h, 2] = halves_of_bytes(word[r, h, 2 * j])
                a[r, h, 1], a[r, h, 3] = halves_of_bytes(word[r, h, 2 * j + 1])
            elif CENTER == 8:
                a[r, h, 0], a[r, h, 1], a[r, h, 2], a[r, h, 3] = halves_of_nibbles(word[r, h, j])
            else:
                a[r, h, 0], a[r, h, 1], a[r, h, 2], a[r, h, 3] = halves_of_nibbles_0(word[r, h, j])


@inlined
def _read_activations(
    b: Any, xs: Any, xi: Any, x_at: Any, number_at: Any, step: Any, j: Any, q: Any
) -> None:
    """Block `j` of 8 tokens, with its scales and sums."""
    MIN = HALF = registers()
    here = x_at[q] + (step * 128 + 32 * j) * (1 + HALF)
    if HALF == 1:
        b[0], b[1], b[2], b[3] = read16(here)
    else:
        b[0], b[1] = read8(here)
    for i in static(2):
        if HALF == 0:
            xs[i], xi[i] = read_scale_sum(number_at[q, i] + (step * 4 + j) * 8)
        elif MIN == 1:
            xs[i] = read4f(number_at[q, i] + (step * 4 + j) * 4)


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
                total[r, q, i] = fused(m[r, i // 2, j], xs[i % 2], total[r, q, i])
    else:
        total[r, q, 0], total[r, q, 1], total[r, q, 2], total[r, q, 3] = add_block_a8(
            a[r, 0, 0], a[r, 1, 0], a[r, 0, 1], a[r, 1, 1], b[0], b[1],
            -CENTER * xi[0], -CENTER * xi[1],
            s[r, 0, j], s[r, 1, j], xs[0], xs[1],
            total[r, q, 0], total[r, q, 1], total[r, q, 2], total[r, q, 3],
        )  # fmt: skip
        if MIN == 1:
            for i in static(4):
                total[r, q, i] = fused(
                    m[r, i // 2, j] * xs[i % 2], to_float(xi[i % 2]), total[r, q, i]
                )


@inlined
def _keep(sums: Any, total: Any, warp: Any, lane: Any) -> None:
    """One word of each lane side by side: no two lanes meet in a bank."""
    T = C = registers()
    mine = warp * (T * C * 128) + lane
    for r in static(T):
        for q in static(C):
            for i in static(4):
                sums[mine + ((r * C + q) * 4 + i) * 32] = total[r, q, i]
    cuda.syncthreads()


@inlined
def _finish(
    sums: Any, x_scales: Any, y: Any, bias: Any, residual: Any, warp: Any, lane: Any, g: Any,
    t: Any, first: Any, token0: Any, tokens: Any, n: Any, parts: Any, row_shift: Any, gated: Any,
    curve: Any,
) -> None:  # fmt: skip
    """Add up what the warps of a tile have summed, then gate, bias, curve, residual."""
    T = C = HALF = registers()
    most_r = np.int64(T)
    width = n
    if gated:
        most_r = np.int64(1)
        width = n >> 1
    item = np.int64(0)
    while item < most_r * (C * 4):
        value = np.float32(0)
        up = np.float32(0)
        other = np.int64(0)
        while other < parts:
            mine = (warp + (other << row_shift)) * (T * C * 128) + lane + item * 32
            value += sums[mine]
            if gated:
                up += sums[mine + (T - 1) * C * 128]
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
        item += 1


def _dequantize(w: Any, table: Any, y: Any, n: Any, units: Any, wide: Any) -> None:
    """Rows of halves [n, 128 units]: a warp a unit, four lanes write 64 bytes of a row."""
    BITS = MIN = TABLE = CENTER = registers()
    word, raw, low, v, s, m = registers()
    lane = np.int64(cuda.threadIdx.x) & 31
    g = lane >> 2
    step = np.int64(cuda.blockIdx.x) * (np.int64(cuda.blockDim.x) >> 5) + (
        np.int64(cuda.threadIdx.x) >> 5
    )
    tile = np.int64(cuda.blockIdx.y)
    unit = 256 * BITS + ((128 * (1 + MIN)) << wide)
    if step < units:
        at = w + (tile * units + step) * unit
        for h in static(2):
            row = tile * 16 + g + 8 * h
            if row < n:
                for p in static(BITS // 4):
                    word[4 * p], word[4 * p + 1], word[4 * p + 2], word[4 * p + 3] = stream16(
                        at + (h * BITS // 4 + p) * 512 + lane * 16
                    )
                here = at + 256 * BITS + ((g + 8 * h) << (3 + wide))
                low[0], low[1], low[2], low[3] = uint32(0), uint32(0), uint32(0), uint32(0)
                if wide:
                    raw[0], raw[1], raw[2], raw[3] = stream16(here)
                    if MIN == 1:
                        low[0], low[1], low[2], low[3] = stream16(here + (128 << wide))
                    for j in static(4):
                        s[j] = as_float(raw[j])
                        m[j] = as_float(low[j])
                else:
                    raw[0], raw[1] = stream8(here)
                    if MIN == 1:
                        low[0], low[1] = stream8(here + (128 << wide))
                    for j in static(2):
                        s[2 * j], s[2 * j + 1] = floats_of_halves(raw[j])
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
    for kind, (bits, minimum, table, center) in KINDS.items():
        weight = {"BITS": bits, "MIN": minimum, "TABLE": table, "CENTER": center}
        make = partial(_made, _dequantize, weight)
        found[f"dequantize_{kind}"] = Kernel(make, "i" * 6, 256)
        for half in (1,) if table else (1, 0):
            for tiles, eights, warps, ahead in SHAPES:
                shape = {"T": tiles, "C": eights, "HALF": half, "WARPS": warps, "AHEAD": ahead}
                name = f"linear_{kind}_{'a16' if half else 'a8'}_{tiles}x{eights}"
                make = partial(_made, _linear, {**weight, **shape})
                found[name] = Kernel(make, "i" * 15, 32 * warps)
    return found


def _made(function: Callable[..., Any], constants: dict[str, int]) -> Any:
    return unrolled(function, **constants)
