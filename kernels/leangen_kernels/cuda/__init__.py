"""Kernels for NVIDIA GPUs: written in Numba, compiled ahead of time to PTX and machine code.

Nothing here needs Numba to be imported, but `instructions` and the kernels' own modules, which
`build` compiles. Checked against the NumPy twins in Numba's CUDA simulator and, as compiled, by
running their PTX on the CPU (`tests/ptx_card.py`); none of them has run on a card yet.
"""
