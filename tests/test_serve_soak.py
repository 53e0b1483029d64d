"""Minutes of mixed load, with clients that vanish and send nonsense, on a server process."""

from __future__ import annotations

import os
import random
import re
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest
import serving

from leangen import clock
from leangen.ledger import Ledger

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("LEANGEN_SOAK_S", "60"))
CLIENTS = 6


def asked(rng):
    """A path and a body, good or bad."""
    text = "hello world " * rng.randrange(1, 5)
    return rng.choice(
        [
            ("/v1/completions", {"model": "tiny-text", "prompt": text, "max_tokens": 20}),
            ("/v1/completions", {"model": "tiny-text", "prompt": text, "stream": True, "n": 2}),
            (
                "/v1/chat/completions",
                {"model": "tiny-text", "messages": [{"role": "user", "content": text}]},
            ),
            ("/v1/images/generations", {"model": "tiny-image", "n": 1 + rng.randrange(3)}),
            ("/v1/audio/speech", {"model": "tiny-voice", "input": "abc ab.", "phonemes": True}),
            ("/v1/flows/sample", {"model": "tiny-flow", "count": 1 + rng.randrange(500)}),
            ("/v1/completions", {"model": "nothing", "prompt": text}),
            ("/v1/completions", {"model": "tiny-text", "prompt": "a " * 900}),
        ]
    )


def client(address, seed, end_ns, statuses, acknowledged):
    rng = random.Random(seed)
    while clock.monotonic_ns() < end_ns:
        path, body = asked(rng)
        timeout_s = 0.005 if rng.random() < 0.1 else 30
        try:
            with httpx.Client(base_url=address, trust_env=False, timeout=timeout_s) as http:
                reply = http.post(path, json=body)
        except httpx.TimeoutException:
            continue
        statuses.append(reply.status_code)
        if reply.status_code == 200:
            acknowledged.update(reply.headers["x-leangen-receipt"].split(","))


def resident_kb(pid):
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])


def gauge(text, name):
    values = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    return sum(map(float, values))


def test_an_edge_server_bears_mixed_load(tmp_path, home):
    statuses, acknowledged = [], set()
    with serving.process(serving.bundles(tmp_path), home, "--context", "128") as (address, child):
        end_ns = clock.monotonic_ns() + int(SECONDS * 1e9)
        threads = [
            threading.Thread(target=client, args=(address, n, end_ns, statuses, acknowledged))
            for n in range(CLIENTS)
        ]
        for thread in threads:
            thread.start()
        time.sleep(SECONDS / 3)
        early_kb = resident_kb(child.pid)
        for thread in threads:
            thread.join()
        late_kb = resident_kb(child.pid)
        with httpx.Client(base_url=address, trust_env=False, timeout=30) as http:
            time.sleep(1)
            metrics = http.get("/metrics").text
        child.send_signal(signal.SIGTERM)
        assert child.wait(timeout=40) == 0
    assert set(statuses) == {200, 400, 404}
    assert len(acknowledged) > 10
    assert gauge(metrics, "leangen_num_requests_running") == 0
    assert gauge(metrics, "leangen_num_requests_waiting") == 0
    assert late_kb < 1.05 * early_kb
    with Ledger(home / "ledger.sqlite") as ledger:
        kept = {receipt["id"]: receipt for receipt in ledger.documents()}
        assert acknowledged <= kept.keys()
        assert not ledger.verify().problems
    counted_j = gauge(metrics, "leangen_serving_energy_joules_total")
    nobodys_j = gauge(metrics, "leangen_unattributed_energy_joules_total")
    billed_j = sum(receipt["energy"]["gross_j"] or 0 for receipt in kept.values())
    assert billed_j + nobodys_j == pytest.approx(counted_j, rel=1e-6)
