"""Rows of floats made ready for `linear`: a norm, then halves or bytes; one block a row.

A row stays in registers from its one read to its one write: three sums over the block lie between.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numba import cuda, float32

from leangen_kernels.cuda.instructions import (
    Kernel,
    absolute,
    across,
    await_last,
    bytes_of,
    exponent,
    floats_of_halves,
    fused,
    half_pair,
    inverse_root,
    most,
    nearest,
    quotient,
    read4f,
    read16f,
    to_float,
    write4f,
    write4i,
    write8,
    write16,
)
from leangen_kernels.unroll import inlined, registers, static, unrolled

THREADS = 1024
EIGHTS = 2
MOST_COLUMNS = 8 * EIGHTS * THREADS
"""The longest row: 16384."""


def _rows(
    x: Any, gain: Any, shift: Any, y: Any, scales: Any, sums: Any, k: Any, units: Any,
    layer: Any, epsilon: Any,
) -> None:  # fmt: skip
    """One row: `scales` and `sums` get what `linear` needs beside halves or bytes."""
    E = HALF = registers()
    v, h, c = registers()
    tid = np.int64(cuda.threadIdx.x)
    threads = np.int64(cuda.blockDim.x)
    row = np.int64(cuda.blockIdx.x)
    lane = tid & 31
    warp = tid >> 5
    warps = (threads + 31) >> 5
    over_warps = cuda.shared.array(32, float32)
    await_last()
    _read(v, x, row, k, tid, threads)
    inverse = np.float32(1)
    for stage in static(3):  # the mean, the squares, the largest
        value = np.float32(0)
        for e in static(E):
            first = (tid + e * threads) * 8
            for i in static(8):
                if stage == 0:
                    value += v[e, i]
                elif stage == 1:
                    value = fused(v[e, i], v[e, i], value)
                else:
                    value = most(value, absolute(v[e, i]))
        for s in static(5):
            other = across(value, 16 >> s)
            if stage == 2:
                value = most(value, other)
            else:
                value += other
        if lane == 0:
            over_warps[warp] = value
        cuda.syncthreads()
        value = np.float32(0)
        other_warp = np.int64(0)
        while other_warp < warps:
            if stage == 2:
                value = most(value, over_warps[other_warp])
            else:
                value += over_warps[other_warp]
            other_warp += 1
        cuda.syncthreads()
        if stage == 0:
            if layer:
                _subtract_mean(v, value, k, tid, threads)
        elif stage == 1:
            if gain != 0:
                _normalize(v, value, gain, shift, k, epsilon, tid, threads)
        elif HALF == 1:
            step = np.float32(1)
            if value >= np.float32(1e-30):
                step = exponent(value)
            inverse = quotient(np.float32(1), step)
            if tid == 0:
                write4f(scales + row * 4, step)
    for e in static(E):
        first = (tid + e * threads) * 8
        at = row * units * 128 + first
        if HALF == 1:
            _write_halves(h, v, y, sums, inverse, at, first, units, tid, e)
        else:
            _write_bytes(c, v, y, scales, at, first, units, tid, e)


@inlined
def _read(v: Any, x: Any, row: Any, k: Any, tid: Any, threads: Any) -> None:
    """A thread's columns of the row; those beyond it are 0."""
    E = registers()
    aligned = (k & 3) == 0
    for e in static(E):
        first = (tid + e * threads) * 8
        for i in static(8):
            v[e, i] = np.float32(0)
        here = x + (row * k + first) * 4
        if aligned and first + 8 <= k:
            for i in static(2):
                v[e, 4 * i], v[e, 4 * i + 1], v[e, 4 * i + 2], v[e, 4 * i + 3] = read16f(
                    here + 16 * i
                )
        else:
            for i in static(8):
                if first + i < k:
                    v[e, i] = read4f(here + 4 * i)


@inlined
def _subtract_mean(v: Any, value: Any, k: Any, tid: Any, threads: Any) -> None:
    """Take the mean off, of which `value` is the sum."""
    E = registers()
    mean = quotient(value, np.float32(k))
    for e in static(E):
        first = (tid + e * threads) * 8
        for i in static(8):
            if first + i < k:
                v[e, i] -= mean


@inlined
def _normalize(
    v: Any, value: Any, gain: Any, shift: Any, k: Any, epsilon: Any, tid: Any, threads: Any,
) -> None:  # fmt: skip
    """Divide by the root of the mean square, of which `value` is the sum; gain and shift."""
    E = registers()
    factor = inverse_root(quotient(value, np.float32(k)) + epsilon)
    for e in static(E):
        first = (tid + e * threads) * 8
        for i in static(8):
            if first + i < k:
                v[e, i] *= factor * read4f(gain + (first + i) * 4)
                if shift != 0:
                    v[e, i] += read4f(shift + (first + i) * 4)


@inlined
def _write_halves(
    h: Any, v: Any, y: Any, sums: Any, inverse: Any, at: Any, first: Any, units: Any, tid: Any,
    e: Any,
) -> None:  # fmt: skip
    """Eight columns as halves, and the sum of a block by four lanes."""
    for i in static(4):
        h[i] = half_pair(v[e, 2 * i] * inverse, v[e, 2 * i + 1] * inverse)
    value = np.float32(0)
    for i in static(4):
        low, high = floats_of_halves(h[i])
        value += low + high
    for s in static(2):
        value += across(value, 1 << s)
    if first < units * 128:
        write16(y + at * 2, h[0], h[1], h[2], h[3])
        if tid & 3 == 0:
            write4f(sums + (at >> 5) * 4, value)


@inlined
def _write_bytes(
    c: Any, v: Any, y: Any, scales: Any, at: Any, first: Any, units: Any, tid: Any, e: Any,
) -> None:  # fmt: skip
    """Eight columns as bytes, and a block's scale and sum by four lanes."""
    value = np.float32(0)
    for i in static(8):
        value = most(value, absolute(v[e, i]))
    for s in static(2):
        value = most(value, across(value, 1 << s))
    inverse = np.float32(0)
    if value >= np.float32(1e-30):
        inverse = quotient(np.float32(127), value)
    total = np.float32(0)
    for i in static(8):
        c[i] = nearest(v[e, i] * inverse)
        total += to_float(c[i])
    for s in static(2):
        total += across(total, 1 << s)
    if first < units * 128:
        write8(
            y + at,
            bytes_of(c[0], c[4], c[1], c[5]), bytes_of(c[2], c[6], c[3], c[7]),
        )  # fmt: skip
        if tid & 3 == 0:
            if inverse == np.float32(0):
                value = np.float32(0)
            write4f(scales + (at >> 5) * 8, quotient(value, np.float32(127)))
            write4i(scales + (at >> 5) * 8 + 4, nearest(total))


def kernels() -> dict[str, Kernel]:
    """The kernels by name."""
    found = {}
    for name, half in (("rows_a16", 1), ("rows_a8", 0)):
        make = partial(unrolled, _rows, E=EIGHTS, HALF=half)
        found[name] = Kernel(make, "i" * 9 + "f", THREADS, 1)
    return found
