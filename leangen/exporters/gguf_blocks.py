"""GGUF's quantized blocks in the form that ORT computes with, bit for bit.

Every ggml format below is, per block of `block_size` weights along a row,

    w = scale * (code - 2**(bits - 1)) + offset

with integer codes and an offset that only the asymmetric formats have. `MatMulNBits` multiplies
by the first term at full speed; `offset` multiplies the sum of x over the block:

    W x = MatMulNBits(x) + offsets @ blocksum(x)

So nothing is quantized again: codes are moved, scales and offsets are widened from fp16 to fp32
(exactly; an offset that is a sum, such as m + 8 d, is rounded once to fp32). Formats are those of
ggml's `ggml-quants.h`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Bytes = np.ndarray[Any, Any]  # uint8; NumPy's stubs lose that in `codes & 15`
Floats = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True)
class Blocks:
    """One weight matrix [n, k] of low-bit blocks along k."""

    form: str
    """The ggml format it came in, such as `Q4_1`."""
    bits: int
    """4 or 8: the width of a stored code."""
    block_size: int
    codes: Bytes
    """[n, k / block_size, block_size * bits / 8], low nibble first."""
    scales: Floats
    """[n, k / block_size]"""
    offsets: Floats | None
    """[n, k / block_size], or None: symmetric around 2**(bits - 1)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k): rows are outputs."""
        n, blocks = self.scales.shape
        return n, blocks * self.block_size

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk per weight: codes, fp32 scales and fp32 offsets."""
        return self.bits + (32 if self.offsets is None else 64) / self.block_size

    def dequantize(self) -> Floats:
        """The float32 [n, k] that the blocks stand for."""
        codes = self.codes
        if self.bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:2], -1)
        centred = codes.astype(np.float32) - np.float32(1 << (self.bits - 1))
        w = self.scales[..., None] * centred
        if self.offsets is not None:
            w += self.offsets[..., None]
        return w.reshape(self.shape)


def stack(parts: Sequence[Blocks]) -> Blocks:
    """Matrices of one form and one k, on top of each other."""
    first = parts[0]
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return Blocks(
        first.form,
        first.bits,
        first.block_size,
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scales for part in parts]),
        np.concatenate(offsets) if offsets else None,
    )


def unpack(form: str, data: Bytes) -> Blocks:
    """The blocks of a GGUF tensor; `data` is uint8 [n, bytes of a row], `form` in `FORMS`."""
    return FORMS[form](data)


def _fields(data: Bytes, *sizes: int) -> list[Bytes]:
    """Split each block of sum(sizes) bytes into its fields, each [n, blocks, size]."""
    blocks = data.reshape(data.shape[0], -1, sum(sizes))
    return np.split(blocks, np.cumsum(sizes)[:-1], axis=2)


def _half(field: Bytes) -> Floats:
    """fp16 bytes [n, blocks, 2 m] to float32 [n, blocks, m]."""
    return np.ascontiguousarray(field).view(np.float16).astype(np.float32)


def _nibbles(field: Bytes, run: int = 16) -> Bytes:
    """ggml's nibbles, unpacked: each run of bytes holds `run` low codes, then as many high ones."""
    n, blocks, size = field.shape
    runs = field.reshape(n, blocks, size // run, 1, run)
    return np.concatenate([runs & 15, runs >> 4], axis=3).reshape(n, blocks, 2 * size)


def _pack4(codes: Bytes, block_size: int) -> Bytes:
    """Codes 0..15 to ORT's order: neighbours share a byte, the even one low."""
    pairs = codes.reshape(codes.shape[0], -1, block_size // 2, 2)
    packed: Bytes = pairs[..., 0] | (pairs[..., 1] << 4)
    return packed


def _q4_0(data: Bytes) -> Blocks:
    d, qs = _fields(data, 2, 16)
    return Blocks("Q4_0", 4, 32, _pack4(_nibbles(qs), 32), _half(d)[..., 0], None)


def _q4_1(data: Bytes) -> Blocks:
    d, m, qs = _fields(data, 2, 2, 16)
    scale = _half(d)[..., 0]
    offset = _half(m)[..., 0] + 8 * scale
    return Blocks("Q4_1", 4, 32, _pack4(_nibbles(qs), 32), scale, offset)


def _fifth_bits(qh: Bytes, qs: Bytes) -> Bytes:
    """Codes 0..31 of Q5_0 and Q5_1, centred on 128: nibbles, and a bit field of fifth bits."""
    high = np.unpackbits(np.ascontiguousarray(qh), axis=2, bitorder="little")
    codes: Bytes = (_nibbles(qs) | (high << 4)) + np.uint8(128 - 16)
    return codes


def _q5_0(data: Bytes) -> Blocks:
    d, qh, qs = _fields(data, 2, 4, 16)
    return Blocks("Q5_0", 8, 32, _fifth_bits(qh, qs), _half(d)[..., 0], None)


def _q5_1(data: Bytes) -> Blocks:
    d, m, qh, qs = _fields(data, 2, 2, 4, 16)
    scale = _half(d)[..., 0]
    offset = _half(m)[..., 0] + 16 * scale
    return Blocks("Q5_1", 8, 32, _fifth_bits(qh, qs), scale, offset)


def _q8_0(data: Bytes) -> Blocks:
    d, qs = _fields(data, 2, 32)
    return Blocks("Q8_0", 8, 32, qs ^ 128, _half(d)[..., 0], None)


def _k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The 6-bit scales and minima of Q4_K and Q5_K: 12 bytes to two times 8 per superblock."""
    low, mid, high = np.split(packed, 3, axis=2)
    scales = np.concatenate([low & 63, (high & 15) | ((low >> 2) & 48)], axis=2)
    minima = np.concatenate([mid & 63, (high >> 4) | ((mid >> 2) & 48)], axis=2)
    return scales, minima


def _k_affine(d: Bytes, dmin: Bytes, packed: Bytes) -> tuple[Floats, Floats]:
    """Scale and minimum of each of the 8 blocks of 32, float32 [n, blocks]: exact products."""
    scales, minima = _k_scales(packed)
    n = d.shape[0]
    return (_half(d) * scales).reshape(n, -1), (_half(dmin) * minima).reshape(n, -1)


def _q4_k(data: Bytes) -> Blocks:
    d, dmin, packed, qs = _fields(data, 2, 2, 12, 128)
    scale, minimum = _k_affine(d, dmin, packed)
    return Blocks("Q4_K", 4, 32, _pack4(_nibbles(qs, 32), 32), scale, 8 * scale - minimum)


def _q5_k(data: Bytes) -> Blocks:
    d, dmin, packed, qh, qs = _fields(data, 2, 2, 12, 32, 128)
    scale, minimum = _k_affine(d, dmin, packed)
    n, blocks, _ = qs.shape
    low = _nibbles(qs, 32).reshape(n, blocks, 8, 32)
    bit = np.arange(8, dtype=np.uint8)[:, None]
    high = (qh[:, :, None, :] >> bit) & 1
    codes = (low | (high << 4)) + np.uint8(128 - 16)  # centred: |code - 128| <= 16
    return Blocks("Q5_K", 8, 32, codes.reshape(n, -1, 32), scale, 16 * scale - minimum)


def _q6_k(data: Bytes) -> Blocks:
    ql, qh, sc, d = _fields(data, 128, 64, 16, 2)
    n, blocks, _ = ql.shape
    low = _nibbles(ql, 64).reshape(n, blocks, 2, 4, 32)
    shift = np.array([0, 2, 4, 6], np.uint8)[:, None]
    high = (qh.reshape(n, blocks, 2, 1, 32) >> shift) & 3
    codes = (low | (high << 4)) + np.uint8(128 - 32)
    scale = _half(d) * np.ascontiguousarray(sc).view(np.int8)
    return Blocks("Q6_K", 8, 16, codes.reshape(n, -1, 16), scale.reshape(n, -1), None)


FORMS: dict[str, Callable[[Bytes], Blocks]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""Formats that are carried over bit for bit."""
