"""What each precision of a language model loses: perplexity and KL against fp32 on held-out text.

    python bench/precision.py --model smollm2-135m --tokens 2048 --json precision.json

Data-driven methods calibrate on the first part of the text, figures are taken on the last. Beside
leangen's own precisions stand those of ONNX Runtime's `matmul_nbits_quantizer` (round to nearest,
HQQ, k-quant) on the same graph, which leave embedding and output head in fp32 where ours take 8
bits. `bits` counts the layers between those two alone, so that rows compare. Activations are
rounded to int8, as they are when the model runs; `--activations fp32` leaves the weights alone in
question, and takes minutes a row: ORT has no fast product of the 8-bit head with fp32.
SmolLM2's fp32 is its published Q4_1 file dequantized: figures against it are kind to all.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from leangen.bundle import Bundle, create, open_bundle
from leangen.console import say, table
from leangen.families import language
from leangen.graph_edit import Graph, attributes
from leangen.quality import kl_and_top1, log_softmax
from leangen.quantize import quantize
from leangen.session import Session
from leangen.store import Store

PRECISIONS = (
    *("int8", "nf4", "int3-g32", "int3-asym-g32-gptq"),
    *("int4-g32", "int4-g32-gptq", "int4-g32-awq"),
    *("int4-g128", "int4-g128-imatrix", "int4-g128-gptq", "int4-g128-awq", "int4-g128-hqq"),
    *("int4-asym-g32", "int4-asym-g32-gptq", "int4-asym-g32-awq", "int4-g32-hqq"),
    *("int4-asym-g128", "int4-asym-g128-gptq", "int4-asym-g128-awq"),
    *("ort-rtn-g32", "ort-kquant-g32", "ort-hqq-g32"),
    *("ort-rtn-g128", "ort-kquant-g128", "ort-hqq-g128"),
)
WINDOW = 512
CALIBRATION_CHARACTERS = 60_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="a name or a bundle")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--text", type=Path, help="default: the catalog's wiki-text")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS))
    parser.add_argument("--activations", choices=("int8", "fp32"), default="int8")
    parser.add_argument("--own-text", action="store_true", help="calibrate on the model's own text")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.disable(logging.INFO)  # ORT's quantizers tell of every node
    exact = Store().resolve(args.model, notify=say)
    path = args.text or Store().data("wiki-text", notify=say)
    text = re.sub("</?doc[^>]*>", "", path.read_text(encoding="utf-8"))
    windows = _windows(exact, text[CALIBRATION_CHARACTERS:], args.tokens)
    reference = _logits(Session(exact), windows)
    rows = [_row("fp32", 32.0, reference, reference, windows)]
    with tempfile.TemporaryDirectory(prefix="leangen-") as folder:
        data = Path(folder) / "calibration.txt"
        data.write_text(text[:CALIBRATION_CHARACTERS], encoding="utf-8")
        for name in args.precisions:
            with _bundle(exact, name, Path(folder), None if args.own_text else data) as low:
                logits = _logits(Session(low, activations=args.activations), windows)
                rows.append(_row(name, _bits(low), reference, logits, windows))
                row = rows[-1]
                say(f"{name}: KL {row['kl']:.4f} ± {row['kl_u']:.4f} at {row['bits']:.2f} bits")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    table(
        ["precision", "bits", "perplexity", "KL, nats", "top-1"],
        [
            [
                row["precision"],
                f"{row['bits']:.2f}",
                f"{row['perplexity']:.3f}",
                f"{row['kl']:.4f} ± {row['kl_u']:.4f}",
                f"{row['top1']:.1%}",
            ]
            for row in rows
        ],
        title=f"{exact.name}, {sum(map(len, windows))} tokens, {args.activations} activations",
    )


def _windows(exact: Bundle, text: str, count: int) -> list[list[int]]:
    tokens = language.tokenizer(Session(exact)).encode(text[: 8 * count]).ids[:count]
    return [tokens[i : i + WINDOW] for i in range(0, len(tokens), WINDOW)]


def _logits(session: Session, windows: Sequence[Sequence[int]]) -> list[np.ndarray[Any, Any]]:
    return [language.logits(session, window) for window in windows]


def _row(
    name: str,
    bits: float,
    reference: Sequence[np.ndarray[Any, Any]],
    candidate: Sequence[np.ndarray[Any, Any]],
    windows: Sequence[Sequence[int]],
) -> dict[str, Any]:
    kl, same, nll = [], [], []
    for exact, ours, window in zip(reference, candidate, windows, strict=True):
        part = kl_and_top1(exact, ours)
        kl.append(part[0])
        same.append(part[1])
        places = np.arange(len(window) - 1)
        nll.append(-log_softmax(ours[:-1])[places, window[1:]])
    divergence = np.concatenate(kl)
    return {
        "precision": name,
        "bits": bits,
        "perplexity": float(np.exp(np.concatenate(nll).mean())),
        "kl": float(divergence.mean()),
        "kl_u": float(2 * divergence.std() / np.sqrt(divergence.size)),
        "top1": float(np.concatenate(same).mean()),
        "tokens": int(divergence.size),
    }


@contextmanager
def _bundle(exact: Bundle, name: str, folder: Path, data: Path) -> Iterator[Bundle]:
    """The model in a precision of ours, or `ort-METHOD-gN`; removed afterwards."""
    if not name.startswith("ort-"):
        needs = name.endswith(("-gptq", "-awq", "-imatrix"))
        yield quantize(exact, name, folder / "low", data=data if needs else None, replace=True)
        return
    from onnxruntime.quantization import matmul_nbits_quantizer as ort_quantizer

    _, method, group = name.split("-")
    block = int(group[1:])
    config = {
        "rtn": lambda: ort_quantizer.DefaultWeightOnlyQuantConfig(
            block_size=block, is_symmetric=True, accuracy_level=4
        ),
        "hqq": lambda: ort_quantizer.HQQWeightOnlyQuantConfig(block_size=block),
        "kquant": lambda: ort_quantizer.KQuantWeightOnlyQuantConfig(),
    }[method]()
    path = exact.graph("model")
    quantizer = ort_quantizer.MatMulNBitsQuantizer(
        onnx.load(path), block_size=block, accuracy_level=4, algo_config=config
    )
    quantizer.process()
    with create(folder / "ort", replace=True) as draft:
        quantizer.model.save_model_to_file(str(draft.folder / "model.onnx"), True)
        for asset in exact.files:
            if not asset.startswith("model.onnx"):
                (draft.folder / asset).write_bytes((exact.path / asset).read_bytes())
        draft.name, draft.family, draft.scheme = exact.name, exact.family, name
        draft.graphs, draft.config = {"model": "model.onnx"}, dict(exact.config)
    yield open_bundle(folder / "ort")


def _bits(low: Bundle) -> float:
    """Mean bits a weight of the products between embedding and head."""
    graph = Graph(low.graph("model"))
    bits = weights = 0
    for node in graph.nodes:
        options = attributes(node)
        if node.op_type not in ("MatMulNBits", "MatMulBnb4") or "head" in node.name:
            continue
        weights += options["N"] * options["K"]
        for name in node.input[1:4]:
            if graph.has(name):
                array = graph.array(name)
                bits += array.nbytes * 8
    if not weights:
        return low.quantization["bits_per_weight"]
    if not low.quantization:
        return bits / weights
    nodes = low.quantization["nodes"]  # codes that are unpacked while loading are no inputs
    held = [
        entry["bits"] for name, entry in nodes.items() if "head" not in name and "embed" not in name
    ]
    return float(np.mean(held))


if __name__ == "__main__":
    main()
