"""Decoding with a model far larger than the caches, against streaming the same bytes.

    python bench/large.py [--form q4] [--threads 2] [--context 256] [--rounds 12] [--json]

The shape is Llama-3.2-1B's with random weights, by default of 4 bits in groups of 32 (4.5 bits a
weight; `--form q4_min_split` is Q4_K's), head included, embedding left out. Streaming is reading an
array of the same size, a part for each thread. Both take turns in one process.
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
import onnx
import onnxruntime as ort
from leangen_kernels import layout
from memory_stream import Stream
from onnx import TensorProto, helper, numpy_helper

from leangen.lowering import chain

LAYERS, WIDTH, MLP, HEADS, KV_HEADS, HEAD, VOCAB = 16, 2048, 8192, 32, 8, 64, 128256
QKV = (HEADS + 2 * KV_HEADS) * HEAD
FORMS = {name: form for name, form in layout.FORMS.items() if not form.table}


def weights(form: layout.Form, n: int, k: int) -> np.ndarray:
    """A packed matrix: the same 16 random rows again and again."""
    rng = np.random.default_rng(k)
    codes = rng.integers(0, 1 << form.bits, (layout.ROWS, k), dtype=np.uint8)
    scales = rng.integers(1, 64, (layout.ROWS, k // form.block)).astype(np.float32)
    scales /= 512 << form.bits  # whole numbers of a power of two, which any form holds
    minima = -scales * 2 ** (form.bits - 1) if form.minimum else None
    return np.tile(layout.pack(form, codes, scales, minima), n // layout.ROWS)


def write(path: Path, form: layout.Form, capacity: int) -> int:
    """Write the decoder of one token; how many bytes its matrices have."""
    nodes, sizes = [], []
    gain = numpy_helper.from_array(np.ones(WIDTH, np.float32), "gain")
    angles = np.outer(np.arange(capacity), 1e4 ** (-np.arange(HEAD // 2) / (HEAD // 2)))
    turns = [(f(angles).astype(np.float32), name) for f, name in ((np.cos, "cos"), (np.sin, "sin"))]
    constants = [gain, *(numpy_helper.from_array(*turn) for turn in turns)]

    def linear(
        x: str, n: int, k: int, name: str, gain: str = "", residual: str = "", **more: int
    ) -> str:
        packed = weights(form, n, k)
        sizes.append(packed.nbytes)
        constants.append(numpy_helper.from_array(packed, f"{name}.w"))
        inputs = [x, f"{name}.w", gain, "", residual]
        options = {"form": form.name, "n": n, "k": k, **more}
        nodes.append(helper.make_node("Linear", inputs, [name], domain="leangen", **options))
        return name

    info, h = helper.make_tensor_value_info, "x"
    cache = [1, KV_HEADS, capacity, HEAD]
    inputs = [
        info("x", TensorProto.FLOAT, [1, 1, WIDTH]), info("last", TensorProto.INT32, [1]),
    ]  # fmt: skip
    outputs = [info("logits", TensorProto.FLOAT, [1, 1, VOCAB])]
    for i in range(LAYERS):
        past, present = ([f"{when}{kind}{i}" for kind in "kv"] for when in ("past", "present"))
        inputs += [info(name, TensorProto.FLOAT16, cache) for name in past]
        outputs += [info(name, TensorProto.FLOAT16, cache) for name in present]
        qkv = linear(h, QKV, WIDTH, f"qkv{i}", "gain")
        node = helper.make_node(
            "Attention", [qkv, *past, "last", "cos", "sin"], [f"y{i}", *present],
            domain="leangen", heads=HEADS, kv_heads=KV_HEADS, cache="fp16",
        )  # fmt: skip
        nodes.append(node)
        h = linear(f"y{i}", WIDTH, WIDTH, f"o{i}", residual=h)
        y = linear(h, 2 * MLP, WIDTH, f"gate_up{i}", "gain", gated=1)
        h = linear(y, WIDTH, MLP, f"down{i}", residual=h)
    linear(h, VOCAB, WIDTH, "logits", "gain")
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, constants)
    opsets = [helper.make_opsetid(*domain) for domain in (("", 21), ("leangen", 1))]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    chain.fuse(model)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")
    return sum(sizes)


class Decoder:
    """A session whose caches are bound so that they are updated in place."""

    def __init__(self, path: Path, threads: int, capacity: int, context: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.spin_duration_us", "200")
        options.register_custom_ops_library(str(leangen_kernels.library()))
        self.session = ort.InferenceSession(str(path), options)
        self.binding = self.session.io_binding()
        shape = (1, KV_HEADS, capacity, HEAD)
        for name in (f"{kind}{i}" for i in range(LAYERS) for kind in "kv"):
            value = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float16))
            self.binding.bind_ortvalue_input(f"past{name}", value)
            self.binding.bind_ortvalue_output(f"present{name}", value)
        x = np.random.default_rng(1).standard_normal((1, 1, WIDTH)).astype(np.float32)
        self.binding.bind_cpu_input("x", x)
        self.binding.bind_cpu_input("last", np.array([context - 1], np.int32))
        self.binding.bind_output("logits")

    def token_s(self) -> float:
        """Seconds of one token."""
        start = time.perf_counter()
        self.session.run_with_iobinding(self.binding)
        return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--form", choices=FORMS, default="q4", metavar="FORM", help=", ".join(FORMS)
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if leangen_kernels.library() is None:
        parser.error(leangen_kernels.status()[1])
    capacity = -(-args.context // 16) * 16
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.onnx"
        size = write(path, layout.FORMS[args.form], capacity)
        decoder = Decoder(path, args.threads, capacity, args.context)
        decoder.token_s()  # brings the weights in
        tokens, streams = [], []
        with Stream(size, args.threads) as stream:
            for _ in range(args.rounds):
                tokens += [decoder.token_s() for _ in range(3)]
                streams += [stream.seconds() for _ in range(3)]
    token, read = statistics.median(tokens), statistics.median(streams)
    found = {
        "weight_bytes": size, "threads": args.threads, "context": args.context,
        "token_s": token, "stream_s": read, "share_of_stream": read / token,
    }  # fmt: skip
    if args.json:
        print(json.dumps(found))
        return
    print(
        f"{size / 1e6:.0f} MB: {1 / token:.1f} tokens/s ({size / token / 1e9:.1f} GB/s), streamed "
        f"at {size / read / 1e9:.1f} GB/s: {read / token:.0%}"
    )


if __name__ == "__main__":
    main()
