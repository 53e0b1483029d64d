"""What each precision of a language model loses and costs, on held-out text; one table.

    python bench/precision.py --model smiles-lm --tokens 16384 --rounds 5 --json smiles.json
    python bench/precision.py --model smollm2-135m --precisions int8 int4-g128 int4-g128-gptq
    python bench/precision.py --precisions a-folder-that-quantize-or-tune-made
    python bench/precision.py --precisions llama-Q4_K_M --llama-python PYTHON --gguf FILE

Perplexity, KL divergence from fp32 (± 2 standard errors, tokens taken as independent), top-1
agreement; bits a weight between embedding and head, where rows compare, and of all weights; with
`--rounds`, tokens a second and joules a token while decoding, all models in random order in each
round. `smiles-lm` calibrates on MOSES' training molecules and is judged on its test set, other
models calibrate on the first part of a text and are judged on what follows. Beside leangen's
precisions stand ONNX Runtime's `matmul_nbits_quantizer` on the same graph (`ort-METHOD-gN`, run by
ONNX Runtime alone; it leaves embedding and head in fp32 where ours take 8 bits) and llama.cpp's
own files and arithmetic (`llama-Q4_K_M`, `llama-F32`). Activations are rounded to int8, as they are
when a model runs; `--activations fp32` leaves the weights alone in question, and takes minutes a
row. SmolLM2's fp32 is its published Q4_1 file dequantized: figures against it are kind to all.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import random
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from precision_peers import ORT_METHODS, Llama, ort_bundle

import leangen as lg
from leangen import benchmark, calibration_data
from leangen.bundle import Bundle, open_bundle
from leangen.console import say, table, with_u
from leangen.errors import UnknownSchemeError
from leangen.families import language
from leangen.graph_edit import Graph, attributes
from leangen.precision import parse
from leangen.quality.language import kl_and_top1, log_softmax
from leangen.quantize import quantize
from leangen.session import Session
from leangen.sites import find_sites
from leangen.store import Store

PRECISIONS = (
    *("int8", "nf4", "int3-g32", "int3-g32-gptq"),
    *("int4-g32", "int4-g32-hqq", "int4-g32-awq", "int4-g32-gptq"),
    *("int4-g128", "int4-g128-hqq", "int4-g128-awq", "int4-g128-gptq"),
    *("int4-asym-g32", "int4-asym-g32-gptq", "int4-asym-g128", "int4-asym-g128-gptq"),
    *("ort-rtn-g32", "ort-kquant-g32", "ort-hqq-g32", "ort-gptq-g32"),
    *("ort-rtn-g128", "ort-hqq-g128", "ort-gptq-g128"),
)
WINDOW = 512
CALIBRATION_CHARACTERS = 60_000
NEW_TOKENS = 64
Array = np.ndarray[Any, Any]


def main() -> None:
    """Quantize, judge, time, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m", help="a name or a bundle")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--text", type=Path, help="default: the catalog's wiki-text")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS))
    parser.add_argument("--activations", choices=("int8", "fp32"), default="int8")
    parser.add_argument("--own-text", action="store_true", help="calibrate on the model's own text")
    parser.add_argument("--rounds", type=int, default=0, help="of decoding, for time and joules")
    parser.add_argument("--llama-python", help="an interpreter with llama-cpp-python")
    parser.add_argument("--gguf", type=Path, help="the model's floats, for llama.cpp")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for precision in args.precisions:
        if (wrong := _wrong(precision, args)) is not None:
            parser.error(f"{precision!r}: {wrong}")
    logging.disable(logging.INFO)  # ORT's quantizers tell of every node
    exact = Store().resolve(args.model, notify=say)
    calibration, judged = texts(args.model, args.text)
    windows = _windows(exact, judged, args.tokens)
    reference = _logits(Session(exact), windows)
    rows = [_row("fp32", (32.0, 32.0), reference, reference, windows)]
    bundles = {"fp32": exact}
    with tempfile.TemporaryDirectory(prefix="leangen-") as name:
        folder = Path(name)
        data = folder / "calibration.txt"
        data.write_text(calibration, encoding="utf-8")
        for precision in args.precisions:
            if precision.startswith("llama-"):
                llama, kind = Llama(args.llama_python, args.gguf, folder), _ftype(precision)
                logits = llama.logits(kind, windows)
                inner, whole, types = llama.bits(kind)
                say(f"{precision}: {types}")
                bits = inner, whole
            else:
                given = None if args.own_text else data
                low = bundles[precision] = _make(
                    exact, precision, folder / Path(precision).name, given
                )
                session = _session(low, precision, args.activations)
                logits, bits = _logits(session, windows), _bits(exact, low)
            rows.append(row := _row(precision, bits, reference, logits, windows))
            say(f"{precision}: KL {row['kl']:.5f} ± {row['kl_u']:.5f} at {bits[0]:.2f} bits")
        for precision, cost in _costs(bundles, args.rounds).items():
            next(row for row in rows if row["precision"] == precision).update(cost)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    table(
        ["precision", "bits", "all", "perplexity", "KL, nats", "top-1", "tokens/s", "J/token"],
        [_cells(row) for row in rows],
        title=f"{exact.name}, {rows[0]['tokens']} tokens, {args.activations} activations",
    )


def texts(model: str, path: Path | None) -> tuple[str, str]:
    """What data-driven methods see, and what is judged: disjoint."""
    if path is None and model == "smiles-lm":
        folder = Store().data("molecules", notify=say).parent
        parts = []
        for part in ("train", "test"):
            with gzip.open(folder / f"{part}.csv.gz", "rt", encoding="utf-8") as file:
                lines = file.read().splitlines()[1:]
            chosen = random.Random(0).sample(lines, 5000)
            parts.append("".join("<|end|>" + line.split(",")[0].strip() for line in chosen))
        return parts[0][:CALIBRATION_CHARACTERS], parts[1]
    path = path or Store().data("wiki-text", notify=say)
    text = re.sub("</?doc[^>]*>", "", path.read_text(encoding="utf-8"))
    return text[:CALIBRATION_CHARACTERS], text[CALIBRATION_CHARACTERS:]


def _windows(exact: Bundle, text: str, count: int) -> list[list[int]]:
    size = min(WINDOW, exact.config["context_length"])
    tokens = language.tokenizer(Session(exact)).encode(text[: 8 * count]).ids[:count]
    return [tokens[i : i + size] for i in range(0, len(tokens), size)]


def _logits(session: Session, windows: Sequence[Sequence[int]]) -> list[Array]:
    return [language.logits(session, window) for window in windows]


def _ftype(precision: str) -> str:
    kind = precision.removeprefix("llama-")
    return f"ALL_{kind}" if kind == "F32" else f"MOSTLY_{kind}"


def _wrong(precision: str, args: argparse.Namespace) -> str | None:
    """What stops a precision from being made, which is better said before the first than then."""
    if precision.startswith("llama-"):
        return None if args.llama_python and args.gguf else "give --llama-python and --gguf"
    if precision.startswith("ort-"):
        methods = "|".join(ORT_METHODS)
        known = re.fullmatch(rf"ort-({methods})-g\d+", precision)
        return None if known else f"expected ort-METHOD-gN, METHOD one of {methods}"
    if Path(precision).is_dir():
        return None
    try:
        parse(precision)
    except UnknownSchemeError as error:
        return str(error)
    return None


def _make(exact: Bundle, precision: str, folder: Path, data: Path | None) -> Bundle:
    if Path(precision).is_dir():
        return open_bundle(Path(precision))
    if precision.startswith("ort-"):
        feeds = calibration_data.feeds(exact, data)[0]["model"] if "gptq" in precision else []
        return ort_bundle(exact, precision, folder, feeds)
    needs = precision.endswith(("-gptq", "-awq", "-imatrix"))
    return quantize(exact, precision, folder, data=data if needs else None)


def _session(low: Bundle, precision: str, activations: Any) -> Session:
    kernels: Any = "ort" if precision.startswith("ort-") else "auto"
    return Session(low, activations=activations, kernels=kernels)


def _row(
    name: str,
    bits: tuple[float, float],
    reference: Sequence[Array],
    candidate: Sequence[Array],
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
        "bits": bits[0],
        "bits_of_all": bits[1],
        "perplexity": float(np.exp(np.concatenate(nll).mean())),
        "kl": float(divergence.mean()),
        "kl_u": float(2 * divergence.std() / np.sqrt(divergence.size)),
        "top1": float(np.concatenate(same).mean()),
        "tokens": int(divergence.size),
    }


def _bits(exact: Bundle, low: Bundle) -> tuple[float, float]:
    """Mean bits a weight of the products between embedding and head, and of all weights."""
    sites = {site.node.name: site for site in find_sites(Graph(exact.graph("model")))}
    inner = {n: s.weights for n, s in sites.items() if s.kind == "linear" and "head" not in n}
    whole = sum(Graph(exact.graph("model")).float_parameters().values())
    if low.quantization:
        nodes = low.quantization["nodes"]
        bits = sum(nodes[name]["bits"] * size for name, size in inner.items())
        return bits / sum(inner.values()), low.quantization["bits_per_weight"]
    graph, held = Graph(low.graph("model")), 0
    for node in graph.nodes:
        if node.op_type == "MatMulNBits" and attributes(node)["N"] and "head" not in node.name:
            held += sum(graph.array(name).nbytes * 8 for name in node.input[1:4] if name)
    stored = {name for node in graph.nodes for name in node.input if graph.has(name)}
    return held / sum(inner.values()), sum(graph.array(n).nbytes * 8 for n in stored) / whole


def _costs(bundles: dict[str, Bundle], rounds: int) -> dict[str, dict[str, Any]]:
    """Tokens a second and joules a token of decoding, by precision."""
    if not rounds:
        return {}
    engines = {
        name: lg.load(
            str(bundle.path),
            ledger=False,
            baseline_s=0,
            kernels="ort" if name.startswith("ort-") else "auto",
        )
        for name, bundle in bundles.items()
    }
    request = {
        "tokens": [0], "max_new_tokens": NEW_TOKENS, "temperature": 0.0, "ignore_eos": True,
    }  # fmt: skip
    receipts: dict[str, list[Any]] = {name: [] for name in engines}
    shuffled = random.Random(0)
    for turn in range(rounds + 1):
        for name in shuffled.sample(list(engines), len(engines)):
            receipt = engines[name].repeat(1, **request).receipt
            if turn:  # the first round warms up
                receipts[name].append(receipt)
    found = {}
    for name, group in receipts.items():
        one = benchmark.summarise(group)
        found[name] = {
            "tokens_per_s": one["units_per_s"],
            "j_per_token": one["j_per_unit"],
            "j_per_token_u": one["j_per_unit_u"],
            "energy_source": one["energy_source"],
        }
    return found


def _cells(row: dict[str, Any]) -> list[str]:
    speed = row.get("tokens_per_s")
    return [
        row["precision"],
        f"{row['bits']:.2f}",
        f"{row['bits_of_all']:.2f}",
        f"{row['perplexity']:.3f}",
        f"{row['kl']:.5f} ± {row['kl_u']:.5f}",
        f"{row['top1']:.1%}",
        "" if speed is None else f"{speed['median']:.0f} ({speed['p5']:.0f}-{speed['p95']:.0f})",
        ""
        if row.get("j_per_token") is None
        else f"{with_u(row['j_per_token'], row['j_per_token_u'], 'J')} {row['energy_source']}",
    ]


if __name__ == "__main__":
    main()
