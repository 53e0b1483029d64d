"""Linear layers on packed weights: y[m, n] = x[m, k] @ w[n, k]^T.

One kernel for each form of weights, kind of activations and tile. A tile is GROUPS times 16 rows of
weights by TOKENS rows of activations, all in registers: each weight is loaded and unpacked once a
tile, each activation is read once for all its groups.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from leangen_kernels.dots import (
    chunk_loader,
    code_0,
    code_1,
    code_2,
    code_3,
    sums,
    table_values,
)
from leangen_kernels.layout import FORMS, ROWS
from leangen_kernels.simd import (
    load_codes,
    load_floats,
    load_for_all,
    load_halves,
    load_int,
    multiply_add,
    prefetch,
    prefetch_soon,
    splat,
    splat_int,
    store_first_floats,
    store_floats,
    to_floats,
)
from leangen_kernels.units import SUPER
from leangen_kernels.unroll import inlined, registers, static, unrolled
from leangen_kernels.vectors import VARIANT

_MANY_REGISTERS = VARIANT.dot == "vnni512"
FP32_TILES = ((1, 1), (4, 1))
"""Tokens and groups of a tile. The caller chooses the tile, and need not fill the last one."""


def int8_tiles(bits: int) -> tuple[tuple[int, int], ...]:
    """The same for int8 activations."""
    if not _MANY_REGISTERS:
        return (1, 1), (2, 1), (4, 1), (8, 1)
    # One row or two take their weights from memory as one stream: four at once took twice as long.
    # Codes that lie across vectors take registers to put together that four groups do not leave.
    return (1, 1), (2, 1), (4, 1 if 8 % bits else 4)


# How far ahead of the codes being used to ask for more. One row of activations is over so fast
# that the prefetcher of older hardware does not keep memory busy; that of newer one does better.
_AHEAD = 1536
_PREFETCH = not _MANY_REGISTERS
# A tile of many rows is long over its weights: while it meets its first rows, ask for the next one.
_PREFETCH_TILE = _MANY_REGISTERS

# What a form and a tile fix, see `kernels`.
CENTER = CODE_BYTES = BLOCK = BLOCK_BYTES = PER = SPAN = DOTS = TOKENS = GROUPS = 0
MINIMUM = False
load_chunk: Any = None
begin_sum: Any = None
dot: Any = None
end_sum: Any = None


def int8(
    x: int, w: int, blocks: int, y: int, y_stride: int, tokens: int, n: int, first: int,
    last: int, held: int,
) -> None:  # fmt: skip
    """Groups `first` to `last` of the outputs, from activations of int8 blocks.

    `x` is the address of packed tiles of TOKENS rows, `w` that of the whole packed matrix, `y` that
    of output [0, 0]; `y_stride` is in bytes. `held` is how scales are: 0 fp16, 1 fp32, 2 split.
    """
    at, unit, codes, total, partial, product, start, scale, minimum = (
        registers(), registers(), registers(), registers(), registers(), registers(), registers(),
        registers(), registers(),
    )  # fmt: skip
    number_bytes, unit_bytes = 2 * ROWS * (1 + held), 0
    if held == 2:
        number_bytes, unit_bytes = ROWS, (1 + MINIMUM) * 2 * ROWS
    block_bytes = CODE_BYTES + (1 + MINIMUM) * number_bytes
    group_bytes = blocks * block_bytes + (blocks + PER - 1) // PER * unit_bytes
    for group in range(first, last, GROUPS):
        for token in range(0, tokens, TOKENS):
            for g in static(GROUPS):
                at[g] = w + min(group + g, last - 1) * group_bytes
                unit[g] = at[g]
                for t in static(TOKENS):
                    total[g, t] = splat(0.0)
            x_at = x + token * blocks * BLOCK_BYTES
            next_tile = 0
            if token == 0:
                next_tile = GROUPS * group_bytes
            for block in range(blocks):
                if unit_bytes and block % PER == 0:
                    for g in static(GROUPS):
                        unit[g] = at[g]
                        at[g] += unit_bytes
                prefetch_codes(at, next_tile)
                for t in static(TOKENS):
                    if CENTER:
                        start[t] = load_int(x_at, BLOCK_BYTES * t + BLOCK + 4)
                    else:
                        start[t] = 0
                    for g in static(GROUPS):
                        partial[g, t] = begin_sum(start[t])
                dot_block(product, partial, start, codes, at, x_at)
                read_scales(scale, at, unit, held)
                for t in static(TOKENS):
                    scale_t = load_for_all(x_at, BLOCK_BYTES * t + BLOCK)
                    for g in static(GROUPS):
                        total[g, t] = multiply_add(
                            scale[g] * scale_t, to_floats(product[g, t]), total[g, t]
                        )
                if MINIMUM:
                    add_minimums(total, minimum, start, at, unit, x_at, held)
                for g in static(GROUPS):
                    at[g] += block_bytes
                x_at += BLOCK_BYTES * TOKENS
            store_tile(total, y, y_stride, tokens, n, last, group, token)


@inlined
def prefetch_codes(at: Any, next_tile: int) -> None:
    """Ask for the codes that are used later."""
    if _PREFETCH and TOKENS == 1:
        for g in static(GROUPS):
            for line in static((CODE_BYTES + 127) // 64):
                prefetch(at[g], _AHEAD + 64 * line)
    if _PREFETCH_TILE and TOKENS > 2:
        for g in static(GROUPS):
            for line in static((CODE_BYTES + 127) // 64):
                prefetch_soon(at[g], next_tile + 64 * line)


@inlined
def dot_block(product: Any, partial: Any, start: Any, codes: Any, at: Any, x_at: int) -> None:
    """The integer products of a block of weights and activations."""
    for span in static(BLOCK // 4 // SPAN):
        for g in static(GROUPS):
            for c in static(SPAN):
                codes[c] = load_chunk[SPAN * span + c](at[g])
            for t in static(TOKENS):
                for c in static(SPAN):
                    four = BLOCK_BYTES * t + 4 * (SPAN * span + c)
                    partial[g, t] = dot(partial[g, t], codes[c], x_at, four)
                if SPAN * (span + 1) == DOTS:
                    product[g, t] = end_sum(partial[g, t], start[t])
                elif SPAN * (span + 1) % DOTS == 0:
                    product[g, t] = product[g, t] + end_sum(partial[g, t], 0)
                if SPAN * (span + 1) % DOTS == 0:
                    partial[g, t] = begin_sum(0)


@inlined
def read_scales(scale: Any, at: Any, unit: Any, held: int) -> None:
    """What the codes of a block are multiplied by, of every group."""
    for g in static(GROUPS):
        if held == 2:
            scale[g] = load_codes(at[g], CODE_BYTES) * load_halves(unit[g], 0)
        elif held:
            scale[g] = load_floats(at[g], CODE_BYTES)
        else:
            scale[g] = load_halves(at[g], CODE_BYTES)


@inlined
def read_minimums(minimum: Any, at: Any, unit: Any, held: int) -> None:
    """What a code of 0 stands for in a block, of every group."""
    for g in static(GROUPS):
        if held == 2:
            minimum[g] = load_codes(at[g], CODE_BYTES + ROWS)
            minimum[g] = minimum[g] * load_halves(unit[g], 2 * ROWS)
        elif held:
            minimum[g] = load_floats(at[g], CODE_BYTES + 4 * ROWS)
        else:
            minimum[g] = load_halves(at[g], CODE_BYTES + 2 * ROWS)


@inlined
def add_minimums(
    total: Any, minimum: Any, start: Any, at: Any, unit: Any, x_at: int, held: int
) -> None:
    """Add a block's minima, each times the sum of the activations."""
    read_minimums(minimum, at, unit, held)
    for t in static(TOKENS):
        if CENTER:
            sums = to_floats(splat_int(start[t])) * splat(-1.0 / CENTER)
            sums = sums * load_for_all(x_at, BLOCK_BYTES * t + BLOCK)
        else:
            sums = load_for_all(x_at, BLOCK_BYTES * t + BLOCK + 4)
        for g in static(GROUPS):
            total[g, t] = multiply_add(minimum[g], sums, total[g, t])


@inlined
def store_tile(
    total: Any, y: int, y_stride: int, tokens: int, n: int, last: int, group: int, token: int
) -> None:
    """Write the rows and columns of a tile that there are."""
    for g in static(GROUPS):
        rows = n - ROWS * (group + g)
        for t in static(TOKENS):
            if token + t < tokens and group + g < last:
                y_at = y + (token + t) * y_stride + 4 * ROWS * (group + g)
                if rows >= ROWS:
                    store_floats(y_at, total[g, t])
                else:
                    store_first_floats(y_at, total[g, t], rows)


def fp32(
    x: int, w: int, blocks: int, y: int, y_stride: int, tokens: int, n: int, first: int,
    last: int, held: int,
) -> None:  # fmt: skip
    """The same from fp32 activations, which are not rounded at all; GROUPS is 1."""
    at, unit, total, product, scale, minimum = (
        registers(), registers(), registers(), registers(), registers(), registers(),
    )  # fmt: skip
    number_bytes, unit_bytes = 2 * ROWS * (1 + held), 0
    if held == 2:
        number_bytes, unit_bytes = ROWS, (1 + MINIMUM) * 2 * ROWS
    block_bytes = CODE_BYTES + (1 + MINIMUM) * number_bytes
    group_bytes = blocks * block_bytes + (blocks + PER - 1) // PER * unit_bytes
    for group in range(first, last):
        rows = n - ROWS * group
        for token in range(0, tokens, TOKENS):
            at[0] = w + group * group_bytes
            unit[0] = at[0]
            for t in static(TOKENS):
                total[t] = splat(0.0)
            x_at = x + token * blocks * BLOCK_BYTES
            for block in range(blocks):
                if unit_bytes and block % PER == 0:
                    unit[0] = at[0]
                    at[0] += unit_bytes
                for t in static(TOKENS):
                    if CENTER:
                        product[t] = load_for_all(x_at, BLOCK_BYTES * t + 4 * BLOCK)
                    else:
                        product[t] = splat(0.0)
                for c in static(BLOCK // 4):
                    four = load_chunk[c](at[0])
                    w_0, w_1, w_2, w_3 = code_0(four), code_1(four), code_2(four), code_3(four)
                    for t in static(TOKENS):
                        x_t = x_at + BLOCK_BYTES * t
                        product[t] = multiply_add(w_0, load_for_all(x_t, 16 * c), product[t])
                        product[t] = multiply_add(w_1, load_for_all(x_t, 16 * c + 4), product[t])
                        product[t] = multiply_add(w_2, load_for_all(x_t, 16 * c + 8), product[t])
                        product[t] = multiply_add(w_3, load_for_all(x_t, 16 * c + 12), product[t])
                read_scales(scale, at, unit, held)
                for t in static(TOKENS):
                    total[t] = multiply_add(scale[0], product[t], total[t])
                if MINIMUM:
                    read_minimums(minimum, at, unit, held)
                    for t in static(TOKENS):
                        sums = load_for_all(x_at, BLOCK_BYTES * t + 4 * BLOCK)
                        if CENTER:
                            sums = sums * splat(-1.0 / CENTER)
                        total[t] = multiply_add(minimum[0], sums, total[t])
                at[0] += block_bytes
                x_at += BLOCK_BYTES * TOKENS
            for t in static(TOKENS):
                if token + t < tokens:
                    y_at = y + (token + t) * y_stride + 4 * ROWS * group
                    if rows >= ROWS:
                        store_floats(y_at, total[t])
                    else:
                        store_first_floats(y_at, total[t], rows)


def kernels() -> dict[str, tuple[Callable[..., Any], str]]:
    """Name of each kernel -> what makes its function, and the C types of its arguments."""
    found: dict[str, tuple[Callable[..., Any], str]] = {}
    fixed: dict[str, Any]
    for form in FORMS.values():
        if form.held and not form.table:
            continue  # the same kernels as for fp16
        fixed = {
            "CENTER": form.center, "MINIMUM": form.minimum,
            "ROWS": ROWS, "BLOCK": form.block, "PER": SUPER // form.block,
            "CODE_BYTES": form.code_bytes,
            "_PREFETCH": _PREFETCH, "_PREFETCH_TILE": _PREFETCH_TILE,
        }  # fmt: skip
        fixed |= {f"load_chunk_{c}": chunk_loader(pieces) for c, pieces in enumerate(form.chunks)}
        if form.table:
            fixed |= {f"code_{i}": code for i, code in enumerate(table_values(form.table))}
        else:
            names = ("DOTS", "begin_sum", "dot", "end_sum")
            fixed |= dict(zip(names, sums(form.bits, form.block // 4), strict=True))
            fixed["SPAN"] = 8 // form.bits  # chunks at once: whole codes in a byte
            for tokens, groups in int8_tiles(form.bits):
                found[f"int8_{form.kernel}_{tokens}"] = (
                    partial(
                        unrolled, int8, TOKENS=tokens, GROUPS=groups,
                        BLOCK_BYTES=form.int8_block_bytes, **fixed,
                    ), "i" * 10,
                )  # fmt: skip
        for tokens, groups in FP32_TILES:
            make = partial(
                unrolled,
                fp32,
                TOKENS=tokens,
                GROUPS=groups,
                BLOCK_BYTES=form.fp32_block_bytes,
                **fixed,
            )
            found[f"fp32_{form.kernel}_{tokens}"] = (make, "i" * 10)
    return found
