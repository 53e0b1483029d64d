"""The other sides of `precision.py`: ONNX Runtime's quantizers and llama.cpp, same weights.

    python bench/precision_peers.py task.json

is what precision.py runs with llama.cpp's interpreter: the file names a GGUF, windows of tokens and
where their logits go.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:  # llama.cpp's interpreter has no leangen
    from leangen.bundle import Bundle

Array = np.ndarray[Any, Any]
ORT_METHODS = ("rtn", "hqq", "kquant", "gptq")


def ort_bundle(
    exact: Bundle, name: str, folder: Path, feeds: Sequence[Mapping[str, Array]]
) -> Bundle:
    """The model as `ort-METHOD-gN` of ONNX Runtime's `matmul_nbits_quantizer` makes it."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader
    from onnxruntime.quantization import matmul_nbits_quantizer as ort_quantizer

    from leangen import probe
    from leangen.bundle import create, open_bundle

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = iter(feeds)

        def get_next(self) -> Mapping[str, Array] | None:
            return next(self._left, None)

    _, method, group = name.split("-")
    block = int(group[1:])
    config = {
        "rtn": lambda: ort_quantizer.DefaultWeightOnlyQuantConfig(
            block_size=block, is_symmetric=True, accuracy_level=4
        ),
        "hqq": lambda: ort_quantizer.HQQWeightOnlyQuantConfig(block_size=block),
        "kquant": lambda: ort_quantizer.KQuantWeightOnlyQuantConfig(),
        "gptq": lambda: ort_quantizer.GPTQWeightOnlyQuantConfig(Reader(), block_size=block),
    }[method]()
    quantizer = ort_quantizer.MatMulNBitsQuantizer(
        onnx.load(exact.graph("model")), block_size=block, accuracy_level=4, algo_config=config
    )
    quantizer.process()
    with create(folder, replace=True) as draft:
        quantizer.model.save_model_to_file(str(draft.folder / "model.onnx"), True)
        for asset in exact.files:
            if not asset.startswith("model.onnx") and asset != probe.FILE:
                shutil.copyfile(exact.path / asset, draft.folder / asset)
        draft.name, draft.family, draft.scheme = exact.name, exact.family, name
        draft.graphs, draft.config = {"model": "model.onnx"}, dict(exact.config)
    return open_bundle(folder)


class Llama:
    """llama.cpp in a Python that has llama-cpp-python: quantizes a GGUF and scores tokens."""

    def __init__(self, python: str, gguf: Path, folder: Path) -> None:
        self._python, self._gguf, self._folder = python, gguf, folder

    def logits(self, kind: str, windows: Sequence[Sequence[int]]) -> list[Array]:
        """Logits [n, vocab] of each window as llama.cpp computes them with weights of `kind`."""
        task = {
            "source": str(self._gguf),
            "file": str(self.file(kind)),
            "kind": kind,
            "windows": [list(map(int, window)) for window in windows],
            "out": str(self._folder / "llama"),
        }
        path = self._folder / "llama.json"
        path.write_text(json.dumps(task))
        done = subprocess.run(
            [self._python, __file__, str(path)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(done.stderr[-2000:])
        return [np.load(f"{task['out']}-{place}.npy") for place in range(len(windows))]

    def file(self, kind: str) -> Path:
        """The GGUF with weights of `kind`, once `logits` was asked of it."""
        return self._folder / f"{kind}.gguf"

    def bits(self, kind: str) -> tuple[float, float, dict[str, int]]:
        """Bits a weight between embedding and head, over all, and how many matrices have what."""
        from gguf import GGUFReader

        inner = whole = inner_weights = weights = 0
        types: dict[str, int] = {}
        for tensor in GGUFReader(self.file(kind)).tensors:
            size, bits = int(tensor.n_elements), int(tensor.n_bytes) * 8
            whole, weights = whole + bits, weights + size
            if tensor.name.startswith("blk.") and "norm" not in tensor.name:
                inner, inner_weights = inner + bits, inner_weights + size
                types[tensor.tensor_type.name] = types.get(tensor.tensor_type.name, 0) + 1
        return inner / inner_weights, whole / weights, types


def _serve(path: Path) -> None:
    """In the other interpreter: make the file where it is missing, score the windows."""
    import llama_cpp

    task = json.loads(path.read_text())
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{task['kind']}")
    options.allow_requantize = True  # SmolLM2's floats are a dequantized file for us, too
    if llama_cpp.llama_model_quantize(task["source"].encode(), task["file"].encode(), options):
        sys.exit(f"llama.cpp could not quantize {task['source']} to {task['kind']}")
    longest = max(map(len, task["windows"]))
    llama = llama_cpp.Llama(
        task["file"], n_ctx=longest, n_batch=longest, n_threads=2, logits_all=True, verbose=False
    )
    for place, window in enumerate(task["windows"]):
        llama.reset()
        llama.eval(window)
        np.save(f"{task['out']}-{place}.npy", llama.scores[: len(window)])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", type=Path)
    _serve(parser.parse_args().task)
