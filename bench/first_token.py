"""First token from process start: leangen and llama-cpp-python on the same GGUF file.

Each round starts `python -c CODE` afresh: import, load the model, read the prompt, print the first
token, end. leangen measures energy, writes the receipt to its ledger and waits until it is on the
disk, as it does by default. The two take turns; files are in the page cache and code is compiled,
as the first round, which is dropped, sees to. Medians and ranges over the rounds are printed:

- seconds from starting the process to its first token, and to its exit;
- CPU seconds, user and system, of all its threads;
- its peak RSS.

    python bench/first_token.py --llama-python ~/llama/bin/python
    python bench/first_token.py --rounds 40 --prompt-words 256 --json
    python bench/first_token.py --python ~/wheel/bin/python      (leangen as it is installed there)

Where a counter can be read, leangen measures idle power for a second before it exits, once in a
process: the exit's seconds then have it in them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "The capital of France is"
KEYS = ("first_token_s", "exit_s", "cpu_s", "peak_rss_bytes")
WORDS = "river stone bridge water light under small house night green paper north".split()

FIND = """
import sys
from leangen.store import Store
print(Store().data(sys.argv[1].partition(":")[0]))
"""

LEANGEN = """
import sys
import leangen as lg
model, threads, prompt = sys.argv[1:]
stream = lg.load(model, threads=int(threads)).stream(prompt, max_new_tokens=1)
print(next(stream).text, flush=True)
for step in stream:
    pass
stream.result
"""

LLAMA = """
import sys
from llama_cpp import Llama
model, threads, prompt = sys.argv[1:]
llama = Llama(model, n_threads=int(threads), n_threads_batch=int(threads), verbose=False)
stream = llama(prompt, max_tokens=1, temperature=0, stream=True)
print(next(stream)["choices"][0]["text"], flush=True)
for chunk in stream:
    pass
"""


def environment() -> dict[str, str]:
    """For leangen: this checkout, where no other is installed; compiled code is kept."""
    given = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    return given | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


def run(command: list[str], env: dict[str, str]) -> dict[str, Any]:
    """Start a process, wait for its first line and its end; what that took."""
    start = time.perf_counter()
    # Elsewhere: `python -c` looks for modules in the current folder first.
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, env=env, cwd=tempfile.gettempdir()
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        first = time.perf_counter()
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)  # Popen tells no rusage
        process.returncode = os.waitstatus_to_exitcode(status)
        end = time.perf_counter()
    if process.returncode:
        sys.exit(f"{command[0]} ended with {process.returncode}")
    return {
        "text": line.decode().removesuffix("\n"),
        "first_token_s": first - start,
        "exit_s": end - start,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Run the rounds; medians, ranges and ratios."""
    env = environment()
    if args.python != sys.executable:
        env.pop("PYTHONPATH")
    find = [args.python, "-c", FIND, args.model]
    gguf = subprocess.run(find, check=True, env=env, stdout=subprocess.PIPE, text=True).stdout
    prompt = PROMPT
    if args.prompt_words:
        prompt = " ".join(random.Random(0).choices(WORDS, k=args.prompt_words))
    asked = [str(args.threads), prompt]
    commands = {
        "leangen": [args.python, "-c", LEANGEN, args.model, *asked],
        "llama-cpp-python": [args.llama_python, "-c", LLAMA, gguf.strip(), *asked],
    }
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    load_before = os.getloadavg()[0]
    for number in range(args.rounds + 1):
        for name in commands if number % 2 else reversed(commands):
            seen = run(commands[name], env if name == "leangen" else dict(os.environ))
            rounds[name].append(seen)
    engines = {name: summary(seen[1:]) for name, seen in rounds.items()}
    own, other = engines["leangen"], engines["llama-cpp-python"]
    ratios = {key: own[key]["median"] / other[key]["median"] for key in KEYS}
    return {
        "model": args.model,
        "prompt": prompt,
        "threads": args.threads,
        "rounds": args.rounds,
        "load_average_before": load_before,
        "engines": engines,
        "leangen_over_llama": ratios,
    }


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and range of each figure, and what the first token was."""
    values = {key: [seen[key] for seen in rounds] for key in KEYS}
    return {
        "text": rounds[0]["text"],
        **{
            key: {"median": statistics.median(each), "min": min(each), "max": max(each)}
            for key, each in values.items()
        },
    }


def table(result: dict[str, Any]) -> str:
    """The comparison for a reader."""
    titles = ("first token ms", "exit ms", "CPU ms", "peak RSS MB")
    scales = (1e3, 1e3, 1e3, 1e-6)
    lines = [f"{'':17}" + "".join(f"{title:>20}" for title in titles)]
    for name, engine in result["engines"].items():
        cells = [
            "{:.0f} ({:.0f}-{:.0f})".format(
                *(engine[key][of] * scale for of in ("median", "min", "max"))
            )
            for key, scale in zip(KEYS, scales, strict=True)
        ]
        lines.append(f"{name:17}" + "".join(f"{cell:>20}" for cell in cells))
    ratios = [f"{result['leangen_over_llama'][key]:.2f}x" for key in KEYS]
    lines.append(f"{'leangen over it':17}" + "".join(f"{ratio:>20}" for ratio in ratios))
    return "\n".join(lines)


def main() -> None:
    """Read the arguments, compare, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m:gguf", help="made from a GGUF file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--prompt-words", type=int, default=0, help="0: a short sentence")
    parser.add_argument("--python", default=sys.executable, help="another that has leangen")
    parser.add_argument("--llama-python", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--json", action="store_true", help="print JSON only")
    args = parser.parse_args()
    result = compare(args)
    print(json.dumps(result, indent=1) if args.json else table(result))


if __name__ == "__main__":
    main()
