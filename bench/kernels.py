"""Each operator against its roofline and against stock ONNX Runtime, alternating, medians.

    python bench/kernels.py [--threads 2] [--seconds 0.5] [--json]

Weights' bytes per second stand against a stream from memory measured in the same run (256 MB summed
by NumPy on as many threads; weights that stay in a cache can be faster), multiply-adds against the
count that the instruction set allows at `--clock-ghz`. Stock is MatMulNBits at accuracy level 4
with symmetric weights: a lossless Q4_1 costs it another ReduceSum and Gemm. Attention stands
against GroupQueryAttention, its bytes are those of the keys and values seen.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator

import leangen_kernels
import numpy as np
import onnx
import onnxruntime as ort
from leangen_kernels import cache_layout, conv_layout, layout
from memory_stream import Stream
from onnx import TensorProto, helper, numpy_helper

SHAPES = ((960, 576), (576, 576), (3072, 576), (576, 1536), (32768, 2048), (49152, 576))
FORMS = ("q4", "q4_min", "q5", "q8")
TOKENS = (1, 4, 8, 256)

# outputs, channels, size, kernel: what terrain and piper-joe spend most of their time on
CONVOLUTIONS = (
    (32, 64, (128, 128), (3, 3)),
    (32, 32, (128, 128), (3, 3)),
    (64, 64, (64, 64), (3, 3)),
    (96, 96, (32, 32), (3, 3)),
    (128, 128, (8, 8), (3, 3)),
    (192, 64, (32, 32), (1, 1)),
    (128, 128, (1632,), (7,)),
    (32, 32, (52224,), (7,)),
)

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
        attributes = {"domain": "com.microsoft", "N": n, "K": k, "bits": 4 if form.bits == 4 else 8,
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
    return open_session(graph, threads)


def open_session(graph: onnx.GraphProto, threads: int) -> ort.InferenceSession:
    """A session on one graph, with leangen's operators."""
    domains = [("", 21), ("com.microsoft", 1), ("leangen", 1)]
    opsets = [helper.make_opsetid(*domain) for domain in domains]
    return opened(helper.make_model(graph, opset_imports=opsets, ir_version=10), threads)


def opened(proto: onnx.ModelProto, threads: int) -> ort.InferenceSession:
    """A session with leangen's operators."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # Else the threads of the side that has just run are in the way of the other's.
    options.add_session_config_entry("session.intra_op.spin_duration_us", "200")
    options.register_custom_ops_library(str(leangen_kernels.library()))
    return ort.InferenceSession(proto.SerializeToString(), options)


class Attention:
    """One layer of SmolLM2-135M's shape, its caches bound so that they are updated in place."""

    HEADS, KV_HEADS, WIDTH, LAYERS = 9, 3, 64, 16

    def __init__(self, cache: str, stock: bool, past: int, new: int, threads: int) -> None:
        held = cache_layout.CACHES[cache]
        kind = helper.np_dtype_to_tensor_dtype(held.dtype)
        capacity = -(-(past + new) // 16) * 16
        shape = (1, self.KV_HEADS, capacity, held.columns(self.WIDTH))
        info, nodes, caches = helper.make_tensor_value_info, [], []
        rotation = ("cos", "sin")
        inputs = [info("qkv", TensorProto.FLOAT, None), info("last", TensorProto.INT32, [1])]
        inputs += [info("total", TensorProto.INT32, [])] * stock
        inputs += [info(name, TensorProto.FLOAT, None) for name in rotation]
        outputs = []
        for i in range(self.LAYERS):  # more than one, so that calling it is not what is timed
            pair = [f"key{i}", f"value{i}"]
            if stock:
                node = helper.make_node(
                    "GroupQueryAttention", ["qkv", "", "", *pair, "last", "total", *rotation],
                    [f"y{i}", *(f"new_{name}" for name in pair)], domain="com.microsoft",
                    num_heads=self.HEADS, kv_num_heads=self.KV_HEADS, do_rotary=1,
                )  # fmt: skip
            else:
                node = helper.make_node(
                    "Attention", ["qkv", *pair, "last", *rotation],
                    [f"y{i}", *(f"new_{name}" for name in pair)], domain="leangen",
                    heads=self.HEADS, kv_heads=self.KV_HEADS, cache=cache,
                )  # fmt: skip
            nodes.append(node)
            caches += pair
            inputs += [info(name, kind, shape) for name in pair]
            outputs.append(info(f"y{i}", TensorProto.FLOAT, None))
            outputs += [info(f"new_{name}", kind, shape) for name in pair]
        self.session = open_session(helper.make_graph(nodes, "attention", inputs, outputs), threads)
        self.binding = self.session.io_binding()
        angles = np.outer(np.arange(capacity), 1e4 ** (-np.arange(32) / 32))
        columns = (self.HEADS + 2 * self.KV_HEADS) * self.WIDTH
        feeds = {
            "qkv": np.random.default_rng(1).standard_normal((1, new, columns)).astype(np.float32),
            "last": np.array([past + new - 1], np.int32),
            "total": np.array(past + new, np.int32),
            "cos": np.cos(angles).astype(np.float32),
            "sin": np.sin(angles).astype(np.float32),
        }
        for name in {given.name for given in inputs} & feeds.keys():
            self.binding.bind_cpu_input(name, feeds[name])
        for name in caches:
            value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, held.dtype))
            self.binding.bind_ortvalue_input(name, value)
            self.binding.bind_ortvalue_output(f"new_{name}", value)
        for i in range(self.LAYERS):
            self.binding.bind_output(f"y{i}")
        self.bytes = 2 * self.KV_HEADS * (past + new) * held.columns(self.WIDTH) * held.size
        self.macs = 2 * self.HEADS * self.WIDTH * new * (past + (new + 1) // 2)

    def run(self, outputs: None, feeds: dict) -> None:
        """As a session's: everything is bound already."""
        self.session.run_with_iobinding(self.binding)


def conv_session(kind: str, shape: tuple, threads: int) -> ort.InferenceSession:
    """One convolution of random 8-bit weights: leangen's, or ORT's in fp32 or between QDQ."""
    n, channels, size, kernel = shape
    rng = np.random.default_rng(0)
    codes = rng.integers(-63, 64, (n, channels, *kernel)).astype(np.int8)
    pads = [length // 2 for length in kernel] * 2
    attributes = {"kernel_shape": kernel, "pads": pads}
    if kind == "leangen":
        flat = codes.reshape(n, -1)
        scales = rng.random((n, -(-flat.shape[1] // 32))).astype(np.float32)
        constants = {"w": conv_layout.pack(8, flat, scales, 32)}
        more = {"domain": "leangen", "n": n, "bits": 8, "block": 32}
        nodes = [helper.make_node("Conv", ["x", "w"], ["y"], **attributes, **more)]
    elif kind == "fp32":
        constants = {"w": codes.astype(np.float32)}
        nodes = [helper.make_node("Conv", ["x", "w"], ["y"], **attributes)]
    else:
        constants = {
            "q": codes, "s": np.ones(n, np.float32), "sx": np.float32(0.05), "zx": np.uint8(128),
            "sy": np.float32(10),
        }  # fmt: skip
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "sx", "zx"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "sx", "zx"], ["xd"]),
            helper.make_node("DequantizeLinear", ["q", "s"], ["wd"], axis=0),
            helper.make_node("Conv", ["xd", "wd"], ["c"], **attributes),
            helper.make_node("QuantizeLinear", ["c", "sy", "zx"], ["cq"]),
            helper.make_node("DequantizeLinear", ["cq", "sy", "zx"], ["y"]),
        ]
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "one",
        [info("x", TensorProto.FLOAT, [1, channels, *size])],
        [info("y", TensorProto.FLOAT, [1, n, *size])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid(*domain) for domain in [("", 21), ("leangen", 1)]]
    return opened(helper.make_model(graph, opset_imports=opsets, ir_version=10), threads)


def convolutions(threads: int, seconds: float) -> Iterator[dict]:
    """A row for each shape."""
    for shape in CONVOLUTIONS:
        n, channels, size, kernel = shape
        sides = [conv_session(kind, shape, threads) for kind in ("leangen", "fp32", "qdq")]
        x = np.random.default_rng(1).standard_normal((1, channels, *size)).astype(np.float32)
        ours, fp32, qdq = alternate(sides, {"x": x}, seconds)
        yield {
            "n": n, "channels": channels, "size": size, "kernel": kernel, "leangen_s": ours,
            "fp32_s": fp32, "qdq_s": qdq, "ratio": fp32 / ours, "ratio_qdq": qdq / ours,
            "gmac_per_s": n * channels * math.prod((*size, *kernel)) / ours / 1e9,
        }  # fmt: skip


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
    with Stream(size, threads) as stream:
        return size / min(stream.seconds() for _ in range(9)) / 1e9


def main() -> None:
    """Print a line for each shape, form and number of tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    for past, new in ((255, 1), (4095, 1), (0, 256)):
        for cache in cache_layout.CACHES:
            ours = Attention(cache, False, past, new, options.threads)
            stock = Attention("fp32", True, past, new, options.threads)
            seconds = [
                total / Attention.LAYERS for total in alternate([ours, stock], {}, options.seconds)
            ]
            row = {
                "cache": cache, "past": past, "tokens": new, "leangen_s": seconds[0],
                "stock_s": seconds[1], "ratio": seconds[1] / seconds[0],
                "gb_per_s": ours.bytes / seconds[0] / 1e9, "stream_gb_per_s": stream,
                "gmac_per_s": ours.macs / seconds[0] / 1e9,
            }  # fmt: skip
            rows.append(row)
            if not options.json:
                print(
                    f"attention, cache {cache}, past {past:4} m {new:3}  {seconds[0] * 1e6:8.1f} us"
                    f"  {row['gb_per_s']:5.1f} of {stream:5.1f} GB/s"
                    f"  {row['gmac_per_s']:6.1f} GMAC/s  {row['ratio']:5.2f} x stock with fp32",
                    flush=True,
                )
    peak = MACS_PER_CYCLE[variant] * (options.clock_ghz or math.nan) * options.threads
    convolved = []
    for row in convolutions(options.threads, options.seconds):
        convolved.append(row)
        if not options.json:
            share = f" of {peak:.0f}" if options.clock_ghz else ""
            print(
                f"conv {row['n']:3} x {row['channels']:3} {row['kernel']} on {row['size']}"
                f"  {row['leangen_s'] * 1e6:8.1f} us  {row['gmac_per_s']:6.1f}{share} GMAC/s"
                f"  {row['ratio']:5.2f} x stock fp32  {row['ratio_qdq']:5.2f} x stock QDQ",
                flush=True,
            )
    if options.json:
        found = {
            "variant": variant, "threads": options.threads, "rows": rows, "convolutions": convolved
        }  # fmt: skip
        print(json.dumps(found))


if __name__ == "__main__":
    main()
