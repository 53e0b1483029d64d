"""leangen's server under concurrent streams, and llama-cpp-python's with the same GGUF.

Each server is a process of its own; both stay up and take turns, so that a busy minute hits both.
A round starts `--streams` greedy completions at once and streams them to their ends. One round of
each kind warms up and is dropped; medians over the rest are shown. Time to the first token counts
from the request's start, its wait in the queue included.

    python bench/serve.py --model smollm2-135m:int4
    python bench/serve.py --gguf model.gguf --llama-python ~/llama/bin/python
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

PROMPT = "The old bridge over the river number {} was built by people who"
STARTS_WITHIN_S = 60


@dataclass
class Round:
    """What one round of streams took."""

    tokens: int = 0
    seconds: float = 0.0
    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    joules: float | None = 0.0
    source: str | None = None


async def stream(client: httpx.AsyncClient, model: str, number: int, new: int, out: Round) -> None:
    """One completion, streamed; its times go into `out`."""
    asked = {
        "model": model,
        "prompt": PROMPT.format(number),
        "max_tokens": new,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    begin = last = time.perf_counter()
    chunks, finish, first = 0, None, True
    async with client.stream("POST", "/v1/completions", json=asked) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise SystemExit(f"the server gave up: {chunk['error']}")
            if (usage := chunk.get("usage")) and "energy" in usage:
                energy = usage["energy"]
                out.source = energy["source"]
                if out.joules is not None and energy["joules"] is not None:
                    out.joules += energy["joules"]
                else:
                    out.joules = None
            for choice in chunk["choices"]:
                finish = choice["finish_reason"] or finish
                if choice["text"]:
                    now = time.perf_counter()
                    (out.ttft_s if first else out.gaps_s).append(now - (begin if first else last))
                    last, first, chunks = now, False, chunks + 1
    out.tokens += new if finish == "length" else chunks


async def round_of(address: str, model: str, streams: int, new: int) -> Round:
    """`streams` completions at once."""
    out = Round()
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(
        base_url=address, trust_env=False, timeout=300, limits=limits
    ) as client:
        begin = time.perf_counter()
        await asyncio.gather(*(stream(client, model, n, new, out) for n in range(streams)))
        out.seconds = time.perf_counter() - begin
    return out


@contextlib.contextmanager
def server(command: list[str], port: int, env: dict[str, str]) -> Iterator[str]:
    """A server as a process; its address once it answers."""
    child = subprocess.Popen(
        command, env=os.environ | env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    address = f"http://127.0.0.1:{port}"
    try:
        give_up = time.perf_counter() + STARTS_WITHIN_S
        with httpx.Client(trust_env=False) as client:
            while True:
                if child.poll() is not None or time.perf_counter() > give_up:
                    raise SystemExit(f"{' '.join(command)} did not start")
                with contextlib.suppress(httpx.TransportError):
                    client.get(f"{address}/v1/models")
                    break
                time.sleep(0.1)
        yield address
    finally:
        child.terminate()
        child.wait()


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def summary(rounds: list[Round]) -> dict[str, Any]:
    """Medians over rounds of rates; quantiles of the times of all their streams."""
    rates = [r.tokens / r.seconds for r in rounds]
    per_token = [r.joules / r.tokens for r in rounds if r.joules]
    ttft = [value for r in rounds for value in r.ttft_s]
    gaps = [value for r in rounds for value in r.gaps_s]
    return {
        "tokens_per_s": statistics.median(rates),
        "tokens_per_s_range": [min(rates), max(rates)],
        "ttft_p50_s": quantile(ttft, 0.5),
        "ttft_p95_s": quantile(ttft, 0.95),
        "inter_token_p50_s": quantile(gaps, 0.5),
        "inter_token_p95_s": quantile(gaps, 0.95),
        "joules_per_token": statistics.median(per_token) if per_token else None,
        "energy_source": rounds[0].source,
    }


def quantile(values: list[float], share: float) -> float:
    """The value below which `share` of them lie."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def main() -> None:
    """Run the rounds, print a table and, last, JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m:int4")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gguf", type=Path, help="serve it with llama-cpp-python as well")
    parser.add_argument("--llama-python", default=sys.executable)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    with contextlib.ExitStack() as stack:
        port = free_port()
        command = [sys.executable, "-m", "leangen", "serve", f"served={args.model}"]
        command += ["--port", str(port), "--max-batch", str(args.streams), "--context", "512"]
        path = os.pathsep.join([str(root), str(root / "kernels")])
        ours = stack.enter_context(
            server([*command, "--threads", str(args.threads)], port, {"PYTHONPATH": path})
        )
        kinds = [("leangen x 1", ours, 1), (f"leangen x {args.streams}", ours, args.streams)]
        if args.gguf is not None:
            port = free_port()
            command = [args.llama_python, "-m", "llama_cpp.server", "--model", str(args.gguf)]
            command += ["--port", str(port), "--n_ctx", "512", "--n_threads", str(args.threads)]
            command += ["--n_threads_batch", str(args.threads), "--model_alias", "served"]
            # Else each new request would break off the one that runs.
            command += ["--interrupt_requests", "False", "--verbose", "False"]
            theirs = stack.enter_context(server(command, port, {}))
            kinds += [
                ("llama.cpp x 1", theirs, 1),
                (f"llama.cpp x {args.streams}", theirs, args.streams),
            ]
        taken: dict[str, list[Round]] = {name: [] for name, _, _ in kinds}
        for number in range(args.rounds + 1):
            for name, address, streams in kinds:
                done = asyncio.run(round_of(address, "served", streams, args.new_tokens))
                if number:
                    taken[name].append(done)
    rows = {name: summary(rounds) for name, rounds in taken.items()}
    if not args.json:
        for name, row in rows.items():
            energy = row["joules_per_token"]
            print(
                f"{name:14} {row['tokens_per_s']:6.1f} tok/s  first token p50 "
                f"{row['ttft_p50_s'] * 1e3:.0f} p95 {row['ttft_p95_s'] * 1e3:.0f} ms, between "
                f"tokens p50 {row['inter_token_p50_s'] * 1e3:.1f} p95 "
                f"{row['inter_token_p95_s'] * 1e3:.1f} ms"
                + (f", {energy:.3f} J/token ({row['energy_source']})" if energy else "")
            )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
