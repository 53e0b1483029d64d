"""How fast memory gives its bytes: the roof over all that reads its weights for each token."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np


class Stream:
    """Reads `size` bytes, a part for each thread; a context manager."""

    def __init__(self, size: int, threads: int) -> None:
        self.size = size
        self._parts = np.array_split(np.ones(size // 8, np.int64), threads)
        self._pool = ThreadPoolExecutor(threads)

    def seconds(self) -> float:
        """Of reading everything once."""
        start = time.perf_counter()
        list(self._pool.map(np.max, self._parts))
        return time.perf_counter() - start

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
