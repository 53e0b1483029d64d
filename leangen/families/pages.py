"""Memory that is taken page by page, as it is written."""

from __future__ import annotations

import math
import mmap

import numpy as np

Floats = np.ndarray[tuple[int, ...], np.dtype[np.float32]]


def zeros(shape: tuple[int, ...]) -> Floats:
    """Zeroed float32 of which only the pages that are written are ever resident.

    NumPy asks the kernel for huge pages, and then a cache of keys and values is resident as a whole
    soon: a server with eight short sequences of SmolLM2-135M took 950 MB, and takes 255 MB so.
    """
    size = max(1, 4 * math.prod(shape))
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.float32, math.prod(shape)).reshape(shape)
