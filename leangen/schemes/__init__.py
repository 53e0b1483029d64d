"""The schemes: how a float weight becomes packed low-bit data.

A scheme is one module with

    BITS                               bits of one code
    BLOCK                              weights along k that share a scale unless asked otherwise;
                                       None: a whole row
    quantize(w, **options) -> Packed   w: float [n, k], one row per output
    dequantize(packed) -> w            the float32 [n, k] that the packed form stands for

Options that all take: `block_size`, `asymmetric` (zero points, for integer codes), `importance`
(float [k]: what an error in a column weighs, such as E[x**2]), `scale_dtype`, `threads`; a scheme
that has no use for one ignores it. Blocks run along k. Zero points are packed integers, never
floats (ORT is 30 to 100 times slower with float zero points).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from leangen.errors import BundleError, UnknownSchemeError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Packed:
    """One weight matrix in low-bit form."""

    scheme: str
    shape: tuple[int, int]
    """(n, k): rows are outputs."""
    bits: int
    block_size: int
    """Weights along k that share one scale; k itself for per-row scales."""
    q: np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]
    """Codes [n, k], one per uint8 before bit packing; the float's own bits (uint16) in halves."""
    scales: np.ndarray[Any, np.dtype[np.floating[Any]]]
    """[n, ceil(k / block_size)], float32 or float16; a negative scale mirrors its block.
    [n, 0] where the codes are floats themselves."""
    zero_points: np.ndarray[Any, np.dtype[np.uint8]] | None
    """[n, ceil(k / block_size)], or None: symmetric around 2**(bits - 1)."""

    @property
    def stored_bits(self) -> int:
        """Bits on disk: codes, scales and zero points."""
        zero_bits = 0 if self.zero_points is None else self.zero_points.size * self.bits
        return self.q.size * self.bits + self.scales.nbytes * 8 + zero_bits

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk per weight: codes, scales and zero points."""
        return self.stored_bits / self.q.size


SCHEMES = {
    "fp16": "leangen.schemes.fp16",
    "bf16": "leangen.schemes.bf16",
    "int8": "leangen.schemes.int8",
    "int4": "leangen.schemes.int4",
    "int3": "leangen.schemes.int3",
    "int2": "leangen.schemes.int2",
    "nf4": "leangen.schemes.nf4",
    "fp4": "leangen.schemes.fp4",
}


def get(name: str) -> ModuleType:
    """The scheme's module; UnknownSchemeError lists what there is."""
    if name not in SCHEMES:
        raise UnknownSchemeError(
            f"scheme {name!r} is unknown: expected one of {', '.join(SCHEMES)}"
        )
    return import_module(SCHEMES[name])


def check(w: Array) -> None:
    """BundleError for a matrix that is empty, or that holds NaN or infinity."""
    if w.ndim != 2 or w.size == 0:
        raise BundleError(
            f"weights of shape {list(w.shape)} cannot be quantized: expected a non-empty matrix; "
            "export the model again"
        )
    if not np.isfinite(w).all():
        raise BundleError(
            f"weights of shape {list(w.shape)} hold NaN or infinity and cannot be quantized: "
            "export the model again from an intact source"
        )


def spread(per_block: Array, packed: Packed) -> Array:
    """What each block has (scales, zero points), for each weight: [n, k]."""
    wide: Array = np.repeat(per_block, packed.block_size, axis=1)
    return wide[:, : packed.shape[1]]
