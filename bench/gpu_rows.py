"""The rows of `bench/gpu.py`: what is launched, how it is timed, what it is held against."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from gpu import Figures, Row
from leangen_kernels import cache_layout, layout
from leangen_kernels.cuda import driver, launches, tiles

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

MATRICES = ((4096, 14336), (14336, 4096), (4096, 4096), (6144, 4096), (128256, 4096), (960, 576))
"""n, k: what an 8B Llama consists of, and SmolLM2's queries, keys and values."""
TOKENS = (2, 4, 8, 16, 64, 512, 2048)
FORMS = (("q4", "int8"), ("q4", "fp32"), ("q4_min", "int8"), ("q8", "int8"), ("nf4_wide", "fp32"))
CONTEXTS = (1024, 8192)
PICTURES = ((320, 4096), (640, 1024), (1280, 256))
"""Channels and pixels of an SD 1.5 UNet at 512 x 512."""

COPIED = 1 << 30
"""Bytes, of which the bandwidth is measured."""
TIMINGS = 5
KEPT = 8
"""Packed matrices kept on the host: making random bytes takes longer than what is timed."""


class Bench:
    """A card and what is on it."""

    def __init__(self, index: int, seconds: float) -> None:
        self.card = driver.Card(index)
        self.seconds = seconds
        self.rng = np.random.default_rng()
        self._packed: dict[tuple[str, int, int], Any] = {}

    def alive(self) -> bool:
        """Whether the context still works; all memory that a row has left is given back."""
        try:
            driver.call("cuCtxSynchronize")
            self.card.free_all()
            if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
                torch.cuda.empty_cache()
        except (driver.CudaError, RuntimeError):  # torch's is an AcceleratorError, a RuntimeError
            return False
        return True

    def rows(self, part: str) -> Iterator[Row]:
        """The rows of a part."""
        if part in ("checks", "kernels"):
            return self._checks() if part == "checks" else self._kernels()
        module = {"peers": "gpu_peers", "models": "gpu_models", "energy": "gpu_models"}
        rows: Iterator[Row] = getattr(import_module(module[part]), part)(self)
        return rows

    def timed(self, enqueue: Callable[[], None], calls: int = 1) -> Figures:
        """Seconds of one of the `calls` that `enqueue` puts on the stream, replayed as a graph."""
        replay = self.card.graph(enqueue)
        return self.repeated(replay, calls)

    def repeated(self, replay: Callable[[], None], calls: int = 1) -> Figures:
        """The median over several stretches of events, and how far they lie apart."""

        def stretch(count: int) -> float:
            return self.card.elapsed_s(lambda: [replay() for _ in range(count)] and None)

        stretch(3)
        count = max(1, int(self.seconds / TIMINGS / max(stretch(3) / 3, 1e-7)))
        seconds = [stretch(count) / count / calls for _ in range(TIMINGS)]
        return {"time_s": statistics.median(seconds), "spread_s": max(seconds) - min(seconds)}

    def weights(self, form: layout.Form, n: int, k: int) -> Any:
        """Random packed weights, scales that keep sums near 1; alike for alike shapes."""
        key = (form.name, n, k)
        if key not in self._packed:
            while len(self._packed) >= KEPT:
                del self._packed[next(iter(self._packed))]
            self._packed[key] = self._random(form, n, k)
        return self.card.array(self._packed[key])

    def _random(self, form: layout.Form, n: int, k: int) -> Any:
        units = -(-n // 16) * tiles.units(k)
        packed = self.rng.integers(0, 256, (units, tiles.unit_bytes(form)), dtype=np.uint8)
        codes = 2048 * form.bits // 8
        kind = np.float32 if form.wide else np.float16
        numbers = packed[:, codes:].view(kind)
        numbers[:] = (0.2 if form.table else 0.5 / (1 << form.bits)) / np.sqrt(k)
        if form.minimum:
            numbers[:, 64:] *= -(1 << (form.bits - 1))
        return packed

    def _checks(self) -> Iterator[Row]:
        from cuda_cases import CASES

        for name, case in CASES.items():
            yield Row(name, lambda case=case: self._check(case))

    def _kernels(self) -> Iterator[Row]:
        yield Row("ceilings", self._ceilings)
        for n, k in MATRICES:
            for form, activations in FORMS:
                yield self._linear_row(form, activations, n, k, 1)
        for tokens in TOKENS:
            for form, activations in FORMS:
                yield self._linear_row(form, activations, 4096, 14336, tokens)
        for form in ("q4", "q8", "nf4_wide"):
            yield Row(f"dequantize {form} 4096x14336", lambda form=form: self._dequantize(form))
        for context in CONTEXTS:
            for cache in ("fp16", "int8"):
                for batch in (1, 8):
                    yield Row(
                        f"attention {cache} 32/8x128 past {context} batch {batch}",
                        lambda c=context, h=cache, b=batch: self._attention(c, h, b),
                    )
        for channels, pixels in PICTURES:
            yield Row(
                f"group norm + silu 2x{channels}x{pixels}",
                lambda c=channels, p=pixels: self._group_norm(c, p),
            )

    def _ceilings(self) -> Figures:
        size = COPIED
        source, to = (self.card.empty(size, np.uint8) for _ in range(2))
        figures = self.timed(lambda: self.card.copy(to, source))
        self.card.free(source, to)
        copied = {"copy_bytes_s": 2 * size / figures["time_s"], "bytes": 2 * size, **figures}
        try:
            import torch

            a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.float16) for _ in range(2))
            seconds = torch_timed(lambda: a @ b, self.seconds)["time_s"]
        except Exception as error:  # missing, or built without CUDA: the bandwidth stands
            return {**copied, "note": f"no matrix rate from torch: {error}"[:120]}
        rate = 2 * 8192**3 / seconds
        return {**copied, "matrix_flop_s": rate, "note": f"fp16 product {rate / 1e12:.0f} TFLOP/s"}

    def _check(self, case: Callable[..., str | None]) -> Figures:
        problem = case(self.card, self.rng)
        return {"error": problem} if problem else {"note": "as its twin"}

    def _linear_row(self, form: str, activations: str, n: int, k: int, tokens: int) -> Row:
        kind = "a8" if activations == "int8" else "a16"
        return Row(
            f"linear {form} {kind} {n}x{k} M {tokens}",
            lambda: self._linear(form, activations, n, k, tokens),
        )

    def _linear(self, form_name: str, activations: str, n: int, k: int, tokens: int) -> Figures:
        """Rows and product; as many copies of the weights as are four times what L2 holds."""
        form = layout.FORMS[form_name]
        op = launches.Linear(form, n, k, activations)
        size = tiles.packed_bytes(form, n, k)
        copies = max(1, min(-(-4 * self.card.l2_bytes // size), 64))
        held = [self.weights(form, n, k) for _ in range(copies)]
        x = self.card.array(self.rng.standard_normal((tokens, k)).astype(np.float32))
        table = self.card.array(np.array(form.table or [0], np.float32))
        y = self.card.empty(tokens * n, np.float32)
        scratch = self.card.empty(sum(op.scratch(tokens)), np.uint8)
        at = {"x": x.address, "y": y.address, "scratch": scratch.address, "table": table.address}

        def enqueue() -> None:
            for weights in held:
                given = {**at, "weights": weights.address}
                self.card.launch_all(op.launches(tokens, given, self.card.multiprocessors))

        figures = self.timed(enqueue, copies)
        product = self.timed(
            lambda: (
                [
                    self.card.launch_all(
                        op.launches(
                            tokens, {**at, "weights": weights.address}, self.card.multiprocessors
                        )[1:]
                    )
                    for weights in held
                ]
                and None
            ),
            copies,
        )
        self.card.free(*held, x, table, y, scratch)
        moved = size + 4 * tokens * (n + k)
        return {
            **product, "bytes": moved, "flop": 2 * tokens * n * k,
            "note": f"with its rows {figures['time_s'] * 1e6:.1f} us",
        }  # fmt: skip

    def _dequantize(self, form_name: str) -> Figures:
        form, n, k = layout.FORMS[form_name], 4096, 14336
        op = launches.Linear(form, n, k)
        held = [self.weights(form, n, k) for _ in range(4)]
        table = self.card.array(np.array(form.table or [0], np.float32))
        y = self.card.empty(n * k, np.float16)
        figures = self.timed(
            lambda: self.card.launch_all(
                op.dequantize(weights.address, table.address, y.address) for weights in held
            ),
            len(held),
        )
        self.card.free(*held, table, y)
        return {**figures, "bytes": tiles.packed_bytes(form, n, k) + 2 * n * k}

    def _attention(self, context: int, cache: str, batch: int) -> Figures:
        held = cache_layout.CACHES[cache]
        op = launches.Attention(32, 8, 128, cache)
        count = batch * 8 * context * held.columns(128)
        size = count * held.size
        copies = max(1, min(-(-4 * self.card.l2_bytes // (2 * size)), 32))
        caches = [self.card.empty(count, np.uint8 if cache == "int8" else np.float16)
                  for _ in range(2 * copies)]  # fmt: skip
        for one in caches:  # finite values: 0xAA bytes are, as halves; as scales too
            driver.call("cuMemsetD8_v2", driver.ctypes.c_void_p(one.address), 0x11,
                        driver.ctypes.c_size_t(size))  # fmt: skip
        qkv = self.card.array(self.rng.standard_normal(batch * 48 * 128).astype(np.float32))
        last = self.card.array(np.full(batch, context - 1, np.int32))
        y = self.card.empty(batch * 4096, np.float32)
        splits = op.splits(batch, 1, context, self.card.multiprocessors)
        scratch = self.card.empty(sum(op.scratch(batch, 1, splits)), np.uint8)
        at = {"qkv": qkv.address, "last": last.address, "y": y.address, "scratch": scratch.address}

        def enqueue() -> None:
            for keys, values in zip(caches[::2], caches[1::2], strict=True):
                given = {**at, "keys": keys.address, "values": values.address}
                self.card.launch_all(
                    op.launches(batch, 1, context, given, self.card.multiprocessors)
                )

        figures = self.timed(enqueue, copies)
        self.card.free(*caches, qkv, last, y, scratch)
        return {**figures, "bytes": 2 * size, "flop": 4 * batch * 32 * 128 * context}

    def _group_norm(self, channels: int, pixels: int) -> Figures:
        op = launches.GroupNorm(channels, 32)
        x = self.card.array(self.rng.standard_normal(2 * channels * pixels).astype(np.float32))
        gain, shift = (self.card.array(np.ones(channels, np.float32)) for _ in range(2))
        y, scratch = self.card.empty(x.count, np.float32), self.card.empty(65536, np.uint8)
        at = {"x": x.address, "gain": gain.address, "shift": shift.address, "y": y.address,
              "scratch": scratch.address}  # fmt: skip
        figures = self.timed(
            lambda: self.card.launch_all(op.launches(2, pixels, at, self.card.multiprocessors))
        )
        self.card.free(x, gain, shift, y, scratch)
        return {**figures, "bytes": 8 * x.count, "note": "from L2: three passes in all"}


def torch_timed(work: Callable[[], Any], seconds: float, calls: int = 1) -> Figures:
    """Seconds of one of the calls that `work` makes, replayed as a graph of torch's."""
    replay = torch_graph(work)
    import torch

    def stretch(count: int) -> float:
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(count):
            replay()
        last.record()
        last.synchronize()
        return float(first.elapsed_time(last)) / 1e3

    stretch(3)
    count = max(1, int(seconds / TIMINGS / max(stretch(3) / 3, 1e-7)))
    timed = [stretch(count) / count / calls for _ in range(TIMINGS)]
    return {"time_s": statistics.median(timed), "spread_s": max(timed) - min(timed)}


def torch_graph(work: Callable[[], Any]) -> Callable[[], None]:
    """A graph of torch's, after two runs that let it choose and allocate."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay: Callable[[], None] = graph.replay
    return replay
