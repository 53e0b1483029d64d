"""leangen, with and without its kernels, against other engines on one GGUF file.

llama.cpp (llama-cpp-python) and OpenVINO GenAI read the file, onnxruntime-genai the graph that
leangen exports of it. All get the same threads and prompt tokens, each in a process of its own, and
take turns, so that a busy minute hits all. A round is a prefill of the whole prompt and then greedy
decoding; the first round warms up and is dropped. Medians over the rounds are compared. An engine
that is not installed or does not take the file is left out, and why is told.

    python bench/peers.py model.gguf --threads 2 --json
    python bench/peers.py model.gguf --llama-python ~/llama/bin/python
    python bench/peers.py model.gguf --form Q4_K_M       (the file requantized by llama.cpp first)
    python bench/peers.py model.gguf --engines leangen llama.cpp

The file's weights are streamed from memory in turn with the engines: the roof over decoding, which
reads them once a token.

Joules are those of the whole package during an engine's rounds, where a counter can be read.
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
from pathlib import Path
from typing import Any

from memory_stream import Stream
from peer_engines import ENGINES, READS_GGUF, LeftOut, import_llama

FORMS = ("Q4_0", "Q4_1", "Q4_K_M", "Q8_0")
SEED = 0
READS = 24
"""Of the weights in a round, for nothing but to see how long memory takes to give them."""


def serve(engine: str, model: str, threads: int, context: int) -> None:
    """The child process: one JSON line in (prompt, new tokens), one out (seconds, memory)."""
    try:
        run, version = ENGINES[engine](model, threads, context)
    except LeftOut as reason:
        print(json.dumps({"left_out": str(reason)}), flush=True)
        return
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
    try:
        llama_cpp = import_llama()
    except LeftOut as reason:
        sys.exit(f"{sys.executable}: {reason}")
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


def bytes_a_token(model: Path) -> int:
    """Of the weights that a token needs; of the embedding one row, unless it is the head too."""
    from leangen.exporters.gguf_checkpoint import GgufFile

    sizes = {name: tensor.n_bytes for name, tensor in GgufFile(model).tensors.items()}
    if "output.weight" in sizes:
        del sizes["token_embd.weight"]
    return int(sum(sizes.values()))


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
        answer = self._answer()
        self.left_out: str | None = answer.get("left_out")
        """Why it takes no part, or None."""
        self.version: str | None = answer.get("version")

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
    from leangen import meters
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
        started = [
            Engine(
                name,
                args.llama_python if name.startswith("llama.cpp") else sys.executable,
                str(model if name in READS_GGUF else bundle.path),
                args.threads,
                context,
            )
            for name in args.engines
        ]
        engines = [engine for engine in started if engine.left_out is None]
        load_before = os.getloadavg()[0]
        counters = meters.select()
        rounds: dict[str, list[dict[str, Any]]] = {engine.name: [] for engine in engines}
        size = bytes_a_token(model)
        reads_per_s = []
        with Stream(size, args.threads) as stream:
            for number in range(args.rounds + 1):
                reads_per_s.append(READS / sum(stream.seconds() for _ in range(READS)))
                for engine in engines if number % 2 else engines[::-1]:
                    window = meters.begin(counters, aligned=True)
                    answer = engine.round(prompt, args.new_tokens)
                    read = [each.energy_uj for each in meters.end(window)]
                    measured = counters.source == "measured" and None not in read
                    answer["joules"] = sum(filter(None, read)) / 1e6 if measured else None
                    rounds[engine.name].append(answer)
        for engine in started:
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
        for name in results
        if name != "leangen" and "leangen" in results
    }
    return {
        "model": args.model.name,
        "form": args.form,
        "threads": args.threads,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
        "load_average_before": load_before,
        "left_out": {e.name: e.left_out for e in started if e.left_out is not None},
        "joules": counters.reason or counters.source,
        "bytes_a_token": size,
        "reads_per_s": middle(reads_per_s),
        "engines": results,
        "leangen_over": ratios,
    }


def middle(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(rounds: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """Median and range of the speeds; the peak memory of the process."""
    speeds = {
        "decode_tokens_per_s": [(args.new_tokens - 1) / r["decode_s"] for r in rounds],
        "prefill_tokens_per_s": [args.prompt_tokens / r["prefill_s"] for r in rounds],
    }
    return {
        **{key: middle(each) for key, each in speeds.items()},
        "joules": None
        if rounds[0]["joules"] is None
        else statistics.median(each["joules"] for each in rounds),
        "peak_rss_bytes": rounds[-1]["peak_rss_bytes"],  # a high-water mark: the last is highest
    }


def table(result: dict[str, Any]) -> str:
    """The comparison for a reader."""
    lines = [
        f"{'':15} {'decode tok/s':>24} {'prefill tok/s':>24} {'joules':>8} {'peak RSS MB':>12}"
    ]
    for name, engine in result["engines"].items():
        cells = [
            "{median:.1f} ({min:.1f}-{max:.1f})".format(**engine[key])
            for key in ("decode_tokens_per_s", "prefill_tokens_per_s")
        ]
        peak, joules = engine["peak_rss_bytes"], engine["joules"]
        memory = "unknown" if peak is None else f"{peak / 1e6:.0f}"
        energy = "unknown" if joules is None else f"{joules:.1f}"
        lines.append(f"{name:15} {cells[0]:>24} {cells[1]:>24} {energy:>8} {memory:>12}")
    reads = result["reads_per_s"]
    lines.append(
        "weights read alone {median:.1f} ({min:.1f}-{max:.1f}) times a second: ".format(**reads)
        + f"{result['bytes_a_token'] / 1e6:.0f} MB at "
        f"{result['bytes_a_token'] * reads['median'] / 1e9:.1f} GB/s"
    )
    lines += [f"left out: {name}: {reason}" for name, reason in result["left_out"].items()]
    return "\n".join(lines)


def main() -> None:
    """Read the arguments, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a GGUF file of the llama architecture")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--llama-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--form", choices=FORMS, help="requantize the file to this form first")
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=ENGINES,
        default=list(ENGINES),
        metavar="ENGINE",
        help=", ".join(ENGINES),
    )
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
