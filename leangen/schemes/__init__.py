"""The schemes: how a float weight becomes packed low-bit data.

A scheme is one module with

    BITS                               bits of one code
    quantize(w, **options) -> Packed   w: float [n, k], one row per output
    dequantize(packed) -> w            the float32 [n, k] that the packed form stands for

Blocks run along k. Zero points are packed integers, never floats (ORT is 30 to 100 times slower
with float zero points).
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from leangen.errors import UnknownSchemeError


@dataclass(frozen=True, slots=True)
class Packed:
    """One weight matrix in low-bit form."""

    scheme: str
    shape: tuple[int, int]
    """(n, k): rows are outputs."""
    bits: int
    block_size: int
    """Weights along k that share one scale; k itself for per-row scales."""
    q: np.ndarray[Any, np.dtype[np.uint8]]
    """Unsigned codes [n, k], one per byte, before bit packing."""
    scales: np.ndarray[Any, np.dtype[np.floating[Any]]]
    """[n, ceil(k / block_size)], float32 or float16; a negative scale mirrors its block."""
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
    "int8": "leangen.schemes.int8",
    "int4": "leangen.schemes.int4",
}


def get(name: str) -> ModuleType:
    """The scheme's module; UnknownSchemeError lists what there is."""
    if name not in SCHEMES:
        raise UnknownSchemeError(
            f"scheme {name!r} is unknown: expected one of {', '.join(['fp32', *SCHEMES])}"
        )
    return import_module(SCHEMES[name])
