"""A Ray cluster of two node processes: serving, measuring, ledgers that come together.

The nodes are processes of this machine. Slow: Ray takes its time to start.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import tiny_bundles
from prometheus_client.parser import text_string_to_metric_families

from leangen import clock, cluster
from leangen.cli import main
from leangen.errors import RequestError
from leangen.ledger import Ledger
from leangen.serve import access, on_ray
from leangen.serve.options import Options
from leangen.serve.worker import Limits

ROOT = Path(__file__).parents[1]


def context(requests, joules, state=None):
    series = {n: [SimpleNamespace(value=value)] for n, value in enumerate(joules)}
    return SimpleNamespace(
        total_num_requests=requests,
        raw_metrics={"joules_per_unit": series},
        policy_state=state or {},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=4,
    )


def test_replicas_fill_their_batches_first():
    for requests, count in ((0, 1), (1, 1), (8, 1), (9, 2), (17, 3), (99, 4)):
        assert on_ray.replicas_for(context(requests, []), 8)[0] == count


def test_a_replica_that_makes_tokens_dearer_is_given_up():
    _, state = on_ray.replicas_for(context(8, [0.1]), 8)
    assert state["least"] == pytest.approx(0.1)
    dear, after = on_ray.replicas_for(context(10, [0.1, 0.4], state), 8)
    assert (dear, after["least"]) == (1, pytest.approx(0.1))
    assert on_ray.replicas_for(context(10, [0.1, 0.11], state), 8)[0] == 2
    assert on_ray.replicas_for(context(10, [0.0, 0.0], state), 8)[0] == 2  # nothing is known


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    """Ray on two node processes, with a store of its own."""
    pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("ray-home")
        patch.setenv("LEANGEN_HOME", str(home))
        paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        started = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False}
        )
        try:
            started.add_node(num_cpus=2)
            patch.setenv("RAY_ADDRESS", started.address)
            yield cluster.connect(), home
        finally:
            import ray

            ray.shutdown()
            started.shutdown()


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Lost:
    """A deployment's handle, whose replica dies after some messages."""

    def __init__(self, *messages):
        self._messages = messages
        self.asgi = self

    def options(self, **_):
        return self

    async def remote(self, *_):
        for message in self._messages:
            yield message
        raise pytest.importorskip("ray").exceptions.RayActorError


@pytest.mark.parametrize("streams", [False, True])
def test_a_lost_replica_is_told_in_the_shape_of_every_error(tmp_path, streams):
    pytest.importorskip("ray", reason="ray is not installed")
    kind = [(b"content-type", b"text/event-stream; charset=utf-8")]
    begun = (
        {"type": "http.response.start", "status": 200, "headers": kind},
        {"type": "http.response.body", "body": b"data: {}\n\n", "more_body": True},
    )
    router = on_ray.Router({"one": Lost(*begun if streams else ())}, Ledger(tmp_path / "ledger"))
    guarded = access.Access(
        router, keys=None, local=True, max_body_bytes=99, per_minute=None, refused=lambda _: None
    )

    async def ask():
        transport = httpx.ASGITransport(guarded)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.post("/v1/completions", json={"model": "one"})

    reply = asyncio.run(ask())
    assert reply.status_code == (200 if streams else 503)
    last = reply.text.strip().rpartition("data: ")[2]
    assert json.loads(last)["error"]["code"] == "replica_lost"


def test_a_cluster_that_is_not_there_is_named(monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed")

    def init(**_):
        raise ConnectionError("Failed to connect to Ray cluster")

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.9:6379")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(RequestError, match="no Ray cluster answers at 10.0.0.9:6379"):
        cluster.connect()


@pytest.mark.slow
def test_measuring_runs_on_every_node_and_the_ledgers_come_together(
    two_nodes, tmp_path, monkeypatch, capsys
):
    _, home = two_nodes
    monkeypatch.setenv("LEANGEN_HOME", str(home))
    bundle = tiny_bundles.oneshot(tmp_path / "shot").path
    command = ["bench", str(bundle), "--repeats", "2", "--threads", "1", "--json"]
    assert main([*command, "--ray"]) == 0
    machines = json.loads(capsys.readouterr().out)["machines"]
    assert len({machine["node"] for machine in machines}) == 2
    with Ledger(home / "ledger.sqlite") as ledger:
        receipts = ledger.entries()
        assert ledger.verify().chains == 2
        assert ledger.verify().problems == []
    spans = sorted((r["begin_boottime_ns"], r["duration_ns"]) for r in receipts)
    for (begin, duration), (following, _) in zip(spans, spans[1:], strict=False):
        assert begin + duration <= following  # one machine: they took turns
    assert main(["bench", "none-{node}", "--ray", "--json"]) == 2
    machines = json.loads(capsys.readouterr().out)["machines"]
    for machine in machines:
        assert f"unknown model 'none-{machine['node'][:8]}'" in machine["error"]


@pytest.mark.slow
def test_serving_on_two_nodes(two_nodes, tmp_path, monkeypatch):
    ray, home = two_nodes
    from ray import serve

    monkeypatch.setenv("LEANGEN_HOME", str(home))
    models = {
        "tiny-text": str(tiny_bundles.language(tmp_path / "text").path),
        "tiny-vectors": str(tiny_bundles.embedding(tmp_path / "vectors").path),
    }
    port = free_port()
    options = Options(
        models=[f"{name}={path}" for name, path in models.items()],
        port=port,
        threads=1,
        limits=Limits(max_batch=2, context=128),
        grace_s=5,
    )
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    serve.run(on_ray.application(options, models, most=2), name=on_ray.NAME)
    try:
        # Ray's proxy closes connections that rest, some just as the next request is sent on them.
        limits = httpx.Limits(max_keepalive_connections=0)
        address = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=address, trust_env=False, timeout=60, limits=limits) as http:
            check_answers(http)
            check_scaling(http, ray)
            check_receipts(http, home)
            check_metrics(http)
    finally:
        serve.delete(on_ray.NAME)
        serve.shutdown()


LONG = {"model": "tiny-text", "prompt": "hello", "max_tokens": 60, "ignore_eos": True, "seed": 1}


def check_answers(http):
    assert http.get("/ready").json() == {"status": "ready"}
    listed = http.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == ["tiny-text", "tiny-vectors"]
    whole = http.post("/v1/completions", json=LONG).json()["choices"][0]["text"]
    with http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as reply:
        lines = [line[6:] for line in reply.iter_lines() if line.startswith("data: {")]
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == whole
    vectors = http.post("/v1/embeddings", json={"model": "tiny-vectors", "input": "w1"}).json()
    assert len(vectors["data"][0]["embedding"]) == 64
    for body, status in (
        ({"model": "none", "prompt": "a"}, 404),
        ({"model": "tiny-text", "prompt": ""}, 400),
        ({"prompt": "a"}, 400),
    ):
        reply = http.post("/v1/completions", json=body)
        assert reply.status_code == status
        assert set(reply.json()) == {"error"}
    assert http.get("/v1/receipts/nothing").status_code == 404


def check_scaling(http, ray):
    """More requests than a batch holds bring a second replica."""
    from ray import serve

    stop = threading.Event()

    def ask():
        while not stop.is_set():
            http.post("/v1/completions", json=LONG)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    end_ns = clock.monotonic_ns() + 240 * 10**9
    replicas = 0
    while replicas < 2 and clock.monotonic_ns() < end_ns:
        deployment = serve.status().applications[on_ray.NAME].deployments["tiny-text"]
        replicas = deployment.replica_states.get("RUNNING", 0)
        time.sleep(1)
    stop.set()
    for thread in threads:
        thread.join()
    assert replicas == 2


def check_receipts(http, home):
    """The head's ledger gets every receipt that a client was given."""
    reply = http.post("/v1/completions", json=LONG | {"max_tokens": 3}).json()
    [receipt_id] = reply["usage"]["energy"]["receipts"]
    end_ns = clock.monotonic_ns() + 20 * 10**9
    while True:
        found = http.get(f"/v1/receipts/{receipt_id}")
        if found.status_code == 200 or clock.monotonic_ns() > end_ns:
            break
        time.sleep(0.2)
    assert found.json()["units"]["count"] == 3
    with Ledger(home / "ledger.sqlite") as ledger:
        assert ledger.receipt(receipt_id)
        assert ledger.verify().problems == []


def check_metrics(http):
    """The page of the whole cluster, by replica, as a scraper reads it."""
    page = http.get("/metrics").text
    samples = [
        sample
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if sample.name == "leangen_request_energy_joules_total"
    ]
    assert {sample.labels["model_name"] for sample in samples} == {"tiny-text", "tiny-vectors"}
    assert len({sample.labels["replica"] for sample in samples}) >= 2
