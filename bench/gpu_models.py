"""Rows of `bench/gpu.py` on whole models: a decoding step, its joules, an SD 1.5 UNet's products.

Weights are random, shapes are the models'. A step is one CUDA graph: every layer's rows, products
and attention over a cache of CONTEXT positions, and the head. Torch's is the same in fp16.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from gpu import Figures, Row
from gpu_rows import Bench, torch_graph, torch_timed
from leangen_kernels import layout
from leangen_kernels.cuda import launches, tiles

CONTEXT = 1024
BATCHES = (1, 8, 32)
WINDOW_S = 2.0
"""Of energy: 20 of the counter's ticks."""


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's kind."""

    layers: int
    d: int
    ff: int
    heads: int
    kv_heads: int
    width: int
    vocabulary: int

    def products(self) -> dict[str, tuple[int, int, bool]]:
        """n, k and whether it is gated, of a layer's products."""
        return {
            "qkv": ((self.heads + 2 * self.kv_heads) * self.width, self.d, False),
            "o": (self.d, self.heads * self.width, False),
            "gate_up": (2 * self.ff, self.d, True),
            "down": (self.d, self.ff, False),
        }


SHAPES = {
    "SmolLM2-135M": Shape(30, 576, 1536, 9, 3, 64, 49152),
    "Llama-1B": Shape(16, 2048, 8192, 32, 8, 64, 128256),
    "Llama-8B": Shape(32, 4096, 14336, 32, 8, 128, 128256),
}
PRECISIONS = {
    "int4 a8": ("q4", "int8"), "int4 a16": ("q4", "fp32"), "int8 a8": ("q8", "int8"),
    "nf4": ("nf4_wide", "fp32"),
}  # fmt: skip

# Tokens and width of an SD 1.5 UNet's transformer blocks, and how many blocks there are of each.
UNET = ((4096, 320, 5), (1024, 640, 5), (256, 1280, 5), (64, 1280, 1))


class Decoder:
    """One step of a model on our kernels, ready to be launched again and again."""

    def __init__(self, bench: Bench, shape: Shape, precision: str, batch: int) -> None:
        card = bench.card
        self.card, self.held = card, []
        form_name, activations = PRECISIONS[precision]
        form = layout.FORMS[form_name]

        def keep(array: Any) -> int:
            self.held.append(array)
            return int(array.address)

        products = {
            name: launches.Linear(form, n, k, activations, gated=gated)
            for name, (n, k, gated) in shape.products().items()
        }
        head = launches.Linear(form, shape.vocabulary, shape.d, activations)
        scratch = keep(card.empty(max(sum(op.scratch(batch)) for op in products.values()), "u1"))
        table = keep(card.array(np.array(form.table or [0], np.float32)))
        gain = keep(card.array(np.ones(shape.d, np.float32)))
        start = bench.rng.standard_normal((batch, shape.d)).astype(np.float32)
        x = [keep(card.array(start)) for _ in range(2)]
        qkv, attended, inner, logits = (
            keep(card.empty(batch * columns, np.float32))
            for columns in (products["qkv"].n, shape.heads * shape.width, shape.ff,
                            shape.vocabulary)
        )  # fmt: skip
        attention = launches.Attention(shape.heads, shape.kv_heads, shape.width)
        splits = attention.splits(batch, 1, CONTEXT, card.multiprocessors)
        parts = keep(card.empty(sum(attention.scratch(batch, 1, splits)), np.uint8))
        last = keep(card.array(np.full(batch, CONTEXT - 1, np.int32)))
        cache = np.zeros(batch * shape.kv_heads * CONTEXT * shape.width, np.float16)
        self.launches: list[launches.Launch] = []
        self.bytes = 0

        def product(op: launches.Linear, source: int, to: int, **more: int) -> None:
            weights = bench.weights(form, op.n, op.k)
            at = {"x": source, "y": to, "weights": keep(weights), "scratch": scratch,
                  "table": table, **more}  # fmt: skip
            self.bytes += tiles.packed_bytes(form, op.n, op.k)
            self.launches += op.launches(batch, at, card.multiprocessors)

        for _ in range(shape.layers):
            keys, values = (keep(card.array(cache)) for _ in range(2))
            product(products["qkv"], x[0], qkv, gain=gain)
            at = {"qkv": qkv, "last": last, "keys": keys, "values": values, "y": attended,
                  "scratch": parts}  # fmt: skip
            self.launches += attention.launches(batch, 1, CONTEXT, at, card.multiprocessors)
            product(products["o"], attended, x[1], residual=x[0])
            product(products["gate_up"], x[1], inner, gain=gain)
            product(products["down"], inner, x[0], residual=x[1])
            self.bytes += 2 * cache.nbytes
        product(head, x[0], logits, gain=gain)

    def enqueue(self) -> None:
        """Put a step on the card's stream."""
        self.card.launch_all(self.launches)

    def free(self) -> None:
        """Give its memory back."""
        self.card.free(*self.held)


def _torch_step(shape: Shape, batch: int) -> tuple[Callable[[], Any], int]:
    """The same step in fp16 by torch, and the bytes that it reads."""
    import torch
    from torch.nn import functional

    half = {"device": "cuda", "dtype": torch.float16}
    layers, count = [], 0
    for _ in range(shape.layers):
        matrices = {
            name: torch.randn(n, k, **half) / k**0.5 for name, (n, k, _) in shape.products().items()
        }
        caches = torch.randn(2, batch, shape.kv_heads, CONTEXT, shape.width, **half)
        layers.append((matrices, caches))
        count += sum(m.nbytes for m in matrices.values()) + caches.nbytes
    head = torch.randn(shape.vocabulary, shape.d, **half) / shape.d**0.5
    gain = torch.ones(shape.d, **half)
    start = torch.randn(batch, shape.d, **half)

    def step() -> Any:
        x = start
        for matrices, (keys, values) in layers:
            qkv = functional.linear(functional.rms_norm(x, (shape.d,), gain), matrices["qkv"])
            query = qkv[:, : shape.heads * shape.width]
            query = query.reshape(batch, shape.heads, 1, shape.width)
            y = functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
            x = x + functional.linear(y.reshape(batch, -1), matrices["o"])
            both = functional.linear(functional.rms_norm(x, (shape.d,), gain), matrices["gate_up"])
            gate, up = both.chunk(2, -1)
            x = x + functional.linear(functional.silu(gate) * up, matrices["down"])
        return functional.linear(functional.rms_norm(x, (shape.d,), gain), head)

    return step, count + head.nbytes


def models(bench: Bench) -> Iterator[Row]:
    """A token's time."""
    for name, shape in SHAPES.items():
        yield Row(f"{name} int4 a8 batch 1, launches in turn", lambda s=shape: _in_turn(bench, s))
        for batch in BATCHES:
            for precision in PRECISIONS:
                yield Row(
                    f"{name} {precision} batch {batch}",
                    lambda s=shape, p=precision, b=batch: _step(bench, s, p, b),
                )
            yield Row(
                f"{name} torch fp16 batch {batch}", lambda s=shape, b=batch: _torch(bench, s, b)
            )
    for precision in PRECISIONS:
        yield Row(f"SD 1.5 UNet products {precision}", lambda p=precision: _unet(bench, p))
    yield Row("SD 1.5 UNet products torch fp16", lambda: _torch_unet(bench))
    for model in ("terrain", "terrain:int8", "piper-joe", "piper-joe:int8", "smollm2-135m:int4"):
        yield Row(f"{model} by onnxruntime", lambda model=model: _onnxruntime(model))


def _step(bench: Bench, shape: Shape, precision: str, batch: int) -> Figures:
    decoder = Decoder(bench, shape, precision, batch)
    try:
        figures = bench.timed(decoder.enqueue)
    finally:
        decoder.free()
    return {**figures, "bytes": decoder.bytes, "note": f"{batch / figures['time_s']:.0f} token/s"}


def _in_turn(bench: Bench, shape: Shape) -> Figures:
    """Where no launch may begin before the one ahead of it is complete."""
    bench.card.overlaps, usual = False, bench.card.overlaps
    try:
        return _step(bench, shape, "int4 a8", 1)
    finally:
        bench.card.overlaps = usual


def _torch(bench: Bench, shape: Shape, batch: int) -> Figures:
    try:
        step, count = _torch_step(shape, batch)
    except ModuleNotFoundError as error:
        return {"absent": f"no {error.name}"}
    figures = torch_timed(step, bench.seconds)
    return {**figures, "bytes": count, "note": f"{batch / figures['time_s']:.0f} token/s"}


def _unet_products(d: int) -> tuple[tuple[int, int], ...]:
    """n, k: self-attention in and out, cross-attention in and out, GEGLU and what follows it."""
    return ((3 * d, d), (d, d), (d, d), (d, d), (8 * d, d), (d, 4 * d))


def _unet(bench: Bench, precision: str) -> Figures:
    form_name, activations = PRECISIONS[precision]
    form = layout.FORMS[form_name]
    card = bench.card
    held, steps, work = [], [], 0
    table = card.array(np.array(form.table or [0], np.float32))
    for tokens, d, count in UNET:
        for n, k in _unet_products(d):
            op = launches.Linear(form, n, k, activations)
            arrays = {
                "x": card.array(bench.rng.standard_normal(tokens * k).astype(np.float32)),
                "y": card.empty(tokens * n, np.float32), "weights": bench.weights(form, n, k),
                "scratch": card.empty(sum(op.scratch(tokens)), np.uint8),
            }  # fmt: skip
            held += arrays.values()
            at = {name: array.address for name, array in arrays.items()}
            at["table"] = table.address
            steps += list(op.launches(tokens, at, card.multiprocessors)) * count
            work += 2 * tokens * n * k * count
    figures = bench.timed(lambda: card.launch_all(steps))
    card.free(*held, table)
    return {**figures, "flop": work}


def _torch_unet(bench: Bench) -> Figures:
    try:
        import torch
    except ModuleNotFoundError:
        return {"absent": "no torch"}
    pairs, work = [], 0
    for tokens, d, count in UNET:
        for n, k in _unet_products(d):
            x, w = (torch.randn(rows, k, device="cuda", dtype=torch.float16)
                    for rows in (tokens, n))  # fmt: skip
            pairs += [(x, w)] * count
            work += 2 * tokens * n * k * count
    figures = torch_timed(
        lambda: [torch.nn.functional.linear(x, w) for x, w in pairs], bench.seconds
    )
    return {**figures, "flop": work}


def _onnxruntime(model: str) -> Figures:
    try:
        import onnxruntime as ort

        import leangen
    except ModuleNotFoundError as error:
        return {"absent": f"no {error.name}"}
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return {"absent": "onnxruntime has no CUDA provider: pip install 'leangen[gpu]'"}
    loaded = leangen.load(model, device="cuda")
    request: dict[str, Any] = {"seed": 0}
    given: tuple[str, ...] = ()
    if model.startswith("piper"):
        request["phonemes"] = "həlˈoʊ wˈɜːld"
    elif model.startswith("smollm2"):
        given, request = ("The capital of France is",), {"max_new_tokens": 64}
    loaded.generate(*given, **request)
    receipt = loaded.generate(*given, **request).receipt
    figures: Figures = {"time_s": receipt.latency.total_s, "note": str(receipt.runtime.kernels)}
    if receipt.energy.gross_j is not None:
        figures |= {"joules": receipt.energy.gross_j, "u_joules": receipt.energy.u_j}
    return figures


def energy(bench: Bench) -> Iterator[Row]:
    """Joules of a token above idle."""
    yield Row("idle, context alive", _idle)
    yield Row("counter against power", _counter_against_power)
    for name, shape in SHAPES.items():
        for batch in BATCHES:
            for precision in (*PRECISIONS, "torch fp16"):
                yield Row(
                    f"{name} {precision} batch {batch}",
                    lambda s=shape, p=precision, b=batch: _joules(bench, s, p, b),
                )


def measured(work: Callable[[], None], seconds: float) -> tuple[float, float, float, int]:
    """Joules, their u (k = 2), seconds, and how often `work` ran in a window of the meter."""
    from leangen.meters import is_gpu, select, window
    from leangen.meters.meter import Selection

    chosen = select(device="cuda")
    cards = tuple(meter for meter in chosen.meters if is_gpu(meter))
    if not cards:
        raise RuntimeError(f"no meter of the card: {chosen.reason}")
    opened = window.begin(Selection(meters=cards, reason=None), aligned=True)
    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        work()
        count += 1
        window.keep_up(opened)
    (found, *others) = window.end(opened)
    lasted = time.perf_counter() - begin
    if others or found.energy_uj is None:
        raise RuntimeError(f"the meter has no figure: {found.faults or 'several cards'}")
    random, systematic = found.u_random_j or 0.0, found.u_systematic_j or 0.0
    return found.energy_uj / 1e6, (random**2 + systematic**2) ** 0.5, lasted, count


def _idle() -> Figures:
    power_w, u_w = idle_power()
    return {"joules": power_w, "u_joules": u_w, "unit": "W"}


@functools.cache
def idle_power() -> tuple[float, float]:
    """Watts and their u of the card with the context alive and nothing to do; once a process."""
    joules, u, seconds, _ = measured(lambda: time.sleep(0.05), 2 * WINDOW_S)
    return joules / seconds, u / seconds


def _counter_against_power() -> Figures:
    from leangen.meters import is_gpu, select
    from leangen.meters.probing import probe

    cards = [meter for meter in select(device="cuda").meters if is_gpu(meter)]
    if not cards:
        return {"absent": "no meter of the card"}
    meter = probe(cards[0])
    return {"note": f"{meter.name}: {meter.tick}; {meter.note}"}


def _joules(bench: Bench, shape: Shape, precision: str, batch: int) -> Figures:
    decoder = None
    if precision == "torch fp16":
        try:
            import torch

            step, _ = _torch_step(shape, batch)
        except ModuleNotFoundError as error:
            return {"absent": f"no {error.name}"}
        replay, wait = torch_graph(step), torch.cuda.synchronize
    else:
        idle_power()  # before the card is warm
        decoder = Decoder(bench, shape, precision, batch)
        replay, wait = bench.card.graph(decoder.enqueue), bench.card.wait
    try:
        replay()
        wait()
        begin = time.perf_counter()
        replay()
        wait()
        several = max(1, int(0.02 / (time.perf_counter() - begin)))

        def work() -> None:
            for _ in range(several):
                replay()
            wait()

        joules, u, seconds, count = measured(work, WINDOW_S)
    finally:
        if decoder is not None:
            decoder.free()
    tokens = count * several * batch
    marginal = joules - idle_power()[0] * seconds
    return {
        "time_s": seconds / (count * several), "joules": joules / tokens, "u_joules": u / tokens,
        "unit": "J/token",
        "marginal_j": marginal / tokens,
        "note": f"gross; above idle {marginal / tokens:.3g} J; {joules / seconds:.0f} W, "
        f"{tokens / seconds:.0f} token/s",
    }  # fmt: skip
