"""Grouped-query attention of a few query rows to a stretch of one head's cached keys and values.

The cache is laid out as cache_layout.py says. Work is cut at every CHUNK positions: `attend` leaves
a part of the softmax, `merge` joins two of them and `finish` divides, always in this order, so that
a row's bits depend neither on the threads nor on the other rows (Milakov and Gimelshein 2018).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from leangen_kernels.cache_layout import CACHES
from leangen_kernels.layout import ROWS
from leangen_kernels.simd import (
    exponential,
    larger,
    largest,
    load_codes,
    load_float,
    load_floats,
    load_for_all,
    load_halves,
    multiply_add,
    only_between,
    prefetch,
    splat,
    store_float,
    store_floats,
    sum_floats,
)
from leangen_kernels.unroll import inlined, registers, static, unrolled
from leangen_kernels.vectors import VARIANT

CHUNK = 64
"""Positions whose share of the softmax is found at once."""

# Query rows, vectors of a value row, and blocks of keys that are held in registers. One kernel must
# be (4, 1, 1), which does any width; of the others, the C side takes those that fit.
_MANY_REGISTERS = ((4, 1, 1), (4, 4, 2), (8, 2, 2))
TILES = _MANY_REGISTERS if VARIANT.dot == "vnni512" else ((4, 1, 1),)

# For few rows memory is what takes the time: while keys are used ask for their values, while these
# are, for the next chunk's keys. (One line is asked for twice where a row of 16 is half a line.)
_ASK = VARIANT.dot == "vnni512"

# What a cache and a tile fix, see `kernels`.
QUERIES = COLUMNS = BLOCKS = SIZE = 0
SCALED = ASK = False
load = load_floats


def attend(
    q: int, keys: int, values: int, scores: int, state: int, width: int, row: int, group: int,
    past: int, new: int, window: int, begin: int,
) -> None:  # fmt: skip
    """The part of softmax(q K^T) V that CHUNK positions from `begin` have in QUERIES rows.

    Row r sees the keys up to `past + r // group`, rows of tokens beyond `new` what the last one
    sees; with a `window` above 0, only the last `window` of those. `q` is [width, QUERIES], scaled;
    `keys` and `values` are the addresses of position 0; `scores` is room for [CHUNK, QUERIES].
    `state` becomes sums of values [QUERIES, width], the largest scores and the sums of shares.
    """
    at, limit, low, score, peak, top, total, out = (
        registers(), registers(), registers(), registers(), registers(), registers(), registers(),
        registers(),
    )  # fmt: skip
    block_bytes = ROWS * (SIZE * width + 4 * SCALED)
    first_block = begin // ROWS * block_bytes
    next_keys = keys - values + CHUNK // ROWS * block_bytes
    for t in static(QUERIES):
        limit[t] = past + min((row + t) // group + 1, new)
        low[t] = 0
        if window > 0:
            low[t] = max(0, limit[t] - window)
        peak[t] = splat(-1e30)
        total[t] = splat(0.0)
    end = min(begin + CHUNK, limit[QUERIES - 1])
    key_at, scores_at = keys + first_block, scores
    for key in range(begin, end, ROWS * BLOCKS):
        score_blocks(score, at, q, keys, values, width, key, end, key_at, block_bytes)
        for i in static(BLOCKS):
            for t in static(QUERIES):
                if SCALED:
                    score[i, t] = score[i, t] * load_floats(at[i], 0)
                start = key + ROWS * i
                score[i, t] = only_between(score[i, t], low[t] - start, limit[t] - start)
                peak[t] = larger(peak[t], score[i, t])
                store_floats(scores_at + 4 * ROWS * t, score[i, t])
            scores_at += 4 * ROWS * QUERIES
        key_at += BLOCKS * block_bytes
    for t in static(QUERIES):
        top[t] = largest(peak[t])
        peak[t] = splat(top[t])
    share_out(score, total, peak, values, scores, begin, end, first_block, width, block_bytes)
    for t in static(QUERIES):
        store_float(state + 4 * (QUERIES * width + t), top[t])
        store_float(state + 4 * (QUERIES * (width + 1) + t), sum_floats(total[t]))
    for column in range(0, width, ROWS * COLUMNS):
        for t in static(QUERIES):
            for c in static(COLUMNS):
                out[t, c] = splat(0.0)
        add_values(
            out, values, scores, begin, end, first_block, width, column, block_bytes, next_keys,
        )  # fmt: skip
        for t in static(QUERIES):
            for c in static(COLUMNS):
                store_floats(state + 4 * (width * t + column + ROWS * c), out[t, c])


@inlined
def score_blocks(
    score: Any, at: Any, q: int, keys: int, values: int, width: int, key: int, end: int,
    key_at: int, block_bytes: int,
) -> None:  # fmt: skip
    """The products of all rows with BLOCKS blocks of keys."""
    for i in static(BLOCKS):
        at[i] = key_at
        if key + ROWS * i < end:
            at[i] = key_at + i * block_bytes  # else again the first; the caller masks it
        for t in static(QUERIES):
            score[i, t] = splat(0.0)
    q_at = q
    for _ in range(width):
        for i in static(BLOCKS):
            one = load(at[i], 0)
            if ASK:
                prefetch(at[i], values - keys)
            for t in static(QUERIES):
                score[i, t] = multiply_add(one, load_for_all(q_at, 4 * t), score[i, t])
            at[i] += ROWS * SIZE
        q_at += 4 * QUERIES


@inlined
def share_out(
    score: Any, total: Any, peak: Any, values: int, scores: int, begin: int, end: int,
    first_block: int, width: int, block_bytes: int,
) -> None:  # fmt: skip
    """Make scores the shares of their positions, times the values' scales."""
    value_at, scores_at = values + first_block, scores
    for _ in range(begin, end, ROWS):
        for t in static(QUERIES):
            score[t] = exponential(load_floats(scores_at, 4 * ROWS * t) - peak[t])
            total[t] = total[t] + score[t]
            if SCALED:
                score[t] = score[t] * load_floats(value_at, ROWS * width)
            store_floats(scores_at + 4 * ROWS * t, score[t])
        value_at += block_bytes
        scores_at += 4 * ROWS * QUERIES


@inlined
def add_values(
    out: Any, values: int, scores: int, begin: int, end: int, first_block: int, width: int,
    column: int, block_bytes: int, next_keys: int,
) -> None:  # fmt: skip
    """Sum COLUMNS vectors of the values' columns, each position by its share."""
    block_at, scores_at = values + first_block + SIZE * column, scores
    for key in range(begin, end, ROWS):
        value_at = block_at
        for i in range(min(ROWS, end - key)):
            for c in static(COLUMNS):
                one = load(value_at, SIZE * ROWS * c)
                if ASK:
                    prefetch(value_at, next_keys + SIZE * ROWS * c)
                for t in static(QUERIES):
                    share = load_for_all(scores_at + 4 * i, 4 * ROWS * t)
                    out[t, c] = multiply_add(one, share, out[t, c])
            value_at += SIZE * width
        block_at += block_bytes
        scores_at += 4 * ROWS * QUERIES


def merge(state: int, more: int, width: int, queries: int) -> None:
    """Add another part of the softmax to `state`."""
    for t in range(queries):
        top_at, total_at = 4 * (queries * width + t), 4 * (queries * (width + 1) + t)
        top, other = load_float(state, top_at), load_float(more, top_at)
        both = max(top, other)
        kept, added = exponential(splat(top - both)), exponential(splat(other - both))
        store_float(state + top_at, both)
        total = load_for_all(state, total_at) * kept
        total = multiply_add(load_for_all(more, total_at), added, total)
        store_float(state + total_at, largest(total))
        for column in range(4 * width * t, 4 * width * (t + 1), 4 * ROWS):
            value = load_floats(state, column) * kept
            value = multiply_add(load_floats(more, column), added, value)
            store_floats(state + column, value)


def finish(state: int, y: int, width: int, queries: int, t: int) -> None:
    """Row `t` of the softmax whose parts are all in `state`."""
    inverse = splat(1.0 / load_float(state, 4 * (queries * (width + 1) + t)))
    for column in range(0, 4 * width, 4 * ROWS):
        store_floats(y + column, load_floats(state, 4 * width * t + column) * inverse)


def kernels() -> dict[str, tuple[Callable[..., Any], str]]:
    """Name of each kernel -> what makes its function, and the C types of its arguments."""
    loads = {"fp32": load_floats, "fp16": load_halves, "int8": load_codes}
    found: dict[str, tuple[Callable[..., Any], str]] = {
        "merge": (partial(unrolled, merge), "i" * 4),
        "finish": (partial(unrolled, finish), "i" * 5),
    }
    for cache in CACHES.values():
        for queries, columns, blocks in TILES:
            make = partial(
                unrolled, attend, QUERIES=queries, COLUMNS=columns, BLOCKS=blocks, CHUNK=CHUNK,
                ROWS=ROWS, SIZE=cache.size, SCALED=cache.scaled, load=loads[cache.name],
                ASK=_ASK and queries == 4,
            )  # fmt: skip
            found[f"attend_{cache.name}_{queries}_{columns}"] = (make, "i" * 12)
    return found
