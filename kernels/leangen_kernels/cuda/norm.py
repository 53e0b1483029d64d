"""Group norm with its activation, in two passes that all multiprocessors share.

A group of a picture is up to 160 kB, and there are only 32 to 64 groups: one block for each would
leave most of the card idle. So splits of each group sum first, then a block for each channel reads
its splits' sums, a few words, and writes. Values are read 16 bytes at a time, twice in all; the
second time mostly from L2.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numba import cuda, float32

from leangen_kernels.cuda.instructions import (
    Kernel,
    across,
    as_bits,
    await_last,
    fused,
    inverse_root,
    most,
    quotient,
    read4f,
    read16f,
    silu,
    write4f,
    write16,
)
from leangen_kernels.unroll import registers, static, unrolled

THREADS = 256


def _moments(x: Any, sums: Any, count: Any) -> None:
    """Sums of x - x[0] and of its squares over one split of a group of `count`, a multiple of 4."""
    v = registers()
    tid = np.int64(cuda.threadIdx.x)
    splits = np.int64(cuda.gridDim.x)
    group = np.int64(cuda.blockIdx.y)
    base = x + group * count * 4
    await_last()
    pivot = read4f(base)
    share = (count // 4 + splits - 1) // splits
    at = np.int64(cuda.blockIdx.x) * share
    end = min(at + share, count // 4)
    at += tid
    total = np.float32(0)
    squares = np.float32(0)
    while at < end:
        v[0], v[1], v[2], v[3] = read16f(base + at * 16)
        for i in static(4):
            v[i] -= pivot
            total += v[i]
            squares = fused(v[i], v[i], squares)
        at += np.int64(cuda.blockDim.x)
    for s in static(5):
        total += across(total, 16 >> s)
        squares += across(squares, 16 >> s)
    over_warps = cuda.shared.array(64, float32)
    if tid & 31 == 0:
        over_warps[tid >> 5] = total
        over_warps[(tid >> 5) + 32] = squares
    cuda.syncthreads()
    if tid == 0:
        other = np.int64(1)
        while other < np.int64(cuda.blockDim.x) >> 5:
            total += over_warps[other]
            squares += over_warps[other + 32]
            other += 1
        to = sums + (group * splits + np.int64(cuda.blockIdx.x)) * 8
        write4f(to, total)
        write4f(to + 4, squares)


def _group_norm(
    x: Any, sums: Any, gain: Any, shift: Any, y: Any, pixels: Any, channels: Any, groups: Any,
    splits: Any, silu_: Any, epsilon: Any,
) -> None:  # fmt: skip
    """A share of the pixels, a multiple of 4, of one channel."""
    v, r = registers()
    whole = np.int64(cuda.blockIdx.y)
    channel = whole % channels
    of_group = channels // groups
    group = whole // of_group
    count = np.float32(of_group * pixels)
    total = np.float32(0)
    squares = np.float32(0)
    await_last()
    other = np.int64(0)
    while other < splits:
        total += read4f(sums + (group * splits + other) * 8)
        squares += read4f(sums + (group * splits + other) * 8 + 4)
        other += 1
    mean = quotient(total, count)
    variance = most(quotient(squares, count) - mean * mean, np.float32(0))
    factor = inverse_root(variance + epsilon) * read4f(gain + channel * 4)
    mean += read4f(x + group * of_group * pixels * 4)
    offset = read4f(shift + channel * 4)
    at = np.int64(cuda.blockIdx.x) * np.int64(cuda.blockDim.x) + np.int64(cuda.threadIdx.x)
    while at < pixels // 4:
        here = (whole * pixels + at * 4) * 4
        v[0], v[1], v[2], v[3] = read16f(x + here)
        for i in static(4):
            v[i] = fused(v[i] - mean, factor, offset)
            if silu_:
                v[i] = silu(v[i])
            r[i] = as_bits(v[i])
        write16(y + here, r[0], r[1], r[2], r[3])
        at += np.int64(cuda.gridDim.x) * np.int64(cuda.blockDim.x)


def kernels() -> dict[str, Kernel]:
    """The kernels by name."""
    return {
        "moments": Kernel(partial(unrolled, _moments), "iii", THREADS),
        "group_norm": Kernel(partial(unrolled, _group_norm), "i" * 10 + "f", THREADS),
    }
