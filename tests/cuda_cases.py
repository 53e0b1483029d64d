"""GPU kernels against their twins: launches, on whatever runs them, and what must come out.

A machine has `array(values)` (values in its memory), `empty(count, kind)`, and
`launch(name, grid, threads, *arguments)`; an array has `.address` and `.get()`. The simulator's is
here, `bench/gpu.py` has the card's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class HostArray:
    """Values at an address that is a multiple of 256, as a card's allocations are."""

    values: np.ndarray

    @property
    def address(self) -> int:
        return self.values.ctypes.data

    def get(self) -> np.ndarray:
        return self.values


class Host:
    """A machine whose memory is the host's."""

    multiprocessors = 2

    def empty(self, count: int, kind: Any) -> HostArray:
        size = np.dtype(kind).itemsize * count
        memory = np.full(size + 256, 0xAA, np.uint8)
        at = -memory.ctypes.data % 256
        return HostArray(memory[at : at + size].view(kind))

    def array(self, values: Any) -> HostArray:
        values = np.ascontiguousarray(values)
        held = self.empty(values.size, values.dtype)
        held.values[:] = values.ravel()
        return held


class Simulator(Host):
    """Numba's CUDA simulator; NUMBA_ENABLE_CUDASIM must be set before Numba is imported."""

    def __init__(self) -> None:
        from leangen_kernels.cuda import build

        self.kernels = build.kernels()
        self.made: dict[str, Any] = {}

    def launch(self, name: str, grid: tuple[int, ...], threads: int, *arguments: Any) -> None:
        from numba import cuda

        if name not in self.made:
            self.made[name] = cuda.jit(self.kernels[name].make())
        self.made[name][grid, threads](*arguments)


def _launch(machine: Any, launches: Any) -> None:
    for launch in launches:
        threads = launch.threads
        machine.launch(launch.name, launch.grid, threads, *launch.arguments)


def _far(found: np.ndarray, wanted: np.ndarray, within: float) -> str | None:
    """What is wrong, or None: the error against the size of what is wanted."""
    error = np.linalg.norm(found - wanted) / max(float(np.linalg.norm(wanted)), 1e-30)
    return None if error <= within else f"relative error {error:.2e}, expected at most {within:.0e}"


def _weights(rng: Any, form: Any, n: int, k: int, group: int) -> tuple[Any, ...]:
    codes = rng.integers(0, 1 << form.bits, (n, k), dtype=np.uint8)
    shape = (n, -(-k // group))
    scales = rng.uniform(0.01, 0.1, shape).astype(np.float16).astype(np.float32)
    minima = None
    if form.minimum:
        minima = rng.uniform(-0.5, 0.0, shape).astype(np.float16).astype(np.float32)
    return codes, scales, minima


def linear(
    form_name: str, n: int, k: int, tokens: int, group: int = 32, *, whole_rows: bool = False,
    **options: Any,
) -> Any:  # fmt: skip
    """A case: the operator `Linear` on random weights and rows.

    whole_rows: as on a small card, where the warps of a block do not share out k.
    """
    from leangen_kernels import layout, reference
    from leangen_kernels.cuda import launches, tiles

    form = layout.FORMS[form_name]

    def case(machine: Any, rng: Any) -> str | None:
        given = dict(options)
        packed = layout.pack(form, *_weights(rng, form, n, k, group))
        tiled = tiles.pack(form, *layout.unpack(form, packed, n, k))
        x = rng.standard_normal((tokens, k)).astype(np.float32)
        norm = given.pop("norm", None)
        at, twin = {}, {}
        outputs = n // 2 if given.get("gated") else n
        if norm:
            twin["gain"] = rng.uniform(0.5, 1.5, k).astype(np.float32)
        if norm == "layer":
            twin["shift"] = rng.standard_normal(k).astype(np.float32)
        if given.pop("bias", False):
            twin["bias"] = rng.standard_normal(outputs).astype(np.float32)
        if given.pop("residual", False):
            twin["residual"] = rng.standard_normal((tokens, outputs)).astype(np.float32)
        op = launches.Linear(form, n, k, layer=norm == "layer", **given)
        wanted = reference.linear(
            form, packed, n, x, activations="fp32" if op.half else "int8",
            gated=op.gated, activation=op.curve, **twin,
        )  # fmt: skip
        arrays = {name: machine.array(values) for name, values in twin.items()}
        arrays |= {"x": machine.array(x), "weights": machine.array(tiled)}
        if form.table:
            arrays["table"] = machine.array(np.array(form.table, np.float32))
        y = arrays["y"] = machine.empty(tokens * outputs, np.float32)
        arrays["scratch"] = machine.empty(sum(op.scratch(tokens)), np.uint8)
        at = {name: array.address for name, array in arrays.items()}
        multiprocessors = 0 if whole_rows else machine.multiprocessors
        _launch(machine, op.launches(tokens, at, multiprocessors))
        # Halves keep 11 bits of activations, 2e-4 of a sum and three times that where it cancels;
        # bytes are what the twin rounds to.
        return _far(y.get().reshape(wanted.shape), wanted, 1.5e-3 if op.half else 2e-5)

    return case


def dequantize(form_name: str, n: int, k: int) -> Any:
    """A case: packed weights as halves."""
    from leangen_kernels import layout, reference
    from leangen_kernels.cuda import launches, tiles

    form = layout.FORMS[form_name]

    def case(machine: Any, rng: Any) -> str | None:
        packed = layout.pack(form, *_weights(rng, form, n, k, 32))
        wanted = reference.weight(form, packed, n, k)
        weights = machine.array(tiles.pack(form, *layout.unpack(form, packed, n, k)))
        table = machine.array(np.array(form.table or [0.0], np.float32))
        y = machine.empty(n * tiles.units(k) * 128, np.float16)
        op = launches.Linear(form, n, k)
        _launch(machine, [op.dequantize(weights.address, table.address, y.address)])
        found = y.get().reshape(n, -1)[:, :k].astype(np.float64)
        return _far(found, wanted, 3e-4)

    return case


def attention(
    cache: str, width: int, heads: int, kv_heads: int, new: int, past: int, **options: Any
) -> Any:
    """A case: the operator `Attention`, two sequences, the second shorter."""
    from leangen_kernels import cache_layout, reference
    from leangen_kernels.cuda import launches

    def case(machine: Any, rng: Any) -> str | None:
        given = dict(options)
        held = cache_layout.CACHES[cache]
        capacity, batch = -(-(past + new) // 16) * 16, 2
        lengths = np.array([past + new, past // 2 + new], np.int32)
        qkv = rng.standard_normal((batch, new, (heads + 2 * kv_heads) * width)).astype(np.float32)
        angles = rng.uniform(0, 6, (past + new, width // 2))  # fewer than there are places
        cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        twin, gains = {}, {}
        if given.pop("normed", False):
            gains = {
                name: rng.uniform(0.5, 1.5, width).astype(np.float32)
                for name in ("query_gain", "key_gain")
            }
        shape = (batch, kv_heads, capacity, width)
        plain = [rng.standard_normal(shape) for _ in range(2)]
        raw = [_stored(values, held) for values in plain]
        keys, values = (cache_layout.read(held, part, keys=False) for part in raw)
        wanted, new_keys, new_values = reference.attention(
            qkv, keys, values, lengths, cosines, sines, heads=heads, cache=held, **gains, **given,
        )  # fmt: skip
        twin = {"qkv": qkv, "last": lengths - np.int32(1), "cosines": cosines, "sines": sines}
        arrays = {name: machine.array(part) for name, part in (twin | gains).items()}
        for name, part in zip(("keys", "values"), raw, strict=True):
            arrays[name] = machine.array(part.view(np.uint8))
        op = launches.Attention(heads, kv_heads, width, cache, **given)
        splits = op.splits(batch, new, capacity, machine.multiprocessors)
        y = arrays["y"] = machine.empty(wanted.size, np.float32)
        arrays["scratch"] = machine.empty(sum(op.scratch(batch, new, splits)), np.uint8)
        at = {name: array.address for name, array in arrays.items()}
        many = machine.multiprocessors
        _launch(machine, op.launches(batch, new, capacity, at, many, rotations=past + new))
        for name, expected in (("keys", new_keys), ("values", new_values)):
            found = arrays[name].get().view(held.dtype).reshape(raw[0].shape)
            found = cache_layout.read(held, found, keys=False)
            if problem := _far(found, expected, 1e-3):
                return f"{name}: {problem}"
        return _far(y.get().reshape(wanted.shape), wanted, 1e-3)

    return case


def append_beyond(cache: str, rotations: int) -> Any:
    """A case: a token whose position has no rotation, or no place, changes no key or value.

    Its query is turned as the last position's.
    """
    from leangen_kernels import cache_layout
    from leangen_kernels.cuda import launches

    def case(machine: Any, rng: Any) -> str | None:
        width, capacity = 64, 32
        op = launches.Attention(1, 1, width, cache)
        kept = rng.integers(0, 256, capacity * cache_layout.CACHES[cache].columns(width) * 2)
        qkv = rng.standard_normal(3 * width).astype(np.float32)
        arrays = {
            "qkv": machine.array(qkv),
            "last": machine.array(np.array([100], np.int32)),
            "keys": machine.array(kept.astype(np.uint8)),
            "values": machine.array(kept.astype(np.uint8)),
            "cosines": machine.array(np.ones(rotations * width // 2, np.float32)),
            "sines": machine.array(np.ones(rotations * width // 2, np.float32)),
            "y": machine.empty(width, np.float32),
            "scratch": machine.empty(1 << 16, np.uint8),
        }
        at = {name: array.address for name, array in arrays.items()}
        append, *_ = op.launches(1, 1, capacity, at, machine.multiprocessors, rotations)
        _launch(machine, [append])
        first, second = qkv[: width // 2], qkv[width // 2 : width]
        turned = np.concatenate([first - second, second + first]) * width**-0.5 * launches.LOG2_E
        found = arrays["scratch"].get()[: 4 * width].view(np.float32)
        if problem := _far(found, turned, 1e-6):
            return problem
        same = all((arrays[name].get() == kept).all() for name in ("keys", "values"))
        return None if same else "it was stored"

    return case


def _stored(values: np.ndarray, cache: Any) -> np.ndarray:
    from leangen_kernels import reference

    if not cache.scaled:
        return values.astype(cache.dtype)
    codes, scales = reference.quantize_rows(values.astype(np.float32))
    batch, heads, capacity, width = values.shape
    blocks = np.concatenate([
        codes.reshape(batch, heads, -1, 16 * width),
        scales.astype(np.float32).reshape(batch, heads, -1, 16).view(np.int8),
    ], axis=-1)  # fmt: skip
    return np.ascontiguousarray(blocks).reshape(batch, heads, capacity, width + 4)


def group_norm(channels: int, groups: int, pixels: int, silu: bool) -> Any:
    """A case: group norm."""
    from leangen_kernels import reference
    from leangen_kernels.cuda import launches

    def case(machine: Any, rng: Any) -> str | None:
        x = (rng.standard_normal((2, channels, pixels)) + 3).astype(np.float32)
        gain, shift = (rng.standard_normal(channels).astype(np.float32) for _ in range(2))
        wanted = reference.group_norm(x, groups, gain, shift, 1e-5)
        if silu:
            wanted = wanted / (1 + np.exp(-wanted))
        arrays = {"x": machine.array(x), "gain": machine.array(gain), "shift": machine.array(shift)}
        y = arrays["y"] = machine.empty(x.size, np.float32)
        arrays["scratch"] = machine.empty(65536, np.uint8)
        at = {name: array.address for name, array in arrays.items()}
        op = launches.GroupNorm(channels, groups, silu=silu)
        _launch(machine, op.launches(2, pixels, at, machine.multiprocessors))
        return _far(y.get().reshape(x.shape), wanted, 1e-5)

    return case


CASES = {
    "linear q4 a16": linear("q4", 24, 160, 3, activations="fp32", bias=True, norm="rms"),
    "linear q4 a8 group 128": linear("q4", 16, 256, 1, group=128, residual=True, norm="layer"),
    "linear q4_min a16": linear("q4_min", 16, 96, 2, activations="fp32", curve="gelu_tanh"),
    "linear q4_min a8": linear("q4_min_wide", 20, 130, 2, curve="gelu"),
    "linear q8 a16": linear("q8_wide", 16, 64, 2, group=64, activations="fp32", curve="relu"),
    "linear q8 a8": linear("q8", 18, 33, 8),
    "linear gated": linear("q4", 64, 128, 9, gated=True, norm="rms"),
    "linear gated gelu": linear("q4", 32, 64, 1, gated=True, curve="gelu_tanh"),
    "linear many tokens": linear("q8", 40, 60, 18, residual=True),
    "linear many rows": linear("q4", 144, 160, 1, group=64),
    "linear long rows a8": linear("q4", 16, 1056, 1, norm="rms"),
    "linear long rows a16": linear("q8", 16, 1056, 1, norm="layer", activations="fp32"),
    "linear nf4": linear("nf4_wide", 16, 128, 2),
    "linear fp4": linear("fp4_wide", 17, 64, 3),
    "dequantize q4": dequantize("q4", 17, 130),
    "dequantize q4_min": dequantize("q4_min", 16, 64),
    "dequantize q8": dequantize("q8", 16, 64),
    "dequantize nf4": dequantize("nf4_wide", 16, 64),
    "attention fp16": attention("fp16", 64, 3, 1, 1, 70, normed=True),
    "attention int8": attention("int8", 64, 2, 2, 2, 14),
    "attention window": attention("fp16", 128, 2, 1, 3, 20, window=9),
    "attention int8 128": attention("int8", 128, 4, 2, 1, 130),
    "attention in parts": attention("fp16", 64, 2, 1, 1, 150),
    "attention beyond the rotations": append_beyond("fp16", 20),
    "attention beyond the capacity": append_beyond("int8", 200),
    "group norm": group_norm(8, 2, 64, True),
    "group norm, tail": group_norm(3, 3, 20, False),
    "group norm in parts": group_norm(2, 1, 8196, True),
}
# A warp has all units of its rows: more than it asks for at a time.
for tokens, n, k in ((1, 16, 500), (9, 33, 300), (18, 33, 150)):
    for form, group in (
        ("q4", 128), ("q4_wide", 32), ("q4_min", 32), ("q4_min_wide", 64), ("q8", 128),
        ("q8_wide", 32), ("nf4_wide", 64),
    ):  # fmt: skip
        for activations in ("fp32",) if form == "nf4_wide" else ("fp32", "int8"):
            name = f"linear {form} {activations} {tokens} tokens"
            CASES[name] = linear(
                form, n, k, tokens, group, activations=activations, whole_rows=True
            )
            if tokens == 1:
                CASES[f"{name}, gated"] = linear(
                    form, 32, 500, 3, group, activations=activations, whole_rows=True, gated=True
                )
for form in ("q4_wide", "q4_min_wide", "q8_wide"):
    CASES[f"dequantize {form}"] = dequantize(form, 16, 64)
