"""Twins of `instructions` in Python, for Numba's CUDA simulator: addresses are the machine's own.

Numba's simulator has a thread of Python's for each GPU thread, and one that polls them all, which
takes five times what the work does. Here GPU threads are greenlets: one runs until it waits for
others, then another whose turn it is by lot, so that a barrier that a kernel lacks shows. What
needs all lanes of a warp (shuffles, the tensor core) is computed once, when the last lane has come.
"""

from __future__ import annotations

import ctypes
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet
from numba.cuda.simulator import kernel, kernelapi

Array = np.ndarray[Any, Any]


def _memory(address: int, size: int, multiple: int) -> Any:
    if address % multiple:
        raise ValueError(f"address {address:#x} is no multiple of {multiple}")
    return (ctypes.c_char * size).from_address(int(address))


def _read(address: int, count: int, kind: type, multiple: int) -> Any:
    size = np.dtype(kind).itemsize * count
    values: Array = np.frombuffer(bytes(_memory(address, size, multiple)), kind)
    return tuple(values) if count > 1 else values[0]


def _write(address: int, values: Array, multiple: int) -> None:
    data = values.tobytes()
    _memory(address, len(data), multiple)[:] = data


def _u32(*values: Any) -> Array:
    return np.array(values, np.uint32)


def _pair(low: Any, high: Any) -> Any:
    return np.array([low, high], np.float16).view(np.uint32)[0]


def _halves_of_nibbles(word: Any, center: int = 8) -> tuple[np.uint32, ...]:
    q = [(int(word) >> 4 * at & 15) - center for at in range(8)]
    return tuple(_pair(q[at], q[at + 4]) for at in range(4))


def _halves_of_bytes(word: Any) -> tuple[np.uint32, ...]:
    q = [(int(word) >> 8 * at & 255) - 128 for at in range(4)]
    return _pair(q[0], q[2]), _pair(q[1], q[3])


def _floats_of_halves(word: Any) -> tuple[np.float32, ...]:
    return tuple(_u32(word).view(np.float16).astype(np.float32))


def _floats_of_bytes(word: Any) -> tuple[np.float32, ...]:
    return tuple(_u32(word).view(np.int8).astype(np.float32))


def _bytes_of(*values: Any) -> Any:
    return np.array([int(v) & 255 for v in values], np.uint8).view(np.uint32)[0]


class _Warp:
    """The lanes of one warp of one block that wait for the others, and what each has given."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []
        self.given: list[Any] = [None] * 32
        self.made: list[Any] = []


class Block:
    """Runs the threads of one block, in place of Numba's own class of these methods."""

    def __init__(self, function: Any, grid: Any, shape: Any, debug: bool) -> None:
        self._function, self._shape = function, shape
        self._warps: dict[int, _Warp] = defaultdict(_Warp)
        self._ready: list[Any] = []
        self._at_barrier: list[Any] = []

    def run(self, place: Any, *arguments: Any) -> None:
        """Until all have ended. Raises what one raises, RuntimeError when none can go on."""
        self._ready = list(self._threads(place))
        alive = len(self._ready)
        while self._ready:
            random.shuffle(self._ready)
            turn, self._ready = self._ready, []
            for thread in turn:
                thread.switch(*arguments)
                alive -= thread.dead
            if not self._ready and len(self._at_barrier) == alive:
                self._ready, self._at_barrier = self._at_barrier, []
        if alive:
            raise RuntimeError(f"{alive} threads of block {place} wait for some that never come")

    def _threads(self, place: Any) -> Iterator[Any]:
        for number, at in enumerate(np.ndindex(*self._shape[::-1])):
            thread = greenlet(self._function)
            thread.block, thread.thread_id = self, number
            thread.blockIdx, thread.threadIdx = kernel.Dim3(*place), kernel.Dim3(*at[::-1])
            thread.syncthreads = self._barrier
            yield thread

    def _barrier(self) -> None:
        self._at_barrier.append(getcurrent())
        getcurrent().parent.switch()

    def meet(self, compute: Callable[[list[Any]], list[Any]], given: Any) -> Any:
        """What `compute` makes of what the lanes of the calling thread's warp give, for its own."""
        thread: Any = getcurrent()
        number, lane = divmod(thread.thread_id, 32)
        warp = self._warps[number]
        warp.given[lane] = given
        warp.waiting.append(thread)
        if len(warp.waiting) < 32:
            thread.parent.switch()
        else:
            warp.made = compute(warp.given)
            self._ready += [other for other in warp.waiting if other is not thread]
            warp.waiting = []
        return warp.made[lane]


kernel.BlockManager = Block
kernelapi.threading = SimpleNamespace(current_thread=getcurrent)


def _meet(compute: Callable[[list[Any]], list[Any]], given: Any) -> Any:
    thread: Any = getcurrent()
    return thread.block.meet(compute, given)


def _across(value: Any, mask: int) -> Any:
    return _meet(lambda given: [given[lane ^ mask] for lane in range(32)], value)


def _fragments(
    given: list[Any], kind: type, per_register: int
) -> tuple[Array, Array, Array, Array, Array]:
    """A [16, k], B [k, 8], C [16, 8] of all lanes' registers, and rows and columns of C's."""
    words = np.array([lane[:6] for lane in given], np.uint32)
    a_values: Any = words[:, :4].copy().view(np.uint8 if kind is np.int8 else kind)
    a_values = a_values.reshape(8, 4, 4, per_register)  # group, thread, register, element
    b_values: Any = words[:, 4:].copy().view(kind).reshape(8, 4, 2, per_register)
    k = 8 * per_register
    a, b = np.zeros((16, k), np.float64), np.zeros((k, 8), np.float64)
    for g in range(8):
        for t in range(4):
            at = slice(t * per_register, (t + 1) * per_register)
            far = slice(k // 2 + at.start, k // 2 + at.stop)
            a[g, at], a[g + 8, at], a[g, far], a[g + 8, far] = a_values[g, t]
            b[at, g], b[far, g] = b_values[g, t]
    lanes = np.arange(32)
    rows = np.stack([lanes // 4] * 2 + [lanes // 4 + 8] * 2, 1)
    columns = np.stack([lanes % 4 * 2, lanes % 4 * 2 + 1] * 2, 1)
    c = np.zeros((16, 8), np.float64)
    c[rows, columns] = np.array([lane[6:] for lane in given], np.float64)
    return a, b, c, rows, columns


def _mma(kind: type, per_register: int, result: type) -> Callable[..., Any]:
    def compute(given: list[Any]) -> list[Any]:
        a, b, c, rows, columns = _fragments(given, kind, per_register)
        product = (a @ b + c)[rows, columns]
        return [tuple(lane) for lane in product.astype(result)]

    return lambda *registers: _meet(compute, registers)


_mma_half = _mma(np.float16, 2, np.float32)
_mma_int8 = _mma(np.int8, 4, np.int32)


def _add_block_a16(*given: Any) -> tuple[Any, ...]:
    a, b, scales, sums = given[:8], given[8:12], given[12:14], given[14:]
    c = _mma_half(*a[:4], *b[:2], *[np.float32(0)] * 4)
    c = _mma_half(*a[4:], *b[2:], *c)
    return tuple(_fused(c[at], scales[at // 2], sums[at]) for at in range(4))


def _add_block_a8(*given: Any) -> tuple[Any, ...]:
    start, scales, tokens, sums = given[6:8], given[8:10], given[10:12], given[12:]
    c = _mma_int8(*given[:6], *start, *start)
    by = [np.float32(scales[at // 2] * tokens[at % 2]) for at in range(4)]
    return tuple(_fused(c[at], by[at], sums[at]) for at in range(4))


def _fused(a: Any, b: Any, c: Any) -> np.float32:
    return np.float32(float(a) * float(b) + float(c))


def _power2(x: Any) -> np.float32:
    with np.errstate(under="ignore", over="ignore"):
        return np.float32(np.exp2(np.float32(x)))


def _silu(x: Any) -> np.float32:
    return np.float32(x / (np.float32(1) + _power2(np.float32(-1.4426950409) * x)))


def _gelu_tanh(x: Any) -> np.float32:
    cube = np.float32(0.044715) * x * x * x + x
    return np.float32(x / (np.float32(1) + _power2(np.float32(-2.302208198) * cube)))


INSTRUCTIONS: dict[str, Callable[..., Any]] = {
    "stream16": lambda at: _read(at, 4, np.uint32, 16),
    "stream8": lambda at: _read(at, 2, np.uint32, 8),
    "read16": lambda at: _read(at, 4, np.uint32, 16),
    "read8": lambda at: _read(at, 2, np.uint32, 8),
    "read4": lambda at: _read(at, 1, np.uint32, 4),
    "read_scale_sum": lambda at: (_read(at, 1, np.float32, 8), _read(at + 4, 1, np.int32, 4)),
    "read_scales_sums": lambda at: (
        _read(at, 1, np.float32, 16),
        _read(at + 4, 1, np.int32, 4),
        _read(at + 8, 1, np.float32, 8),
        _read(at + 12, 1, np.int32, 4),
    ),
    "read16f": lambda at: _read(at, 4, np.float32, 16),
    "read4f": lambda at: _read(at, 1, np.float32, 4),
    "write16": lambda at, *words: _write(at, _u32(*words), 16),
    "write8": lambda at, *words: _write(at, _u32(*words), 8),
    "write4": lambda at, word: _write(at, _u32(word), 4),
    "write1": lambda at, word: _write(at, _u32(word).view(np.uint8)[:1], 1),
    "write4f": lambda at, value: _write(at, np.array([value], np.float32), 4),
    "write4i": lambda at, value: _write(at, np.array([value], np.int32), 4),
    "write2h": lambda at, value: _write(at, np.array([value], np.float32).astype(np.float16), 2),
    "halves_of_nibbles": _halves_of_nibbles,
    "halves_of_nibbles_0": lambda word: _halves_of_nibbles(word, 0),
    "halves_of_bytes": _halves_of_bytes,
    "bytes_of_nibbles": lambda word: (
        np.uint32(int(word) & 0x0F0F0F0F),
        np.uint32(int(word) >> 4 & 0x0F0F0F0F),
    ),
    "byte": lambda word, at: int(word) >> 8 * at & 255,
    "floats_of_halves": _floats_of_halves,
    "half_pair": _pair,
    "floats_of_bytes": _floats_of_bytes,
    "as_float": lambda word: _u32(word).view(np.float32)[0],
    "as_bits": lambda value: np.array([value], np.float32).view(np.uint32)[0],
    "to_float": np.float32,
    "as_word": lambda value: np.array([value], np.int32).view(np.uint32)[0],
    "to_int": lambda word: _u32(word).view(np.int32)[0],
    "silu": _silu,
    "gelu_tanh": _gelu_tanh,
    "nearest": lambda value: int(np.rint(value)),
    "bytes_of": _bytes_of,
    "most": lambda a, b: np.float32(max(a, b)),
    "absolute": lambda a: np.float32(abs(a)),
    "fused": _fused,
    "power2": _power2,
    "inverse_root": lambda a: np.float32(1) / np.sqrt(np.float32(a)),
    "quotient": lambda a, b: np.float32(a) / np.float32(b),
    "exponent": lambda a: (np.array([a], np.float32).view(np.uint32) & 0x7F800000).view(np.float32)[
        0
    ],
    "across": _across,
    "dot8": lambda *given: np.float32(np.dot(given[:8], given[8:])),
    "add8": lambda *given: tuple(_fused(given[i], given[8], given[9 + i]) for i in range(8)),
    "add_block_a16": _add_block_a16,
    "add_block_a8": _add_block_a8,
}
