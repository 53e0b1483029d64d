"""Attention over a cache of keys and values: append, attend in splits of the sequence, merge.

Decoding reads the cache once for all query heads that share it. A row of keys is held by 8 or 16
lanes, 16 bytes (with int8 8) each, so a warp asks for 512 (256) bytes of whole rows at a time, two
positions deep: 2 kB of keys and values on the way for each of a block's four warps. Scores are
summed across lanes by shuffles; each position's share multiplies the values that a lane holds.
How many positions there are stands in device memory, so that nothing waits for the host and the
same launches can be replayed as a graph.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from numba import cuda, float32, uint32

from leangen_kernels.cuda.instructions import (
    Kernel,
    absolute,
    across,
    add8,
    as_word,
    await_last,
    dot8,
    floats_of_bytes,
    floats_of_halves,
    fused,
    inverse_root,
    most,
    nearest,
    power2,
    quotient,
    read4,
    read4f,
    read8,
    read16,
    read16f,
    to_int,
    write1,
    write2h,
    write4f,
)
from leangen_kernels.unroll import inlined, registers, static, unrolled

THREADS = 128
WIDTHS = (64, 128)
STATES = {64: 98, 128: 164}
"""Words of shared memory for one row's state: 8 pitches, the top and the mass, and so many that the
states of neighbouring lanes start in other banks."""
QUERIES = 4
"""Rows (of a token and a query head) that one block attends with: those that share a key head."""


def _append(
    qkv: Any, last: Any, cosines: Any, sines: Any, query_gain: Any, key_gain: Any,
    q: Any, keys: Any, values: Any, new: Any, heads: Any, kv_heads: Any, capacity: Any,
    limit: Any, epsilon: Any, scale: Any,
) -> None:  # fmt: skip
    """One warp for a head of a token: norm, rotation; queries scaled, keys and values stored.

    Positions from `limit` on have no rotation, or no place: nothing is kept of them.
    """
    WIDTH = BYTES = registers()
    first, second = registers()
    lane = np.int64(cuda.threadIdx.x) & 31
    head = np.int64(cuda.blockIdx.x)
    token = np.int64(cuda.blockIdx.y)
    sequence = np.int64(cuda.blockIdx.z)
    row = sequence * new + token
    await_last()
    position = max(np.int64(to_int(read4(last + sequence * 4))) + 1 - new, 0) + token
    place = min(position, limit - 1)
    all_heads = heads + 2 * kv_heads
    here = qkv + (row * all_heads + head) * (WIDTH * 4)
    for p in static(WIDTH // 64):
        first[p] = read4f(here + (lane + 32 * p) * 4)
        second[p] = read4f(here + (lane + 32 * p + WIDTH // 2) * 4)
    gain = query_gain
    if head >= heads:
        gain = key_gain
    turned = head < heads + kv_heads
    if turned and gain != 0:
        _normalize(first, second, gain, lane, epsilon)
    if turned and cosines != 0:
        _rotate(first, second, cosines, sines, place, lane)
    if head < heads:
        group = heads // kv_heads
        shared = head // group
        at = ((sequence * kv_heads + shared) * new + token) * group + head - shared * group
        to = q + at * (WIDTH * 4)
        for p in static(WIDTH // 64):
            write4f(to + (lane + 32 * p) * 4, first[p] * scale)
            write4f(to + (lane + 32 * p + WIDTH // 2) * 4, second[p] * scale)
    elif position < limit:
        to = keys
        shared = head - heads
        if not turned:
            to = values
            shared -= kv_heads
        whole = sequence * kv_heads + shared
        if BYTES == 2:
            to += (whole * capacity + position) * (WIDTH * 2)
            for p in static(WIDTH // 64):
                write2h(to + (lane + 32 * p) * 2, first[p])
                write2h(to + (lane + 32 * p + WIDTH // 2) * 2, second[p])
        else:
            to += (whole * capacity + (position & -16)) * (WIDTH + 4)
            _store_bytes(first, second, to, position, lane)


@inlined
def _normalize(first: Any, second: Any, gain: Any, lane: Any, epsilon: Any) -> None:
    """Divide a head by its root mean square, times the gain."""
    WIDTH = registers()
    squares = np.float32(0)
    for p in static(WIDTH // 64):
        squares = fused(first[p], first[p], squares)
        squares = fused(second[p], second[p], squares)
    for s in static(5):
        squares += across(squares, 16 >> s)
    factor = inverse_root(squares * np.float32(1 / WIDTH) + epsilon)
    for p in static(WIDTH // 64):
        first[p] *= factor * read4f(gain + (lane + 32 * p) * 4)
        second[p] *= factor * read4f(gain + (lane + 32 * p + WIDTH // 2) * 4)


@inlined
def _rotate(first: Any, second: Any, cosines: Any, sines: Any, place: Any, lane: Any) -> None:
    """Turn the first half of a head against the second, as far as the position says."""
    WIDTH = registers()
    for p in static(WIDTH // 64):
        angle = (place * (WIDTH // 2) + lane + 32 * p) * 4
        cosine = read4f(cosines + angle)
        sine = read4f(sines + angle)
        turn = first[p] * cosine - second[p] * sine
        second[p] = second[p] * cosine + first[p] * sine
        first[p] = turn


@inlined
def _store_bytes(first: Any, second: Any, to: Any, position: Any, lane: Any) -> None:
    """A head as int8, its scale in the block of 16 positions that it belongs to."""
    WIDTH = registers()
    largest = np.float32(0)
    for p in static(WIDTH // 64):
        largest = most(largest, most(absolute(first[p]), absolute(second[p])))
    for s in static(5):
        largest = most(largest, across(largest, 16 >> s))
    inverse = np.float32(0)
    step = np.float32(0)
    if largest >= np.float32(1e-30):
        inverse = quotient(np.float32(127), largest)
        step = quotient(largest, np.float32(127))
    if lane == 0:
        write4f(to + 16 * WIDTH + (position & 15) * 4, step)
    to += (position & 15) * WIDTH + lane
    for p in static(WIDTH // 64):
        write1(to + 32 * p, as_word(nearest(first[p] * inverse)))
        write1(to + 32 * p + WIDTH // 2, as_word(nearest(second[p] * inverse)))


def _attend(
    q: Any, last: Any, keys: Any, values: Any, parts: Any,
    new: Any, group: Any, kv_heads: Any, capacity: Any, window: Any,
) -> None:  # fmt: skip
    """One split of the positions for up to four rows that share keys; `_merge` joins the splits.

    `parts` gets, of every row and split, the values summed so far, the top score and the mass.
    """
    WIDTH = BYTES = Q = DEEP = LANES = SIDES = SIZE = registers()
    query, acc, score, low, high, top, mass, v, k, word, numbers, by = registers()
    lane = np.int64(cuda.threadIdx.x) & 31
    warp = np.int64(cuda.threadIdx.x) >> 5
    side = (np.int64(cuda.blockDim.x) >> 5) * (32 // LANES)
    who = warp * (32 // LANES) + lane // LANES
    splits = np.int64(cuda.gridDim.x)
    whole = np.int64(cuda.blockIdx.z)
    first = np.int64(cuda.blockIdx.y) * Q
    rows = new * group
    await_last()
    past = max(np.int64(to_int(read4(last + whole // kv_heads * 4))) + 1 - new, 0)
    dim = (lane & (LANES - 1)) * 8
    begin = past + new
    end = np.int64(0)
    for i in static(Q):
        row = min(first + i, rows - 1)
        stop = min(past + row // group + 1, capacity)
        start = np.int64(0)
        if window > 0:
            start = max(stop - window, start)
        begin = min(begin, start)
        end = max(end, stop)
        low[i] = np.int32(start)
        high[i] = np.int32(stop)
        top[i] = np.float32(-1e30)
        mass[i] = np.float32(0)
        here = q + ((whole * rows + row) * WIDTH + dim) * 4
        query[i, 0], query[i, 1], query[i, 2], query[i, 3] = read16f(here)
        query[i, 4], query[i, 5], query[i, 6], query[i, 7] = read16f(here + 16)
        for d in static(8):
            acc[i, d] = np.float32(0)
    share = (end - begin + splits - 1) // splits
    begin += np.int64(cuda.blockIdx.x) * share
    end = min(end, begin + share)
    for p in static(DEEP):
        for i in static(BYTES * 4):
            word[p, i] = uint32(0)
        numbers[p, 0] = np.float32(1)
        numbers[p, 1] = np.float32(1)
        if begin < end:
            at = min(begin + p * side + who, end - 1)
            _ask(word, numbers, keys, values, whole, capacity, at, dim, p)
    while begin < end:
        for p in static(DEEP):
            _unpack(k, v, by, word, numbers, p)
            if begin + DEEP * side < end:  # the next ones come while these are computed
                at = min(begin + (DEEP + p) * side + who, end - 1)
                _ask(word, numbers, keys, values, whole, capacity, at, dim, p)
        for i in static(Q):
            _attend_row(score, acc, top, mass, query, low, high, k, v, by, begin, end, side, who, i)
        begin += DEEP * side
    # Every group of lanes has seen other positions.
    state = cuda.shared.array(Q * SIZE * SIDES, float32)
    _keep(state, acc, top, mass, who, lane, dim)
    _join(state, parts, first, rows, whole, side, splits)


@inlined
def _ask(
    word: Any, numbers: Any, keys: Any, values: Any, whole: Any, capacity: Any, at: Any, dim: Any,
    p: Any,
) -> None:  # fmt: skip
    """Load what a lane holds of the key and the value at a position, and their scales."""
    WIDTH = BYTES = registers()
    if BYTES == 2:
        here = ((whole * capacity + at) * WIDTH + dim) * 2
        word[p, 0], word[p, 1], word[p, 2], word[p, 3] = read16(keys + here)
        word[p, 4], word[p, 5], word[p, 6], word[p, 7] = read16(values + here)
    else:
        block = (whole * capacity + (at & -16)) * (WIDTH + 4)
        here = block + (at & 15) * WIDTH + dim
        word[p, 0], word[p, 1] = read8(keys + here)
        word[p, 2], word[p, 3] = read8(values + here)
        numbers[p, 0] = read4f(keys + block + 16 * WIDTH + (at & 15) * 4)
        numbers[p, 1] = read4f(values + block + 16 * WIDTH + (at & 15) * 4)


@inlined
def _unpack(k: Any, v: Any, by: Any, word: Any, numbers: Any, p: Any) -> None:
    """The same as floats."""
    BYTES = registers()
    by[p, 0] = numbers[p, 0]
    by[p, 1] = numbers[p, 1]
    if BYTES == 2:
        for i in static(4):
            k[p, 2 * i], k[p, 2 * i + 1] = floats_of_halves(word[p, i])
            v[p, 2 * i], v[p, 2 * i + 1] = floats_of_halves(word[p, 4 + i])
    else:
        for i in static(2):
            k[p, 4 * i], k[p, 4 * i + 1], k[p, 4 * i + 2], k[p, 4 * i + 3] = floats_of_bytes(
                word[p, i]
            )
            v[p, 4 * i], v[p, 4 * i + 1], v[p, 4 * i + 2], v[p, 4 * i + 3] = floats_of_bytes(
                word[p, 2 + i]
            )


@inlined
def _attend_row(
    score: Any, acc: Any, top: Any, mass: Any, query: Any, low: Any, high: Any, k: Any, v: Any,
    by: Any, begin: Any, end: Any, side: Any, who: Any, i: Any,
) -> None:  # fmt: skip
    """Add the positions read to one row: scores first, then values by their shares."""
    DEEP = LANES = registers()
    best = top[i]
    for p in static(DEEP):
        at = np.int32(begin + p * side + who)
        score[p] = dot8(
            k[p, 0], k[p, 1], k[p, 2], k[p, 3], k[p, 4], k[p, 5], k[p, 6], k[p, 7],
            query[i, 0], query[i, 1], query[i, 2], query[i, 3],
            query[i, 4], query[i, 5], query[i, 6], query[i, 7],
        ) * by[p, 0]  # fmt: skip
        for s in static(5):
            if 1 << s < LANES:
                score[p] += across(score[p], 1 << s)
        if at < low[i] or at >= high[i] or at >= np.int32(end):
            score[p] = np.float32(-3e38)
        best = most(best, score[p])
    shrink = power2(top[i] - best)
    top[i] = best
    mass[i] *= shrink
    for d in static(8):
        acc[i, d] *= shrink
    for p in static(DEEP):
        weight = power2(score[p] - best)
        mass[i] += weight
        weight *= by[p, 1]
        (
            acc[i, 0], acc[i, 1], acc[i, 2], acc[i, 3],
            acc[i, 4], acc[i, 5], acc[i, 6], acc[i, 7],
        ) = add8(
            v[p, 0], v[p, 1], v[p, 2], v[p, 3], v[p, 4], v[p, 5], v[p, 6], v[p, 7], weight,
            acc[i, 0], acc[i, 1], acc[i, 2], acc[i, 3],
            acc[i, 4], acc[i, 5], acc[i, 6], acc[i, 7],
        )  # fmt: skip


@inlined
def _keep(state: Any, acc: Any, top: Any, mass: Any, who: Any, lane: Any, dim: Any) -> None:
    """All states side by side: column d stands at (d & 7) * PITCH + d // 8, so that no two lanes
    meet in a bank, neither here nor in `_join`.
    """
    Q = LANES = PITCH = SIZE = registers()
    for i in static(Q):
        mine = (who * Q + i) * SIZE
        for d in static(8):
            state[mine + d * PITCH + (lane & (LANES - 1))] = acc[i, d]
        if dim == 0:
            state[mine + SIZE - 2] = top[i]
            state[mine + SIZE - 1] = mass[i]
    cuda.syncthreads()


@inlined
def _join(
    state: Any, parts: Any, first: Any, rows: Any, whole: Any, side: Any, splits: Any,
) -> None:  # fmt: skip
    """One state of each row, from those of every group of lanes."""
    WIDTH = Q = PITCH = SIZE = registers()
    item = np.int64(cuda.threadIdx.x)
    while item < Q * WIDTH:
        i = item // WIDTH
        d = item - i * WIDTH
        best = np.float32(-1e30)
        other = np.int64(0)
        while other < side:
            best = most(best, state[(other * Q + i) * SIZE + SIZE - 2])
            other += 1
        value = np.float32(0)
        weight = np.float32(0)
        other = np.int64(0)
        while other < side:
            here = (other * Q + i) * SIZE
            shrink = power2(state[here + SIZE - 2] - best)
            value = fused(shrink, state[here + (d & 7) * PITCH + (d >> 3)], value)
            weight = fused(shrink, state[here + SIZE - 1], weight)
            other += 1
        row = first + i
        if row < rows:
            to = parts + ((whole * rows + row) * splits + np.int64(cuda.blockIdx.x)) * (
                (WIDTH + 2) * 4
            )
            write4f(to + d * 4, value)
            if d == 0:
                write4f(to + WIDTH * 4, best)
                write4f(to + WIDTH * 4 + 4, weight)
        item += np.int64(cuda.blockDim.x)


def _merge(parts: Any, y: Any, new: Any, group: Any, kv_heads: Any, splits: Any) -> None:
    """One row of y, a thread for each column, from what the splits have summed."""
    WIDTH = registers()
    d = np.int64(cuda.threadIdx.x)
    row = np.int64(cuda.blockIdx.x)
    whole = np.int64(cuda.blockIdx.y)
    await_last()
    begin = parts + (whole * new * group + row) * splits * ((WIDTH + 2) * 4)
    best = np.float32(-1e30)
    at = np.int64(0)
    while at < splits:
        best = most(best, read4f(begin + (at * (WIDTH + 2) + WIDTH) * 4))
        at += 1
    value = np.float32(0)
    weight = np.float32(0)
    at = np.int64(0)
    while at < splits:
        here = begin + at * (WIDTH + 2) * 4
        shrink = power2(read4f(here + WIDTH * 4) - best)
        value = fused(shrink, read4f(here + d * 4), value)
        weight = fused(shrink, read4f(here + WIDTH * 4 + 4), weight)
        at += 1
    sequence = whole // kv_heads
    token = row // group
    head = (whole - sequence * kv_heads) * group + row - token * group
    at = (sequence * new + token) * kv_heads * group + head
    write4f(y + (at * WIDTH + d) * 4, quotient(value, weight))


def kernels() -> dict[str, Kernel]:
    """The kernels by name."""
    found = {}
    for width in WIDTHS:
        for cache, size in (("fp16", 2), ("int8", 1)):
            shape = {"WIDTH": width, "BYTES": size}
            make = partial(unrolled, _append, **shape)
            found[f"append_{cache}_{width}"] = Kernel(make, "i" * 14 + "ff", 32)
            lanes = width // 8
            shape |= {"Q": QUERIES, "DEEP": 2, "LANES": lanes, "SIDES": THREADS // lanes}
            shape |= {"PITCH": lanes + 4, "SIZE": STATES[width]}
            make = partial(unrolled, _attend, **shape)
            found[f"attend_{cache}_{width}"] = Kernel(make, "i" * 10, THREADS, blocks=3)
        make = partial(unrolled, _merge, WIDTH=width)
        found[f"merge_{width}"] = Kernel(make, "i" * 6, width)
    return found
