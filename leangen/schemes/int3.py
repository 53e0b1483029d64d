"""int3: 3-bit codes with one scale per block of 32 weights, symmetric around 4 or with zero points.

ORT computes with 2, 4 and 8 bits only. So the codes are 3 bits on disk, and standard ops that ORT
folds while it loads turn them into 4-bit codes: in memory and in speed, int3 is int4.
"""

from __future__ import annotations

from functools import partial

from leangen.schemes import uniform

BITS = 3
BLOCK = 32

quantize = partial(
    uniform.quantize,
    scheme="int3",
    bits=BITS,
    block_size=BLOCK,
    ratios=(1.0, 0.92, 0.85, 0.78, 0.71, 0.64, 0.57),
)
dequantize = uniform.dequantize
