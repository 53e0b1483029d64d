"""What `lint --fix` gains on whole files that other quantizers made, and how far it moves them.

    python bench/lint.py                      all of them
    python bench/lint.py genai-int4 ort-qdq    one, or several

Files are made by onnxruntime's quantizers and onnxruntime-genai's builder from published weights,
linted, mended, and run before and after in alternating rounds: medians with the least and the most,
the time that opening takes, how far the outputs moved, and how far they are from those of the
floating-point original (relative RMS).
Needs `pip install onnxruntime-genai transformers accelerate torch` for genai's, torch for HQQ.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    matmul_nbits_quantizer,
    quantize_dynamic,
    quantize_static,
)

from leangen import calibrate, clock, lint, probe, threads
from leangen.bundle import Bundle
from leangen.console import progress_bar, say, table
from leangen.store import Store

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]
ROWS, TOKENS = 1, 16
"""Pictures or sentences of a run; what a language model reads at once."""
FLOAT = "float"
"""Where the floating-point original lies, beside what was made of it."""
HEAD = 64
"""The width of a head of SmolLM2."""
LANGUAGE, CONVOLUTION, SPEECH, GGUF = "minilm-l6", "terrain", "piper-joe", "smollm2-135m"


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Calibration data that is there already."""

    def __init__(self, feeds: Sequence[Feeds]) -> None:
        self._left = iter(feeds)

    def get_next(self) -> Feeds | None:
        """The next inputs."""
        return next(self._left, None)


def source(name: str, folder: Path) -> tuple[Path, Feeds]:
    """A copy of a model's last graph in full precision, and inputs of it."""
    bundle: Bundle = Store().resolve(f"{name}:fp32", notify=say)
    role = list(bundle.graphs)[-1]
    graph, copy = bundle.graph(role), folder / FLOAT
    copy.mkdir()
    for path in graph.parent.glob("*.data"):  # onnx reads no weights that are hard links
        shutil.copyfile(path, copy / path.name)
    shutil.copyfile(graph, copy / "model.onnx")
    return copy / "model.onnx", probe.inputs(bundle, ROWS)[role]


def nbits(config: Any, **options: Any) -> Callable[[Path], Feeds]:
    """A file of `MatMulNBitsQuantizer`."""

    def make(path: Path) -> Feeds:
        import onnx

        graph, feeds = source(LANGUAGE, path.parent)
        quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(
            onnx.load(graph), algo_config=config() if config else None, **options
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(path), True)
        return feeds

    return make


def static(name: str, kind: QuantType, *ops: str) -> Callable[[Path], Feeds]:
    """A file of `quantize_static` with a scale a channel, of QuantizeLinear pairs."""

    def make(path: Path) -> Feeds:
        graph, feeds = source(name, path.parent)
        quantize_static(
            graph, path, Reader([feeds]), quant_format=QuantFormat.QDQ, activation_type=kind,
            weight_type=QuantType.QInt8, per_channel=True, op_types_to_quantize=list(ops),
        )  # fmt: skip
        return feeds

    return make


def dynamic(path: Path) -> Feeds:
    """A file of `quantize_dynamic`."""
    graph, feeds = source(CONVOLUTION, path.parent)
    quantize_dynamic(graph, path, op_types_to_quantize=["Conv"], weight_type=QuantType.QUInt8)
    return feeds


def genai(precision: str, *extra: str) -> Callable[[Path], Feeds]:
    """A file of onnxruntime-genai's builder for the CPU."""

    def make(path: Path) -> Feeds:
        checkpoint = path.parent.parent / "checkpoint"
        if not checkpoint.exists():
            _checkpoint(checkpoint)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-e", "cpu"]
        command += ["-i", str(checkpoint), "-o", str(path.parent), "-p", precision]
        command += ["-c", str(path.parent / "cache")]
        if extra:
            command += ["--extra_options", *extra]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        return dict(_language_feeds(path))

    return make


def _checkpoint(folder: Path) -> None:
    """SmolLM2 as transformers stores it, from the published GGUF."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = Store().data(GGUF)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.hf_quantizer = None  # it holds floats by now, and must not be stored as a GGUF's codes
    del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _language_feeds(path: Path) -> Iterator[tuple[str, Array]]:
    """Tokens with nothing before them."""
    for entry in _open(path)[0].get_inputs():
        if entry.name == "input_ids":
            yield entry.name, np.random.default_rng(0).integers(0, 40_000, (1, TOKENS))
        elif entry.name == "attention_mask":
            yield entry.name, np.ones((1, TOKENS), np.int64)
        elif entry.name == "position_ids":
            yield entry.name, np.arange(TOKENS, dtype=np.int64)[None]
        else:
            dtype = np.float16 if "float16" in entry.type else np.float32
            yield entry.name, np.zeros((1, entry.shape[1], 0, HEAD), dtype)


FILES: dict[str, Callable[[Path], Feeds]] = {
    "ort-rtn": nbits(matmul_nbits_quantizer.RTNWeightOnlyQuantConfig, block_size=32),
    "ort-default": nbits(None, block_size=32, is_symmetric=True),
    "ort-int8": nbits(None, block_size=32, bits=8),
    "ort-hqq": nbits(lambda: matmul_nbits_quantizer.HQQWeightOnlyQuantConfig(block_size=64)),
    "ort-qdq": nbits(None, block_size=32, quant_format=QuantFormat.QDQ),
    "ort-static-s8": static(CONVOLUTION, QuantType.QInt8, "Conv"),
    "ort-static-transposed": static(SPEECH, QuantType.QUInt8, "ConvTranspose"),
    "ort-dynamic": dynamic,
    "genai-int4": genai("int4"),
    "genai-int4-fp32": genai("int4", "accuracy_level=1"),
    "genai-fp16": genai("fp16"),
}
"""Each writes the file that it is given and returns inputs of it."""


def _open(path: Path) -> tuple[ort.InferenceSession, float]:
    options = ort.SessionOptions()
    options.intra_op_num_threads, _ = threads.choose(None)
    options.log_severity_level = 4
    begin_ns = clock.monotonic_ns()
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session, (clock.monotonic_ns() - begin_ns) / 1e9


def compare(before: Path, after: Path, feeds: Feeds, rounds: int) -> dict[str, Any]:
    """Seconds of a run and of opening, of both; how far the outputs are apart, and from floats'."""
    opened: tuple[list[float], list[float]] = ([], [])
    for _ in range(3):
        for path, seconds in zip((before, after), opened, strict=True):
            seconds.append(_open(path)[1])
    sessions = [_open(path)[0] for path in (before, after)]
    outputs = [session.run(None, feeds) for session in sessions]
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for session, seconds in zip(sessions, spent, strict=True):
            begin_ns = clock.monotonic_ns()
            session.run(None, feeds)
            seconds.append((clock.monotonic_ns() - begin_ns) / 1e9)
    result = {
        "open_s": opened,
        "run_s": spent,
        "moved": math.sqrt(calibrate.relative_error(outputs[1], outputs[0])),
    }
    original = before.parent / FLOAT / "model.onnx"
    if original.exists():
        exact = _open(original)[0].run(None, feeds)
        result["errors"] = [
            math.sqrt(calibrate.relative_error(output, exact)) for output in outputs
        ]
    return result


def row(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Make, lint, mend, compare."""
    (folder / name).mkdir()
    before, after = folder / name / "model.onnx", folder / name / "mended.onnx"
    feeds = FILES[name](before)
    with progress_bar() as progress:
        found = lint.lint(before, name, timed=False, progress=progress)
    result: dict[str, Any] = {
        "file": name,
        "found": dict(Counter(finding.rule.name for finding in found)),
    }
    if any(finding.fixable for finding in found):
        result["fixed"] = dict(lint.fix_file(before, after))
        result |= compare(before, after, feeds, rounds)
    return result


def _milliseconds(seconds: Sequence[float]) -> str:
    low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
    return f"{middle * 1e3:.1f} ({low * 1e3:.1f}-{high * 1e3:.1f})"


def main() -> None:
    """Print a line for each file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help=", ".join(FILES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.files) - set(FILES):
        parser.error(f"{', '.join(unknown)}: there are {', '.join(FILES)}")
    rows = []
    logging.disable(logging.WARNING)  # the quantizers tell of every node
    with tempfile.TemporaryDirectory(prefix="leangen-") as folder:
        for name in args.files or FILES:
            rows.append(row(name, Path(folder), args.rounds))
            say(json.dumps(rows[-1]))
    if args.json:
        print(json.dumps(rows))
        return
    lines = []
    for each in rows:
        found = ", ".join(f"{count} {rule}" for rule, count in each["found"].items()) or "nothing"
        line = [each["file"], found]
        if "run_s" in each:
            runs, opens = each["run_s"], each["open_s"]
            ratio = statistics.median(runs[0]) / statistics.median(runs[1])
            line += [*map(_milliseconds, (*runs, *opens)), f"{ratio:.2f}x"]
            errors = " to ".join(f"{error:.3f}" for error in each.get("errors", ()))
            line += [f"{each['moved']:.1e}", errors]
        lines.append([*line, *[""] * (9 - len(line))])
    columns = ["file", "found", "run, ms", "mended", "opening, ms", "mended", "faster", "moved"]
    columns.append("error to floats")
    table(columns, lines)


if __name__ == "__main__":
    main()
