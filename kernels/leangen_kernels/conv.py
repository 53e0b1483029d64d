"""Convolution as a matrix product over pixels: y[n, pixels] = w[n, k] @ patches[k, pixels].

Lanes are pixels, so that images stay as ONNX has them, [channels, height, width]. `activate` copies
the part of an image at hand, normed and activated, into a padded one in fp32, `pack_patches` rounds
the patch of each output pixel to 8 bits on a scale of its own, `multiply` does the rest. Patches
rather than pixels are rounded because all of a patch's products can then be summed as integers:
weights may have their scales in any blocks along k.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from leangen_kernels.conv_layout import OUTPUTS
from leangen_kernels.conv_simd import (
    CENTER,
    activation_dot,
    centered,
    exponential_of_2,
    join_codes,
    smaller,
    store_bytes,
)
from leangen_kernels.dots import chunk_loader
from leangen_kernels.layout import FORMS, ROWS
from leangen_kernels.rows import TINY
from leangen_kernels.simd import (
    ROUNDER,
    larger,
    load_bytes,
    load_first_floats,
    load_floats,
    load_for_all,
    load_int,
    multiply_add,
    only_first,
    prefetch,
    splat,
    splat_int,
    square_root,
    store_first_floats,
    store_float,
    store_floats,
    sum_floats,
    to_floats,
)
from leangen_kernels.unroll import inlined, registers, static, unrolled

# What a kernel's name fixes, see `kernels`.
SILU = False
VECTORS = 0
load_chunk: Any = None

LOG2_E = 1.4426950408889634
LEVELS = 252.0
"""Steps of an 8-bit patch from its lowest to its highest value."""


def moments(x: int, n: int, out: int, epsilon: float) -> None:
    """Two floats: the mean of n floats, and 1 / sqrt(their variance + epsilon)."""
    total, squares = registers(), registers()
    for i in static(4):
        total[i] = squares[i] = splat(0.0)
    whole = n // (4 * ROWS) * 4 * ROWS
    for at in range(x, x + 4 * whole, 16 * ROWS):
        for i in static(4):
            total[i] = total[i] + load_floats(at, 4 * ROWS * i)
    for i in range(whole, n, ROWS):
        total[0] = total[0] + load_first_floats(x + 4 * i, n - i)
    mean = sum_floats((total[0] + total[1]) + (total[2] + total[3])) / n
    middle = splat(mean)
    for at in range(x, x + 4 * whole, 16 * ROWS):
        for i in static(4):
            off = load_floats(at, 4 * ROWS * i) - middle
            squares[i] = multiply_add(off, off, squares[i])
    for i in range(whole, n, ROWS):
        off = only_first(load_first_floats(x + 4 * i, n - i) - middle, n - i)
        squares[0] = multiply_add(off, off, squares[0])
    variance = sum_floats((squares[0] + squares[1]) + (squares[2] + squares[3]))
    store_float(out, mean)
    store_float(out + 4, 1.0 / square_root(variance / n + epsilon))


def activate(
    x: int, x_stride: int, y: int, y_stride: int, low: int, high: int, n: int, channels: int,
    gains: int, slope: float,
) -> None:  # fmt: skip
    """n pixels of each channel through gain * x + shift and an activation, with their ranges.

    Strides are bytes from one channel to the next; `gains` is [channels, 2]. `low` and `high` get
    the range of each pixel over its channels and zero. The activation is SiLU, or max(x, slope x).
    """
    for i in range(0, n, ROWS):
        left = n - i
        least, most = splat(0.0), splat(0.0)
        x_at, y_at, gain_at = x + 4 * i, y + 4 * i, gains
        for _ in range(channels):
            value = load_floats(x_at, 0) if left >= ROWS else load_first_floats(x_at, left)
            prefetch(x_at, 4 * ROWS)  # a channel's next line, which no machine foresees
            value = multiply_add(value, load_for_all(gain_at, 0), load_for_all(gain_at, 4))
            if SILU:
                power = smaller(value * splat(-LOG2_E), splat(126.0))
                value = value / (splat(1.0) + exponential_of_2(power))
            else:
                value = larger(value, value * splat(slope))
            least, most = smaller(value, least), larger(value, most)
            if left >= ROWS:
                store_floats(y_at, value)
            else:
                store_first_floats(y_at, value, left)
            x_at += x_stride
            y_at += y_stride
            gain_at += 8
        store_first_floats(low + 4 * i, least, left)
        store_first_floats(high + 4 * i, most, left)


def pack_patches(
    image: int, low: int, high: int, offsets: int, fours: int, taps: int, count: int, out: int,
    out_stride: int, scales: int,
) -> None:  # fmt: skip
    """Patches of 16 pixels side by side as bytes [fours, 16, 4], `out_stride` between fours.

    `image`, `low` and `high` are the places of the first pixel; `offsets` int32 [4 * fours] is
    where the weights' elements are from there, in bytes, and `taps` int32 [count] the same within
    `low` and `high`. `scales` gets the 16 scales and the 16 codes that stand for zero, less CENTER.
    """
    code = registers()
    least, most = splat(0.0), splat(0.0)
    for _ in range(count):
        offset = load_int(taps, 0)
        least = smaller(load_floats(low, offset), least)
        most = larger(load_floats(high, offset), most)
        taps += 4
    span = most - least
    kept = larger(span, splat(TINY))
    inverse = splat(LEVELS) / kept
    zero = splat(2.0 + ROUNDER) - least * inverse
    store_floats(scales, kept * splat(1.0 / LEVELS))
    store_floats(scales + 4 * ROWS, zero - splat(ROUNDER + CENTER))
    for _ in range(fours):
        for i in static(4):
            code[i] = multiply_add(load_floats(image, load_int(offsets, 4 * i)), inverse, zero)
        store_bytes(out, join_codes(code[0], code[1], code[2], code[3]))
        offsets += 16
        out += out_stride


def multiply(
    patches: int, scales: int, codes: int, numbers: int, fours: int, block: int, y: int,
    y_stride: int, pixels: int, outputs: int, bias: int, residual: int,
) -> None:  # fmt: skip
    """A tile of `outputs` outputs by VECTORS times 16 pixels, of which `pixels` are stored.

    `patches` and `scales` are as `pack_patches` left them, a vector after the other; `codes` and
    `numbers` groups of weights as conv_layout.py says, with `block` fours to a scale. `residual`,
    at the same places as `y`, is added unless 0.
    """
    total, part, four = registers(), registers(), registers()
    ahead = residual
    while outputs > 0:
        if residual != 0:  # the next group's, and the first one's too: rows are far apart
            while ahead <= residual + OUTPUTS * y_stride:
                for o in static(OUTPUTS):
                    for v in static(VECTORS):
                        prefetch(ahead + o * y_stride, 4 * ROWS * v)
                ahead += OUTPUTS * y_stride
        for o in static(OUTPUTS):
            for v in static(VECTORS):
                total[o, v] = splat(0.0)
        at, left = patches, fours
        while left > 0:
            for o in static(OUTPUTS):
                for v in static(VECTORS):
                    part[o, v] = splat_int(0)
            for _ in range(min(block, left)):
                for v in static(VECTORS):
                    four[v] = load_bytes(at, 4 * ROWS * v)
                for o in static(OUTPUTS):
                    for v in static(VECTORS):
                        part[o, v] = activation_dot(part[o, v], four[v], codes, 4 * o)
                at += 4 * ROWS * VECTORS
                codes += 4 * OUTPUTS
            for o in static(OUTPUTS):
                scale = load_for_all(numbers, 4 * o)
                for v in static(VECTORS):
                    total[o, v] = multiply_add(to_floats(part[o, v]), scale, total[o, v])
            numbers += 4 * OUTPUTS
            left -= block
        for v in static(VECTORS):
            scale, zero = (
                load_floats(scales, 8 * ROWS * v),
                load_floats(scales, 8 * ROWS * v + 4 * ROWS),
            )
            for o in static(OUTPUTS):
                value = total[o, v] - zero * load_for_all(numbers, 4 * o)
                total[o, v] = multiply_add(value, scale, load_for_all(bias, 4 * o))
        store_group(total, y, y_stride, residual, pixels, outputs)
        numbers += 4 * OUTPUTS
        bias += 4 * OUTPUTS
        y += OUTPUTS * y_stride
        if residual != 0:
            residual += OUTPUTS * y_stride
        outputs -= OUTPUTS


@inlined
def store_group(
    total: Any, y: int, y_stride: int, residual: int, pixels: int, outputs: int
) -> None:
    """Write the outputs and pixels of a group that there are, the residual added."""
    whole = pixels >= ROWS * VECTORS
    for o in static(OUTPUTS):
        if o < outputs:
            for v in static(VECTORS):
                to, rest = o * y_stride + 4 * ROWS * v, pixels - ROWS * v
                if residual != 0:
                    if whole:
                        more = load_floats(residual, to)
                    else:
                        more = load_first_floats(residual + to, rest)
                    total[o, v] = total[o, v] + more
                if whole:
                    store_floats(y + to, total[o, v])
                else:
                    store_first_floats(y + to, total[o, v], rest)


def unpack_nibbles(packed: int, codes: int, chunks: int) -> None:
    """Bytes of weights from nibbles: chunks of 64 bytes, low halves first, become 128."""
    for _ in range(chunks):
        for half in static(2):
            store_bytes(codes + 64 * half, centered(load_chunk[half](packed)))
        packed += 64
        codes += 128


def kernels() -> dict[str, tuple[Callable[..., Any], str]]:
    """Name of each kernel -> what makes its function, and the C types of its arguments."""
    fixed = {"ROWS": ROWS, "OUTPUTS": OUTPUTS, "LOG2_E": LOG2_E}
    nibbles = {f"load_chunk_{half}": chunk_loader(FORMS["q4"].chunks[half]) for half in range(2)}
    found: dict[str, tuple[Callable[..., Any], str]] = {
        "moments": (partial(unrolled, moments, **fixed), "iiid"),
        "activate_linear": (partial(unrolled, activate, SILU=False, **fixed), "i" * 9 + "d"),
        "activate_silu": (partial(unrolled, activate, SILU=True, **fixed), "i" * 9 + "d"),
        "pack_patches": (partial(unrolled, pack_patches, **fixed), "i" * 10),
        "unpack_nibbles": (partial(unrolled, unpack_nibbles, **nibbles), "iii"),
    }
    for vectors in (1, 2):
        make = partial(unrolled, multiply, VECTORS=vectors, **fixed)
        found[f"conv_{vectors}"] = (make, "i" * 12)
    return found
