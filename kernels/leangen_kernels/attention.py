"""Grouped-query attention of a few query rows to the cached keys and values of one head.

Keys stand in blocks of 16 positions, [capacity / 16, width, 16], so that the scores of 16 keys
need no horizontal sum; values stand as they are, [capacity, width]. Scores are kept for the few
rows at hand only, and never leave the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from leangen_kernels.layout import ROWS
from leangen_kernels.simd import (
    exponential,
    larger,
    largest,
    load_floats,
    load_for_all,
    multiply_add,
    only_between,
    splat,
    store_floats,
    sum_floats,
)
from leangen_kernels.unroll import registers, static, unrolled

QUERIES = 4
"""Query rows worked on at once."""


def attend(
    q: int, keys: int, values: int, scores: int, y: int, width: int, row: int, group: int,
    past: int, new: int, window: int,
) -> None:  # fmt: skip
    """softmax(q K^T) V for QUERIES rows, of which row r sees the keys up to `past + r // group`.

    Rows of tokens beyond `new` see what the last one sees; nobody looks at them.
    `q` is [width, QUERIES], scaled; `y` is [QUERIES, width]; width is a multiple of 16. With a
    `window` above 0, only the last `window` of those keys are seen. `scores` has room for a
    multiple of 16 of keys for each row.
    """
    limit, low, score, peak, total, inverse, out = (
        registers(), registers(), registers(), registers(), registers(), registers(), registers(),
    )  # fmt: skip
    for t in static(QUERIES):
        limit[t] = past + min((row + t) // group + 1, new)
        low[t] = 0
        if window > 0:
            low[t] = max(0, limit[t] - window)
        peak[t] = splat(-1e30)
        total[t] = splat(0.0)
    begin = low[0] // ROWS * ROWS
    end = limit[QUERIES - 1]
    scores_at = scores
    for key in range(begin, end, ROWS):
        key_at, q_at = keys + 4 * width * key, q
        for t in static(QUERIES):
            score[t] = splat(0.0)
        for _ in range(width):
            one = load_floats(key_at, 0)
            for t in static(QUERIES):
                score[t] = multiply_add(one, load_for_all(q_at, 4 * t), score[t])
            key_at += 4 * ROWS
            q_at += 4 * QUERIES
        for t in static(QUERIES):
            score[t] = only_between(score[t], low[t] - key, limit[t] - key)
            peak[t] = larger(peak[t], score[t])
            store_floats(scores_at + 4 * ROWS * t, score[t])
        scores_at += 4 * ROWS * QUERIES
    for t in static(QUERIES):
        peak[t] = splat(largest(peak[t]))
    scores_at = scores
    for _ in range(begin, end, ROWS):
        for t in static(QUERIES):
            score[t] = exponential(load_floats(scores_at, 4 * ROWS * t) - peak[t])
            total[t] = total[t] + score[t]
            store_floats(scores_at + 4 * ROWS * t, score[t])
        scores_at += 4 * ROWS * QUERIES
    for t in static(QUERIES):
        inverse[t] = splat(1.0 / sum_floats(total[t]))
    for column in range(0, width, ROWS):
        for t in static(QUERIES):
            out[t] = splat(0.0)
        value_at, scores_at = values + 4 * (width * begin + column), scores
        for key in range(begin, end, ROWS):
            for i in range(min(ROWS, end - key)):
                one = load_floats(value_at, 0)
                for t in static(QUERIES):
                    out[t] = multiply_add(
                        one, load_for_all(scores_at + 4 * i, 4 * ROWS * t), out[t]
                    )
                value_at += 4 * width
            scores_at += 4 * ROWS * QUERIES
        for t in static(QUERIES):
            store_floats(y + 4 * (width * t + column), out[t] * inverse[t])


def kernels() -> dict[str, tuple[Callable[..., Any], str]]:
    """Name of each kernel -> what makes its function, and the C types of its arguments."""
    return {"attend": (partial(unrolled, attend, QUERIES=QUERIES, ROWS=ROWS), "i" * 11)}
