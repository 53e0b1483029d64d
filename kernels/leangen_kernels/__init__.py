"""Kernels for leangen: own CPU and CUDA kernels. Holds none yet."""
