"""Each operator against its roofline and against stock ONNX Runtime, alternating, medians.

    python bench/kernels.py [--threads 2] [--seconds 0.5] [--json]

Weights' bytes per second stand against a stream from memory measured in the same run (256 MB summed
by NumPy on as many threads; weights that stay in a cache can be faster), multiply-adds against the
count that the instruction set allows at `--clock-ghz`. Stock is MatMulNBits at accuracy level 4
with symmetric weights: a lossless Q4_1 costs it another ReduceSum and Gemm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import leangen_kernels
import numpy as np
import onnxruntime as ort
from leangen_kernels import layout
from onnx import TensorProto, helper, numpy_helper

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536), (32768, 2048), (49152, 576))
FORMS = ("q4", "q4_min", "q8")
TOKENS = (1, 4, 8, 256)

# Multiply-adds per cycle and core of the dot products alone: 512 bits of them twice in two cycles
# on Zen 4, 256 bits twice a cycle elsewhere; a 128-bit sdot twice a cycle on small ARM cores.
MACS_PER_CYCLE = {"avx512": 64, "avxvnni": 64, "avx2": 64, "neon": 32, "portable": 16}


def session(own: bool, form: layout.Form, n: int, k: int, threads: int) -> ort.InferenceSession:
    """One linear layer of random weights."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 1 << form.bits, (n, k), dtype=np.uint8)
    scales = rng.random((n, k // 32)).astype(np.float16).astype(np.float32)
    if own:
        minima = -8 * scales if form.minimum else None
        constants = {"w": layout.pack(form, codes, scales, minima)}
        attributes = {"domain": "leangen", "form": form.name, "n": n, "k": k}
    else:
        blocks = codes.reshape(n, k // 32, 32)
        if form.bits == 4:
            blocks = blocks[:, :, 0::2] | (blocks[:, :, 1::2] << 4)
        constants = {"w": blocks, "s": scales}
        attributes = {"domain": "com.microsoft", "N": n, "K": k, "bits": form.bits,
                      "block_size": 32, "accuracy_level": 4}  # fmt: skip
    name = "Linear" if own else "MatMulNBits"
    node = helper.make_node(name, ["x", *constants], ["y"], **attributes)
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "one",
        [info("x", TensorProto.FLOAT, ["m", k])],
        [info("y", TensorProto.FLOAT, ["m", n])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    domains = [("", 21), ("com.microsoft", 1), ("leangen", 1)]
    opsets = [helper.make_opsetid(*domain) for domain in domains]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(leangen_kernels.library()))
    return ort.InferenceSession(proto.SerializeToString(), options)


def alternate(sides: list, feeds: dict, seconds: float) -> list[float]:
    """Median seconds of one run of each side."""
    times: list[list[float]] = [[] for _ in sides]
    for side in sides:
        side.run(None, feeds)
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(times[0]) < 5:
        for side, found in zip(sides, times, strict=True):
            for _ in range(3):
                start = time.perf_counter()
                side.run(None, feeds)
                found.append(time.perf_counter() - start)
    return [statistics.median(found) for found in times]


def stream_gb_per_s(threads: int, size: int = 1 << 28) -> float:
    """How fast `threads` threads read `size` bytes from memory."""
    parts = np.array_split(np.ones(size // 8), threads)
    with ThreadPoolExecutor(threads) as pool:
        times = []
        for _ in range(9):
            start = time.perf_counter()
            list(pool.map(np.sum, parts))
            times.append(time.perf_counter() - start)
    return size / min(times) / 1e9


def main() -> None:
    """Print a line for each shape, form and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--clock-ghz", type=float, help="for the share of peak multiply-adds")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    variant, reason = leangen_kernels.status()
    if variant is None:
        parser.error(reason)
    if not options.json:
        print(f"{variant} ({reason}), {options.threads} threads")
    stream = stream_gb_per_s(options.threads)
    rows = []
    for n, k in SHAPES:
        for name in FORMS:
            form = layout.FORMS[name]
            size = form.packed_bytes(n, k)
            sides = [session(own, form, n, k, options.threads) for own in (True, False)]
            for tokens in TOKENS:
                if tokens * n * k > 2e9:
                    continue
                x = np.random.default_rng(1).standard_normal((tokens, k)).astype(np.float32)
                ours, stock = alternate(sides, {"x": x}, options.seconds)
                macs = tokens * n * k / ours / 1e9
                row = {
                    "form": name, "n": n, "k": k, "tokens": tokens, "leangen_s": ours,
                    "stock_s": stock, "ratio": stock / ours, "gb_per_s": size / ours / 1e9,
                    "stream_gb_per_s": stream, "gmac_per_s": macs,
                }  # fmt: skip
                share = ""
                if options.clock_ghz:
                    peak = MACS_PER_CYCLE[variant] * options.clock_ghz * options.threads
                    row["peak_gmac_per_s"] = peak
                    share = f" of {peak:.0f}"
                rows.append(row)
                if not options.json:
                    print(
                        f"{name:7} n {n:5} k {k:4} m {tokens:3}  {ours * 1e6:8.1f} us"
                        f"  {row['gb_per_s']:5.1f} of {stream:5.1f} GB/s"
                        f"  {macs:6.1f}{share} GMAC/s  {row['ratio']:5.2f} x stock",
                        flush=True,
                    )
    if options.json:
        found = {"variant": variant, "threads": options.threads, "rows": rows}
        print(json.dumps(found))


if __name__ == "__main__":
    main()
