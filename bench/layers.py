"""A decoder of SmolLM2-135M's shape and random Q4_1 weights, against stock ONNX Runtime.

    python bench/layers.py [--threads 2] [--context 256] [--prefill 256] [--json]

Prefill of one prompt, decoding of one sequence, and of several at once (leangen alone: what they
cost over a single one). The embedding is left out. Both sides run alternating in one process. Stock
is the lossless rewrite that a portable bundle holds: MatMulNBits with zero point 8, plus the
blocks' sums times the offsets. As leangen lowers a model, it keeps keys and values in fp16; stock
ONNX Runtime keeps them in fp32, as it must.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import leangen_kernels
import numpy as np
import onnxruntime as ort
from leangen_kernels import layout
from onnx import TensorProto, helper, numpy_helper

from leangen.lowering import chain

LAYERS, WIDTH, MLP, HEADS, KV_HEADS, HEAD, VOCAB = 30, 576, 1536, 9, 3, 64, 49152
QKV = (HEADS + 2 * KV_HEADS) * HEAD
Q4, Q8 = layout.FORMS["q4_min"], layout.FORMS["q8"]


class Graph:
    """Nodes and constants of one side. Weights are drawn alike on both."""

    def __init__(self, own: bool) -> None:
        self.own, self.nodes, self.constants = own, [], []
        self.rng = np.random.default_rng(0)
        gain = np.ones(WIDTH, np.float32)
        self.gain = self.constant("gain", gain)

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def node(self, op: str, inputs: list[str], name: str, outputs: int = 1, **more: object) -> str:
        names = [name, *(f"{name}.{i}" for i in range(1, outputs))]
        self.nodes.append(helper.make_node(op, inputs, names, **more))
        return name

    def matrix(self, n: int, k: int, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        codes = self.rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
        scales = (self.rng.random((n, k // 32)) / (1 << bits) / 8 + 1e-3).astype(np.float16)
        minima = (-(1 << bits - 1) * scales.astype(np.float32)).astype(np.float16)
        return codes, scales.astype(np.float32), minima.astype(np.float32)

    def norm(self, x: str, y: str, name: str) -> tuple[str, str]:
        """Norm of x + y, and the sum."""
        self.nodes.append(
            helper.make_node(
                "SkipSimplifiedLayerNormalization", [y, x, self.gain],
                [f"{name}.y", "", "", f"{name}.sum"], domain="com.microsoft", epsilon=1e-5,
            )
        )  # fmt: skip
        return f"{name}.y", f"{name}.sum"

    def linear(
        self, x: str, n: int, k: int, name: str, *, bits: int = 4, gain: str = "",
        residual: str = "", gated: bool = False,
    ) -> str:  # fmt: skip
        codes, scales, minima = self.matrix(n, k, bits)
        if self.own:
            if gated:
                codes, scales, minima = (
                    layout.interleave_gate_up(*np.split(value, 2))
                    for value in (codes, scales, minima)
                )
            form = Q4 if bits == 4 else Q8
            packed = layout.pack(form, codes, scales, minima if form.minimum else None)
            inputs = [x, self.constant(f"{name}.w", packed), gain, "", residual]
            return self.node(
                "Linear", inputs, name, domain="leangen",
                form=form.name, n=n, k=k, gated=int(gated), epsilon=1e-5,
            )  # fmt: skip
        blocks = codes.reshape(n, k // 32, 32)
        if bits == 4:
            blocks = blocks[:, :, 0::2] | (blocks[:, :, 1::2] << 4)
        inputs = [x, self.constant(f"{name}.w", blocks), self.constant(f"{name}.s", scales)]
        y = self.node(
            "MatMulNBits", inputs, f"{name}.product", domain="com.microsoft",
            N=n, K=k, bits=bits, block_size=32, accuracy_level=4,
        )  # fmt: skip
        if bits == 8:
            return y
        shape = self.constant(f"{name}.shape", np.array([-1, k // 32, 32]))
        split = self.node("Reshape", [x, shape], f"{name}.blocks")
        axis = self.constant(f"{name}.axis", np.array([-1]))
        sums = self.node("ReduceSum", [split, axis], f"{name}.sums", keepdims=0)
        offsets = self.constant(f"{name}.o", minima + 8 * scales)
        return self.node("Gemm", [sums, offsets, y], name, transB=1)

    def attention(self, qkv: str, layer: int) -> str:
        name = f"attention{layer}"
        if self.own:
            inputs = [qkv, f"key{layer}", f"value{layer}", "seqlens", "cos", "sin"]
            return self.node(
                "Attention", inputs, name, 3, domain="leangen",
                heads=HEADS, kv_heads=KV_HEADS, cache="fp16",
            )  # fmt: skip
        rows = self.constant(f"{name}.rows", np.array([1, -1, QKV]))
        packed = self.node("Reshape", [qkv, rows], f"{name}.qkv")
        inputs = [packed, "", "", f"key{layer}", f"value{layer}", "seqlens", "total", "cos", "sin"]
        y = self.node(
            "GroupQueryAttention", inputs, name, 3, domain="com.microsoft",
            num_heads=HEADS, kv_num_heads=KV_HEADS, do_rotary=1,
        )  # fmt: skip
        flat = self.constant(f"{name}.flat", np.array([-1, WIDTH]))
        return self.node("Reshape", [y, flat], f"{name}.y")

    def build(self, capacity: int, sequences: int) -> bytes:
        positions = np.outer(np.arange(capacity), 1e4 ** (-np.arange(HEAD // 2) / (HEAD // 2)))
        self.constant("cos", np.cos(positions).astype(np.float32))
        self.constant("sin", np.sin(positions).astype(np.float32))
        h = self.own_layers() if self.own else self.stock_layers()
        info, floats = helper.make_tensor_value_info, TensorProto.FLOAT
        kept = TensorProto.FLOAT16 if self.own else floats
        cache, batch = [sequences, KV_HEADS, capacity, HEAD], [sequences] if self.own else []
        inputs = [
            info("x", floats, [*batch, "new", WIDTH]), info("last", TensorProto.INT64, [1]),
            info("seqlens", TensorProto.INT32, [sequences]), info("total", TensorProto.INT32, []),
        ]  # fmt: skip
        outputs = [info(h, floats, [*batch, "wanted", VOCAB])]
        for layer in range(LAYERS):
            inputs += [info(f"{kind}{layer}", kept, cache) for kind in ("key", "value")]
            outputs += [info(f"attention{layer}.{i}", kept, cache) for i in (1, 2)]
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, self.constants)
        domains = [("", 21), ("com.microsoft", 1), ("leangen", 1)]
        opsets = [helper.make_opsetid(*domain) for domain in domains]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        chain.fuse(model)
        return model.SerializeToString()

    def own_layers(self) -> str:
        h = "x"
        for i in range(LAYERS):
            qkv = self.linear(h, QKV, WIDTH, f"qkv{i}", gain=self.gain)
            y = self.attention(qkv, i)
            h = self.linear(y, WIDTH, WIDTH, f"o{i}", residual=h)
            y = self.linear(h, 2 * MLP, WIDTH, f"gate_up{i}", gain=self.gain, gated=True)
            h = self.linear(y, WIDTH, MLP, f"down{i}", residual=h)
        h = self.node("Gather", [h, "last"], "wanted", axis=1)
        return self.linear(h, VOCAB, WIDTH, "logits", bits=8, gain=self.gain)

    def stock_layers(self) -> str:
        zero = self.constant("zero", np.float32(0))
        h, y = "x", self.node("Mul", ["x", zero], "nothing")
        for i in range(LAYERS):
            x, h = self.norm(h, y, f"norm{i}")
            y = self.attention(self.linear(x, QKV, WIDTH, f"qkv{i}"), i)
            x, h = self.norm(h, self.linear(y, WIDTH, WIDTH, f"o{i}"), f"mlp_norm{i}")
            both = self.linear(x, 2 * MLP, WIDTH, f"gate_up{i}")
            self.nodes.append(
                helper.make_node("Split", [both], [f"gate{i}", f"up{i}"], axis=-1, num_outputs=2)
            )
            silu = self.node(
                "QuickGelu", [f"gate{i}"], f"silu{i}", domain="com.microsoft", alpha=1.0
            )
            gated = self.node("Mul", [silu, f"up{i}"], f"gated{i}")
            y = self.linear(gated, WIDTH, MLP, f"down{i}")
        x, _ = self.norm(h, y, "norm")
        x = self.node("Gather", [x, "last"], "wanted", axis=0)
        return self.linear(x, VOCAB, WIDTH, "logits", bits=8)


class Runner:
    """One side's session, its caches bound so that they are updated in place."""

    def __init__(
        self, own: bool, threads: int, capacity: int, spin_us: int, sequences: int = 1
    ) -> None:
        self.own, self.sequences = own, sequences
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin_us))
        options.register_custom_ops_library(str(leangen_kernels.library()))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(Graph(own).build(capacity, sequences))
            self.session = ort.InferenceSession(str(path), options)
        shape = (sequences, KV_HEADS, capacity, HEAD)
        self.caches = [
            ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float16 if own else np.float32))
            for _ in range(2 * LAYERS)
        ]
        self.binding = self.session.io_binding()
        outputs = [output.name for output in self.session.get_outputs()]
        self.binding.bind_output(outputs[0])
        for i, cache in enumerate(self.caches):
            kind = "key" if i % 2 == 0 else "value"
            self.binding.bind_ortvalue_input(f"{kind}{i // 2}", cache)
            self.binding.bind_ortvalue_output(outputs[1 + i], cache)

    def run(self, x: np.ndarray, past: int) -> tuple[np.ndarray, float]:
        """Logits and seconds of new tokens [new, WIDTH], the same ones for every sequence."""
        total = past + len(x)
        feeds = {
            "x": np.broadcast_to(x, (self.sequences, *x.shape)).copy() if self.own else x,
            "last": np.array([len(x) - 1]),
            "total": np.array(total, np.int32),
            "seqlens": np.full(self.sequences, total - 1, np.int32),
        }
        start = time.perf_counter()
        for name, value in feeds.items():
            self.binding.bind_cpu_input(name, value)
        self.session.run_with_iobinding(self.binding)
        logits = self.binding.get_outputs()[0].numpy().reshape(-1, VOCAB)
        return logits, time.perf_counter() - start


def measure(threads: int, context: int, prefill: int, spin_us: int, rounds: int) -> dict:
    """Seconds of each side, medians, and how far their logits are apart."""
    capacity = (context + prefill + 31) // 16 * 16
    sides = {own: Runner(own, threads, capacity, spin_us) for own in (True, False)}
    rng = np.random.default_rng(1)
    found: dict[str, object] = {"threads": threads, "variant": leangen_kernels.status()[0]}
    for name, new, past in (("prefill", prefill, 0), ("decode", 1, context)):
        x = rng.standard_normal((new, WIDTH)).astype(np.float32)
        times: dict[bool, list[float]] = {True: [], False: []}
        logits = {own: runner.run(x, past)[0] for own, runner in sides.items()}
        for _ in range(rounds if new == 1 else max(3, rounds // 20)):
            for own, runner in sides.items():
                times[own] += [runner.run(x, past)[1] for _ in range(5 if new == 1 else 1)]
        ours, stock = statistics.median(times[True]), statistics.median(times[False])
        apart = np.sqrt(((logits[True] - logits[False]) ** 2).mean() / logits[False].var())
        found[name] = {
            "leangen_s": ours, "stock_s": stock, "ratio": stock / ours,
            "leangen_tokens_per_s": new / ours, "stock_tokens_per_s": new / stock,
            "logits_relative_rms": float(apart),
        }  # fmt: skip
    found["sequences_s"] = {n: batch_s(n, threads, context, spin_us, rounds) for n in (1, 2, 4, 8)}
    return found


def batch_s(sequences: int, threads: int, context: int, spin_us: int, rounds: int) -> float:
    """Median seconds to decode one token of each of some sequences at once."""
    runner = Runner(True, threads, (context + 16) // 16 * 16, spin_us, sequences)
    x = np.random.default_rng(1).standard_normal((1, WIDTH)).astype(np.float32)
    runner.run(x, context)
    return statistics.median(runner.run(x, context)[1] for _ in range(3 * rounds))


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--prefill", type=int, default=256)
    parser.add_argument("--spin-us", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measure(
        options.threads, options.context, options.prefill, options.spin_us, options.rounds
    )
    if options.json:
        print(json.dumps(found))
        return
    print(f"{found['variant']}, {options.threads} threads, spin {options.spin_us} us")
    for name in ("prefill", "decode"):
        side = found[name]
        print(
            f"{name:8} leangen {side['leangen_tokens_per_s']:7.1f} tokens/s"
            f"  stock {side['stock_tokens_per_s']:7.1f}  ratio {side['ratio']:.2f}"
            f"  logits apart {side['logits_relative_rms']:.4f}"
        )
    alone = found["sequences_s"][1]
    for sequences, seconds in found["sequences_s"].items():
        print(
            f"decode of {sequences} at once {sequences / seconds:7.1f} tokens/s"
            f"  {seconds / alone:.2f} times one"
        )


if __name__ == "__main__":
    main()
