"""leangen, with and without its kernels, against llama.cpp (llama-cpp-python) on one GGUF file.

All engines get the same file, threads and prompt tokens, each in a process of its own, and take
turns, so that a busy minute hits all. A round is a prefill of the whole prompt and then greedy
decoding; the first round warms up and is dropped. Medians over the rounds are compared.

    python bench/peers.py model.gguf --threads 2 --json
    python bench/peers.py model.gguf --llama-python ~/llama/bin/python
    python bench/peers.py model.gguf --form Q4_K_M       (the file requantized by llama.cpp first)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ENGINES = ("leangen", "leangen on ORT", "llama.cpp", "llama.cpp flash")
FORMS = ("Q4_0", "Q4_1", "Q4_K_M", "Q8_0")
SEED = 0

Round = Callable[[list[int], int], tuple[float, float]]
"""(prompt, new tokens) -> seconds of the prefill with the first token, seconds of the rest."""


def leangen_engine(
    model: str, threads: int, context: int, kernels: str = "auto"
) -> tuple[Round, str]:
    """A round in leangen; `model` is a bundle's folder."""
    import onnxruntime

    from leangen.bundle import open_bundle
    from leangen.families.decoder import Decoder
    from leangen.session import Session

    session = Session(open_bundle(Path(model)), threads=threads, kernels=kernels)
    session.graph("model")

    def run(prompt: list[int], new_tokens: int) -> tuple[float, float]:
        with Decoder(session, context) as decoder:
            start = time.perf_counter()
            token = int(decoder.feed(prompt).argmax())
            first = time.perf_counter()
            for _ in range(new_tokens - 1):
                token = int(decoder.feed([token]).argmax())
            return first - start, time.perf_counter() - first

    return run, f"onnxruntime {onnxruntime.__version__}, kernels {session.kernels}"


def import_llama() -> Any:
    """The module llama_cpp; says what to do where there is none."""
    try:
        import llama_cpp
    except ModuleNotFoundError as error:
        if error.name != "llama_cpp":
            raise
        sys.exit(
            f"{sys.executable} has no llama-cpp-python: `pip install llama-cpp-python` into it, "
            "or name an interpreter that has it with --llama-python"
        )
    return llama_cpp


def llama_engine(
    model: str, threads: int, context: int, *, flash: bool = False
) -> tuple[Round, str]:
    """A round in llama.cpp, by its C interface: no Python between its tokens but the argmax."""
    import numpy as np

    llama_cpp = import_llama()
    llama = llama_cpp.Llama(
        model,
        n_ctx=context,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=threads,
        flash_attn=flash,
        verbose=False,
    )
    vocab = llama.n_vocab()

    def feed(tokens: list[int]) -> int:
        array = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(llama.ctx, llama_cpp.llama_batch_get_one(array, len(tokens))):
            sys.exit("llama_decode failed")
        logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, (vocab,)).argmax())

    def run(prompt: list[int], new_tokens: int) -> tuple[float, float]:
        llama._ctx.kv_cache_clear()
        start = time.perf_counter()
        token = feed(prompt)
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            token = feed([token])
        return first - start, time.perf_counter() - first

    return run, f"llama-cpp-python {llama_cpp.__version__}"


def serve(engine: str, model: str, threads: int, context: int) -> None:
    """The child process: one JSON line in (prompt, new tokens), one out (seconds, memory)."""
    make = {
        "leangen": leangen_engine,
        "leangen on ORT": partial(leangen_engine, kernels="ort"),
        "llama.cpp": llama_engine,
        "llama.cpp flash": partial(llama_engine, flash=True),
    }[engine]
    run, version = make(model, threads, context)
    print(json.dumps({"version": version}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        prefill_s, decode_s = run(task["prompt"], task["new_tokens"])
        answer = {
            "prefill_s": prefill_s,
            "decode_s": decode_s,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        print(json.dumps(answer), flush=True)


def requantize(model: str, form: str, out: str) -> None:
    """The child process that writes a GGUF file with other blocks, of the weights in `model`."""
    llama_cpp = import_llama()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{form}")
    options.allow_requantize = True
    if llama_cpp.llama_model_quantize(model.encode(), out.encode(), options):
        sys.exit(f"llama.cpp does not requantize {model} to {form}")


def peak_rss_bytes() -> int | None:
    """This process's own peak; getrusage's survives exec and would show the parent's."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


class Engine:
    """A child process that runs rounds when told."""

    def __init__(self, name: str, python: str, model: str, threads: int, context: int) -> None:
        root = Path(__file__).resolve().parent.parent
        path = os.pathsep.join([str(root), str(root / "kernels"), os.environ.get("PYTHONPATH", "")])
        command = [python, __file__, "--serve", name, "--threads", str(threads)]
        self.name = name
        self.process = subprocess.Popen(
            [*command, "--context", str(context), model],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=None if name.startswith("llama.cpp") else {**os.environ, "PYTHONPATH": path},
        )
        self.version = self._answer()["version"]

    def round(self, prompt: list[int], new_tokens: int) -> dict[str, Any]:
        """Run one round; its seconds and the process's peak memory so far."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"prompt": prompt, "new_tokens": new_tokens}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:  # the child has said why on stderr
            sys.exit(f"the {self.name} process ended with code {self.process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Run the rounds; medians, ranges and memory for each engine."""
    from leangen.exporters import gguf
    from leangen.session import Session

    with tempfile.TemporaryDirectory() as folder:
        model = args.model
        if args.form:
            model = Path(folder) / f"{args.form}.gguf"
            command = [args.llama_python, __file__, "--requantize", args.form]
            subprocess.run([*command, str(args.model), "--out", str(model)], check=True)
        bundle = gguf.export(model, Path(folder) / "bundle", form="gguf")
        Session(bundle).graph("model")  # lowered here, so that its memory is not the engine's
        # Which tokens does not matter for speed; all of them are ordinary text tokens.
        vocab = bundle.config["vocab_size"]
        prompt = random.Random(SEED).choices(range(vocab // 2), k=args.prompt_tokens)
        context = args.prompt_tokens + args.new_tokens
        engines = [
            Engine(name, args.llama_python, str(model), args.threads, context)
            if name.startswith("llama.cpp")
            else Engine(name, sys.executable, str(bundle.path), args.threads, context)
            for name in ENGINES
        ]
        load_before = os.getloadavg()[0]
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in ENGINES}
        for number in range(args.rounds + 1):
            for engine in engines if number % 2 else engines[::-1]:
                rounds[engine.name].append(engine.round(prompt, args.new_tokens))
        for engine in engines:
            engine.close()
    results = {
        engine.name: {"version": engine.version, **summary(rounds[engine.name][1:], args)}
        for engine in engines
    }
    ratios = {
        name: {
            key: results["leangen"][key]["median"] / results[name][key]["median"]
            for key in ("decode_tokens_per_s", "prefill_tokens_per_s")
        }
        for name in ENGINES[1:]
    }
    return {
        "model": args.model.name,
        "form": args.form,
        "threads": args.threads,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
        "load_average_before": load_before,
        "engines": results,
        "leangen_over": ratios,
    }


def summary(rounds: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Median and range of the speeds; the peak memory of the process."""
    speeds = {
        "decode_tokens_per_s": [(args.new_tokens - 1) / r["decode_s"] for r in rounds],
        "prefill_tokens_per_s": [args.prompt_tokens / r["prefill_s"] for r in rounds],
    }
    return {
        **{
            key: {"median": statistics.median(each), "min": min(each), "max": max(each)}
            for key, each in speeds.items()
        },
        "peak_rss_bytes": rounds[-1]["peak_rss_bytes"],  # a high-water mark: the last is highest
    }


def table(result: dict[str, Any]) -> str:
    """The comparison for a reader."""
    lines = [f"{'':15} {'decode tok/s':>24} {'prefill tok/s':>24} {'peak RSS MB':>12}"]
    for name, engine in result["engines"].items():
        cells = [
            "{median:.1f} ({min:.1f}-{max:.1f})".format(**engine[key])
            for key in ("decode_tokens_per_s", "prefill_tokens_per_s")
        ]
        peak = engine["peak_rss_bytes"]
        memory = "unknown" if peak is None else f"{peak / 1e6:.0f}"
        lines.append(f"{name:15} {cells[0]:>24} {cells[1]:>24} {memory:>12}")
    return "\n".join(lines)


def main() -> None:
    """Read the arguments, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a GGUF file of the llama architecture")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--llama-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--form", choices=FORMS, help="requantize the file to this form first")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--serve", choices=ENGINES, help=argparse.SUPPRESS)
    parser.add_argument("--requantize", choices=FORMS, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--context", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.requantize:
        requantize(str(args.model), args.requantize, args.out)
        return
    if args.serve:
        serve(args.serve, str(args.model), args.threads, args.context)
        return
    result = compare(args)
    if not args.json:
        print(table(result))
    else:
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
