"""int4: 4-bit codes with one scale per block of 32 weights, symmetric around 8 or with zero points.

`MatMulNBits` computes with the codes as they are.
"""

from __future__ import annotations

from functools import partial

from leangen.schemes import uniform

BITS = 4
BLOCK = 32

quantize = partial(
    uniform.quantize,
    scheme="int4",
    bits=BITS,
    block_size=BLOCK,
    ratios=(1.0, 0.95, 0.9, 0.85, 0.8, 0.72, 0.64),
)
dequantize = uniform.dequantize
