"""Mixed load with faults on a server with real models, and what must hold afterwards.

Clients chat, stream, speak, draw, sample and embed; some vanish in the middle, some send nonsense.
Meanwhile, at fixed shares of the time: SIGTERM and a restart, kill -9 and a restart, the meter
vanishes, a model's folder is deleted, the process gets no more memory. Then it checks that

- every receipt that a client was given is in the ledger, and the ledger verifies;
- no request was left without an end, and none runs or waits afterwards;
- no answer holds a traceback or has a status that it should not have, and the log has no traceback;
- what was counted is what requests were charged with and what nobody could be charged with;
- the resident memory of the last server's life is flat within 5%: the median over its last quarter
  against that over its second.

It exits with 1 when one of these does not hold, and prints JSON last.

    python bench/soak.py --seconds 3600
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from leangen import clock
from leangen.ledger import Ledger
from leangen.store import Store

MODELS = ("smollm2-135m:gguf", "piper-joe:int8", "terrain:int8", "galaxy-flow", "minilm-l6:int8")
CLIENTS = 6
STUCK_S = 400.0
"""A request without an end for so long is stuck. The machine may be stopped for 150 s meanwhile."""
SYSTEM = "You are a helpful assistant of a small museum of mills and bridges. Answer briefly."
FLAT = 0.05


class Soak:
    """One run: the server's lives, what clients were told, what went wrong."""

    def __init__(
        self, folder: Path, logs: Path, names: list[str], seconds: float, rate_hz: float
    ) -> None:
        self.folder = folder
        self.logs = logs
        self.names = names
        self.begin = time.monotonic()
        self.seconds = seconds
        self.rate_hz = rate_hz
        self.address = ""
        self.child: subprocess.Popen[bytes] | None = None
        self.acknowledged: set[str] = set()
        self.statuses: Counter[str] = Counter()
        self.problems: list[str] = []
        self.memory: list[tuple[float, int]] = []
        self.done_by_model: Counter[str] = Counter()
        self.lives = 0
        self.aborts = 0
        """Deaths for want of memory, while there was none."""
        self.excused: set[str] = set()
        """Statuses that a fault under way may cause."""
        self._lock = threading.Lock()
        self._meter_on = threading.Event()
        self._meter_on.set()

    @property
    def left(self) -> float:
        """Seconds until the load ends."""
        return self.begin + self.seconds - time.monotonic()

    def problem(self, text: str) -> None:
        """Note what must not be; the first of each kind is enough to look at."""
        with self._lock:
            self.problems.append(f"{self.seconds - self.left:.0f} s: {text}")
            print(self.problems[-1], flush=True)

    def start(self) -> None:
        """Start a server and wait until it answers."""
        self.lives += 1
        log = self.logs / f"server-{self.lives}.log"
        command = [sys.executable, "-m", "leangen", "serve", *self.names, "--port", "0"]
        command += ["--max-batch", "4", "--context", "512", "--memory", "230MB", "--grace", "200"]
        command += ["--idle-release", "60", "--meter", f"file:{self.folder / 'meter.log'}"]
        command += ["--tag", "background_job_soak"]
        with log.open("wb") as out:
            self.child = subprocess.Popen(command, stderr=out)
        found = None
        while found is None:
            if self.child.poll() is not None:
                raise SystemExit(f"the server ended: {log.read_text()[-2000:]}")
            time.sleep(0.2)
            found = re.search(r"at (http://\S+),", log.read_text())
        self.address = found[1]
        self.memory.clear()

    def end(self, how: signal.Signals) -> None:
        """Send a signal and wait for the end."""
        assert self.child is not None
        self.child.send_signal(how)
        try:
            code = self.child.wait(timeout=STUCK_S)
        except subprocess.TimeoutExpired:
            self.problem(f"the server did not end after {how.name}")
            self.child.kill()
            return
        if how is signal.SIGTERM and code != 0:
            self.problem(f"the server ended with {code} after SIGTERM")

    def meter(self) -> None:
        """A power meter's lines, until the load is over."""
        path = self.folder / "meter.log"
        while self.left > -STUCK_S and not self.over.is_set():
            if self._meter_on.is_set():
                with path.open("a") as file:
                    file.write(f"{time.monotonic():.3f} {20 + random.random():.2f} W\n")
            time.sleep(0.2)

    over = threading.Event()

    def watch(self) -> None:
        """Resident memory every five seconds."""
        while not self.over.is_set():
            kb = resident_kb(self.child.pid) if self.child is not None else None
            if kb is not None:
                self.memory.append((time.monotonic(), kb))
            time.sleep(5)

    def client(self, seed: int) -> None:
        """Ask until the time is over."""
        rng = random.Random(seed)
        while self.left > 0:
            time.sleep(min(rng.expovariate(self.rate_hz / CLIENTS), max(0.0, self.left)))
            path, body, expected = asked(rng)
            vanishes = rng.random() < 0.1
            try:
                self.ask(path, body, expected, rng.uniform(0.05, 1) if vanishes else None)
            except httpx.ReadTimeout:
                self.statuses["vanished"] += 1
                if not vanishes:
                    self.problem(f"{path} had no end within {STUCK_S:g} s: {body}")
            except httpx.TransportError as error:
                self.statuses[f"cut: {type(error).__name__}"] += 1  # the server was ended

    def ask(
        self, path: str, body: dict[str, Any], expected: set[int], vanish_after_s: float | None
    ) -> None:
        """One request to its end, or to where the client vanishes."""
        timeout = httpx.Timeout(STUCK_S, read=vanish_after_s)
        if vanish_after_s is None:
            timeout = httpx.Timeout(STUCK_S)
        with (
            httpx.Client(base_url=self.address, trust_env=False, timeout=timeout) as http,
            http.stream("POST", path, json=body) as reply,
        ):
            began = time.monotonic()
            content = b""
            for part in reply.iter_raw():
                content += part
                if vanish_after_s is not None and time.monotonic() - began > vanish_after_s:
                    self.statuses["vanished"] += 1
                    return
            self.judge(path, body, expected, reply, content)

    def judge(
        self,
        path: str,
        body: dict[str, Any],
        expected: set[int],
        reply: httpx.Response,
        content: bytes,
    ) -> None:
        """Whether an answer is one that may be given."""
        status = str(reply.status_code)
        told = content.decode("utf-8", "replace") if b"RIFF" not in content[:4] else ""
        code = re.search(r'"code":\s*"(\w+)"', told) if reply.status_code >= 400 else None
        self.statuses[f"{status} {code[1]}" if code else status] += 1
        if "Traceback" in told or str(self.folder) in told or 'File "' in told:
            at = max(told.find("Traceback"), told.find(str(self.folder)), told.find('File "'))
            self.problem(
                f"{path} told of the server's insides: {told[max(0, at - 200) : at + 200]}"
            )
        passing = {"overloaded", "shutting_down"} | self.excused
        if reply.status_code not in expected and not (code and code[1] in passing):
            self.problem(f"{path} was answered with {status}: {told[:300]} to {body}")
        if reply.status_code == 200:
            failed = re.search(r'"error": \{.*"code": "(\w+)"', told)
            if failed and failed[1] not in passing:
                self.problem(f"{path} broke off: {told[-300:]}")
            if not failed:
                ids = reply.headers["x-leangen-receipt"].split(",")
                with self._lock:
                    self.acknowledged.update(ids)
                    self.done_by_model[body["model"]] += 1

    def memory_growth(self) -> float:
        """The last quarter's median over the second quarter's, minus 1."""
        kb = [value for _, value in self.memory]
        quarter = len(kb) // 4
        return statistics.median(kb[-quarter:]) / statistics.median(kb[quarter : 2 * quarter]) - 1

    def revive(self) -> None:
        """Start the server where it has died, as a supervisor would.

        Without any memory it may: the tokenizer and others are in Rust, which then aborts.
        """
        assert self.child is not None
        code = self.child.poll()
        if code is None:
            return
        if code == -signal.SIGABRT and "out_of_memory" in self.excused:
            self.aborts += 1
        else:
            self.problem(f"the server died with {code}")
        self.start()

    def served_again(self) -> None:
        """Every model answers within a minute, or that is a problem."""
        for model, (path, body) in PLAIN.items():
            end = time.monotonic() + STUCK_S
            while True:
                try:
                    said = httpx.post(
                        self.address + path,
                        json={"model": model} | body,
                        timeout=STUCK_S,
                        trust_env=False,
                    )
                except httpx.TransportError as error:
                    told, status = type(error).__name__, None
                    self.revive()
                else:
                    told, status = said.text, said.status_code
                if status == 200:
                    break
                if time.monotonic() > end:
                    self.problem(f"{model} does not come back: {told[:300]}")
                    break
                time.sleep(1)

    def faults(self, terrain: Path) -> None:
        """All faults in turn, at their shares of the time; returns when the load is over."""
        away = terrain.with_name("away")

        def restart(how: signal.Signals) -> Callable[[], None]:
            def run() -> None:
                self.end(how)
                self.start()
                self.served_again()

            return run

        def meter_gone() -> None:
            self._meter_on.clear()
            (self.folder / "meter.log").rename(self.folder / "meter.old")

        def meter_back() -> None:
            (self.folder / "meter.old").rename(self.folder / "meter.log")
            self._meter_on.set()

        def model_gone() -> None:
            self.excused.add("model_unavailable")
            terrain.rename(away)

        def model_back() -> None:
            if terrain.exists():
                self.problem("something was put where the model had been")
                shutil.rmtree(terrain)
            away.rename(terrain)
            self.served_again()
            self.excused.discard("model_unavailable")

        def no_memory() -> None:
            assert self.child is not None
            self.excused.update(("out_of_memory", "model_unavailable"))
            size = int(re.search(r"VmSize:\s+(\d+)", status_of(self.child.pid))[1]) * 1024  # type: ignore[index]
            resource.prlimit(self.child.pid, resource.RLIMIT_AS, (size + 20_000_000, -1))

        def memory_again() -> None:
            self.revive()
            assert self.child is not None
            resource.prlimit(self.child.pid, resource.RLIMIT_AS, (-1, -1))
            self.served_again()
            self.excused -= {"out_of_memory", "model_unavailable"}

        for share, fault in (
            (0.08, restart(signal.SIGTERM)),
            (0.16, restart(signal.SIGKILL)),
            (0.35, meter_gone),
            (0.42, meter_back),
            (0.45, model_gone),
            (0.52, model_back),
            (0.55, no_memory),
            (0.60, memory_again),
        ):
            time.sleep(max(0.0, self.left - (1 - share) * self.seconds))
            print(f"{share:.0%}: {getattr(fault, '__name__', 'fault')}", flush=True)
            fault()
        time.sleep(max(0.0, self.left))


def asked(rng: random.Random) -> tuple[str, dict[str, Any], set[int]]:
    """A path, a body, and the statuses that it may be answered with."""
    words = "old new stone water mill wheel river bridge miller valley winter".split()
    text = " ".join(rng.choices(words, k=rng.randrange(3, 40)))
    language = {"model": "smollm2-135m:gguf", "temperature": rng.choice([0, 0.8])}
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
    chat = language | {"messages": messages, "max_tokens": rng.randrange(4, 48)}
    ok, bad = {200}, {400}
    kinds: list[tuple[float, str, dict[str, Any], set[int]]] = [
        (4, "/v1/chat/completions", chat | {"stream": True}, ok),
        (2, "/v1/chat/completions", chat | {"n": 2}, ok),
        (1, "/v1/completions", language | {"prompt": text, "max_tokens": 16, "logprobs": 2}, ok),
        (1, "/v1/completions", language | {"prompt": text, "priority": rng.randrange(-3, 3)}, ok),
        (
            1,
            "/v1/audio/speech",
            {"model": "piper-joe:int8", "input": "həlˈoʊ", "phonemes": True},
            ok,
        ),
        (1, "/v1/images/generations", {"model": "terrain:int8", "n": rng.randrange(1, 3)}, ok),
        (2, "/v1/flows/sample", {"model": "galaxy-flow", "count": rng.randrange(1, 2000)}, ok),
        (2, "/v1/embeddings", {"model": "minilm-l6:int8", "input": [text, text[:20]]}, ok),
        (0.5, "/v1/completions", language | {"prompt": "mill " * 600}, bad),
        (0.5, "/v1/completions", {"model": "nothing", "prompt": text}, {404}),
        (0.5, "/v1/images/generations", {"model": "terrain:int8", "n": "three"}, bad),
    ]
    _, path, body, expected = rng.choices(kinds, [kind[0] for kind in kinds])[0]
    return path, body, expected


PLAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "smollm2-135m:gguf": ("/v1/completions", {"prompt": "The mill", "max_tokens": 2}),
    "piper-joe:int8": ("/v1/audio/speech", {"input": "həlˈoʊ", "phonemes": True}),
    "terrain:int8": ("/v1/images/generations", {}),
    "galaxy-flow": ("/v1/flows/sample", {"count": 3}),
    "minilm-l6:int8": ("/v1/embeddings", {"input": "The mill"}),
}


def status_of(pid: int) -> str:
    """The kernel's account of a process."""
    return Path(f"/proc/{pid}/status").read_text()


def resident_kb(pid: int) -> int | None:
    """Resident memory; None for a process that has gone."""
    try:
        found = re.search(r"VmRSS:\s+(\d+)", status_of(pid))
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(found[1]) if found else None


def gauge(text: str, name: str) -> float:
    """The sum over labels of a metric."""
    values = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, values))


def afterwards(soak: Soak) -> dict[str, float]:
    """Check the last server once the load is over; its counters in joules."""
    end = time.monotonic() + STUCK_S
    with httpx.Client(base_url=soak.address, trust_env=False, timeout=STUCK_S) as http:
        while True:
            text = http.get("/metrics").text
            busy = gauge(text, "leangen_num_requests_running")
            busy += gauge(text, "leangen_num_requests_waiting")
            if not busy:
                break
            if time.monotonic() > end:
                soak.problem(f"{busy:g} requests still run or wait")
                break
            time.sleep(1)
    return {
        "counted_j": gauge(text, "leangen_serving_energy_joules_total"),
        "nobodys_j": gauge(text, "leangen_unattributed_energy_joules_total"),
        "charged_j": gauge(text, "leangen_request_energy_joules_total"),
    }


def main() -> int:
    """Run, check, report; 1 where something does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--rate", type=float, default=1.5, help="requests a second")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="where the servers' logs stay")
    args = parser.parse_args()
    if args.logs is not None:
        args.logs.mkdir(parents=True, exist_ok=True)
    store = Store()
    with tempfile.TemporaryDirectory(prefix="leangen-soak-") as place:
        folder = Path(place)
        terrain = folder / "terrain"
        shutil.copytree(store.resolve("terrain:int8").path, terrain)
        home = folder / "home"
        home.mkdir()
        names = []
        for name in MODELS:
            path = terrain if name == "terrain:int8" else store.resolve(name).path
            names.append(f"{name}={path}")
        os.environ["LEANGEN_HOME"] = str(home)
        soak = Soak(folder, args.logs or folder, names, args.seconds, args.rate)
        threads = [threading.Thread(target=soak.meter)]
        threads[0].start()
        time.sleep(2)
        soak.start()
        threads.append(threading.Thread(target=soak.watch))
        threads[-1].start()
        clients = [threading.Thread(target=soak.client, args=(n,)) for n in range(CLIENTS)]
        for thread in clients:
            thread.start()
        try:
            soak.faults(terrain)
            for thread in clients:
                thread.join()
            joules = afterwards(soak)
            soak.end(signal.SIGTERM)
        finally:
            soak.over.set()
            if soak.child is not None and soak.child.poll() is None:
                soak.child.kill()
            for thread in threads:
                thread.join()
        for log in sorted(soak.logs.glob("server-*.log")):
            text = log.read_text()
            if "Traceback" in text:
                soak.problem(f"{log.name}: {text[text.index('Traceback') :][:2000]}")
        growth = soak.memory_growth()
        if abs(growth) > FLAT:
            soak.problem(f"memory grew by {growth:.1%}")
        if abs(joules["counted_j"] - joules["charged_j"] - joules["nobodys_j"]) > 1e-3:
            soak.problem(f"the joules do not add up: {joules}")
        with Ledger(home / "ledger.sqlite") as ledger:
            kept = {receipt["id"] for receipt in ledger.documents()}
            lost = soak.acknowledged - kept
            if lost:
                soak.problem(f"{len(lost)} acknowledged receipts are lost: {sorted(lost)[:3]}")
            for found in ledger.verify().problems:
                soak.problem(f"the ledger: {found}")
    if not soak.acknowledged:
        soak.problem("nothing was answered")
    print(
        json.dumps(
            {
                "seconds": args.seconds,
                "acknowledged": len(soak.acknowledged),
                "kept": len(kept),
                "answers": dict(soak.statuses.most_common()),
                "by_model": dict(soak.done_by_model),
                "aborts_without_memory": soak.aborts,
                "memory_growth": growth,
                "memory_mb": statistics.median(kb for _, kb in soak.memory) / 1e3,
                **joules,
                "problems": soak.problems,
                "ended_at": clock.utc_now(),
            },
            indent=1,
        )
    )
    return 1 if soak.problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
