"""int2: 2-bit codes with one scale per block of 32 weights, symmetric around 2 or with zero points.

`MatMulNBits` computes with the codes as they are. Few models survive it without retraining.
"""

from __future__ import annotations

from functools import partial

from leangen.schemes import uniform

BITS = 2
BLOCK = 32

quantize = partial(
    uniform.quantize,
    scheme="int2",
    bits=BITS,
    block_size=BLOCK,
    ratios=(1.0, 0.9, 0.8, 0.72, 0.64, 0.56, 0.48),
)
dequantize = uniform.dequantize
