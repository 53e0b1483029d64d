"""The rows of `bench/gpu.py` that others compute: torch, bitsandbytes, ONNX Runtime's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
from gpu import Figures, Row
from gpu_rows import MATRICES, TOKENS, Bench, torch_timed
from leangen_kernels import layout
from leangen_kernels.cuda import launches, tiles

from leangen import devices


def peers(bench: Bench) -> Iterator[Row]:
    """The same shapes as the part `kernels`."""
    shapes = [(n, k, 1) for n, k in MATRICES] + [(4096, 14336, tokens) for tokens in TOKENS]
    makers: dict[str, Callable[..., Figures]] = {
        "torch fp16": _torch, "torch bf16": _torch, "bitsandbytes nf4": _bitsandbytes,
        "bitsandbytes fp4": _bitsandbytes, "onnxruntime MatMulNBits": _onnxruntime,
    }  # fmt: skip
    for n, k, tokens in shapes:
        for name, maker in makers.items():
            yield Row(
                f"{name} {n}x{k} M {tokens}",
                lambda maker=maker, name=name, shape=(n, k, tokens): maker(bench, name, *shape),
            )
    for tokens in (64, 512, 2048):
        yield Row(
            f"dequantize q4 + cuBLAS 4096x14336 M {tokens}",
            lambda tokens=tokens: _dequantized(bench, tokens),
        )


def _missing(*names: str) -> Figures | None:
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            return {"absent": f"{name} cannot be imported: {error}"[:120]}
    return None


def _torch(bench: Bench, name: str, n: int, k: int, tokens: int) -> Figures:
    if missing := _missing("torch"):
        return missing
    import torch

    kind = torch.bfloat16 if "bf16" in name else torch.float16
    copies = max(1, min(-(-4 * bench.card.l2_bytes // (2 * n * k)), 64))
    held = [torch.randn(n, k, device="cuda", dtype=kind) / k**0.5 for _ in range(copies)]
    x = torch.randn(tokens, k, device="cuda", dtype=kind)
    figures = torch_timed(
        lambda: [torch.nn.functional.linear(x, w) for w in held], bench.seconds, copies
    )
    return {**figures, "bytes": 2 * (n * k + tokens * (n + k)), "flop": 2 * tokens * n * k}


def _bitsandbytes(bench: Bench, name: str, n: int, k: int, tokens: int) -> Figures:
    if missing := _missing("torch", "bitsandbytes"):
        return missing
    import bitsandbytes
    import torch

    kind = name.rpartition(" ")[2]
    copies = max(1, min(-(-8 * bench.card.l2_bytes // (n * k)), 64))
    held = []
    for _ in range(copies):
        w = torch.randn(n, k, device="cuda", dtype=torch.float16)
        held.append(bitsandbytes.functional.quantize_4bit(w, blocksize=64, quant_type=kind))
    x = torch.randn(tokens, k, device="cuda", dtype=torch.float16)

    def work() -> Any:
        return [bitsandbytes.matmul_4bit(x, w.t(), quant_state=state) for w, state in held]

    figures = torch_timed(work, bench.seconds, copies)
    return {**figures, "bytes": n * k // 2 + n * k // 16, "flop": 2 * tokens * n * k}


def _dequantized(bench: Bench, tokens: int) -> Figures:
    """Our dequantized weights handed to cuBLAS: what `linear` for many tokens must beat."""
    if missing := _missing("torch"):
        return missing
    import torch

    form, n, k = layout.FORMS["q4"], 4096, 14336
    weights = bench.weights(form, n, k)
    y = bench.card.empty(n * k, np.float16)
    op = launches.Linear(form, n, k)
    ours = bench.timed(
        lambda: bench.card.launch_all([op.dequantize(weights.address, 0, y.address)])
    )
    bench.card.free(weights, y)
    x = torch.randn(tokens, k, device="cuda", dtype=torch.float16)
    w = torch.randn(n, k, device="cuda", dtype=torch.float16)
    product = torch_timed(lambda: torch.nn.functional.linear(x, w), bench.seconds)
    return {
        "time_s": ours["time_s"] + product["time_s"], "flop": 2 * tokens * n * k,
        "bytes": tiles.packed_bytes(form, n, k) + 4 * n * k,
        "note": f"of it {ours['time_s'] * 1e6:.0f} us to dequantize",
    }  # fmt: skip


def _onnxruntime(bench: Bench, name: str, n: int, k: int, tokens: int) -> Figures:
    if missing := _missing("onnxruntime", "onnx"):
        return missing
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    if devices.CUDA_PROVIDER not in ort.get_available_providers():
        return {"absent": "onnxruntime has no CUDA provider: pip install 'leangen[gpu]'"}
    layers = max(1, min(-(-8 * bench.card.l2_bytes // (n * k)), 16))
    codes = bench.rng.integers(0, 256, (n, k // 32, 16), dtype=np.uint8)
    scales = np.full((n, k // 32), 0.05 / k**0.5, np.float16)
    nodes, constants, outputs = [], [], []
    info = helper.make_tensor_value_info
    for at in range(layers):
        constants += [numpy_helper.from_array(np.roll(codes, at), f"w{at}"),
                      numpy_helper.from_array(scales, f"s{at}")]  # fmt: skip
        nodes.append(helper.make_node(
            "MatMulNBits", ["x", f"w{at}", f"s{at}"], [f"y{at}"], domain="com.microsoft",
            N=n, K=k, bits=4, block_size=32,
        ))  # fmt: skip
        outputs.append(info(f"y{at}", TensorProto.FLOAT16, [tokens, n]))
    x = bench.rng.standard_normal((tokens, k)).astype(np.float16)
    graph = helper.make_graph(
        nodes, "one", [info("x", TensorProto.FLOAT16, [tokens, k])], outputs, constants
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    if (why := devices.lacks(0)) is not None:
        return {"absent": why}
    session = ort.InferenceSession(proto, providers=[devices.CUDA_PROVIDER], **devices.ALONE)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x, "cuda", 0))
    for at in range(layers):
        binding.bind_output(f"y{at}", "cuda", 0)
    import time

    def stretch(count: int) -> float:
        binding.synchronize_inputs()
        begin = time.perf_counter()
        for _ in range(count):
            session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return (time.perf_counter() - begin) / count / layers

    stretch(3)
    count = max(1, int(bench.seconds / 5 / max(stretch(3) * layers, 1e-6)))
    timed = sorted(stretch(count) for _ in range(5))
    return {"time_s": timed[2], "spread_s": timed[-1] - timed[0], "flop": 2 * tokens * n * k,
            "bytes": n * k // 2 + n * k // 16, "note": "host clock, no graph"}  # fmt: skip
