"""What a server meets in use: wrong keys, clients that vanish, too much work, shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import signal
import socket
import threading
import time
from datetime import datetime, timedelta

import httpx
import numpy as np
import pytest
import serving
import tiny_bundles

from leangen import audio, budget, clock
from leangen.errors import OutOfMemoryError
from leangen.families.batch import Batch
from leangen.ledger import Ledger
from leangen.serve import access, connections, room
from leangen.serve.worker import Limits, ModelWorker

LONG = {"model": "tiny-text", "prompt": "hello", "max_tokens": 60, "ignore_eos": True, "seed": 1}


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    path = tiny_bundles.language(tmp_path_factory.mktemp("language")).path
    return f"tiny-text={path}"


@pytest.fixture
def slowly(monkeypatch):
    """Every step of a batch takes 20 ms more."""
    step = Batch.step

    def slow(batch):
        time.sleep(0.02)
        return step(batch)

    monkeypatch.setattr(Batch, "step", slow)


def client(address, **options):
    return httpx.Client(base_url=address, trust_env=False, timeout=30, verify=False, **options)


def until(holds, seconds=30.0):
    """Wait for what another thread does; whether it came."""
    end_ns = clock.monotonic_ns() + int(seconds * 1e9)
    while clock.monotonic_ns() < end_ns:
        if holds():
            return True
        time.sleep(0.01)
    return False


def test_keys(text_model, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# who may ask\nann:0123456789abcdef0123\nfedcba98765432100000\n")
    with (
        serving.serving([text_model], api_key_file=keys) as (address, server),
        client(address) as http,
    ):
        assert http.get("/health").status_code == 200
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "0123456789abcdef0123"},
            {"authorization": "Basic 0123456789abcdef0123"},
            {"authorization": "Bearer ann:0123456789abcdef0123"},
        ):
            reply = http.get("/v1/models", headers=headers)
            assert reply.status_code == 401
            assert reply.json()["error"]["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"
        for key in ("0123456789abcdef0123", "fedcba98765432100000"):
            headers = {"authorization": f"Bearer {key}"}
            assert http.get("/v1/models", headers=headers).status_code == 200
            assert http.get("/metrics", headers=headers).status_code == 200
        assert http.get("/metrics").status_code == 401


def test_a_client_that_vanishes_frees_its_place(text_model, slowly):
    with serving.serving([text_model]) as (address, server):
        worker = server.models.get("tiny-text").worker
        with (
            client(address) as http,
            http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as reply,
        ):
            lines = reply.iter_lines()
            next(lines)
            receipt_id = reply.headers["x-leangen-receipt"]
            assert not worker.idle
        assert until(lambda: worker.idle)
        receipt = server.ledger.receipt(receipt_id)
        assert 1 <= receipt["units"]["count"] < 60
        with client(address) as http:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=LONG, timeout=0.6)
            assert until(lambda: worker.idle)
            assert http.post("/v1/completions", json=LONG | {"max_tokens": 2}).status_code == 200
        counts = [entry["units"]["count"] for entry in server.ledger.entries()]
        assert len(counts) == 3
        assert sum(count < 60 for count in counts) == 3


def test_a_vanishing_client_harms_no_other(text_model, slowly):
    with serving.serving([text_model]) as (address, server), client(address) as http:
        expected = http.post("/v1/completions", json=LONG).json()["choices"][0]["text"]
        texts = []

        def ask():
            with client(address) as own:
                texts.append(own.post("/v1/completions", json=LONG).json()["choices"][0]["text"])

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for seconds in (0.1, 0.2):
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=LONG, timeout=seconds)
        for thread in threads:
            thread.join()
        assert texts == [expected] * 3


def test_more_than_the_queue_holds_is_refused(text_model, slowly):
    limits = Limits(max_batch=1, context=128, queue=1)
    with serving.serving([text_model], limits=limits) as (address, _):
        statuses = []

        def ask():
            with client(address) as http:
                reply = http.post("/v1/completions", json=LONG | {"max_tokens": 40})
                statuses.append((reply.status_code, reply.json().get("error", {}).get("code")))

        threads = [threading.Thread(target=ask) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert set(statuses) == {(200, None), (503, "overloaded")}


def test_a_deadline_ends_a_request(text_model, slowly):
    with serving.serving([text_model], timeout_s=0.8) as (address, server), client(address) as http:
        reply = http.post("/v1/completions", json=LONG)
        assert reply.status_code == 504
        assert reply.json()["error"]["code"] == "deadline_exceeded"
        with http.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as stream:
            *_, last = [line for line in stream.iter_lines() if line]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "deadline_exceeded"
        assert until(lambda: server.models.get("tiny-text").worker.idle)
        assert len(server.ledger.entries()) == 2  # what it cost is on the account all the same


def test_a_request_may_have_a_deadline_of_its_own(text_model, slowly):
    with serving.serving([text_model]) as (address, _), client(address) as http:
        reply = http.post("/v1/completions", json=LONG | {"deadline_s": 0.3})
        assert reply.status_code == 504
        assert http.post("/v1/completions", json=LONG | {"deadline_s": 0}).status_code == 400
        asked = LONG | {"max_tokens": 2, "deadline_s": 20}
        assert http.post("/v1/completions", json=asked).status_code == 200


def test_unused_models_leave_the_memory(text_model):
    limits = Limits(max_batch=2, context=64, idle_release_s=0.2)
    with serving.serving([text_model], limits=limits) as (address, server), client(address) as http:
        worker = server.models.get("tiny-text").worker
        assert not worker.loaded
        for _ in range(2):
            assert http.post("/v1/completions", json=LONG | {"max_tokens": 2}).status_code == 200
            assert worker.loaded
            assert until(lambda: not worker.loaded)


def test_requests_that_meet_a_model_on_its_way_out_are_served(text_model):
    limits = Limits(max_batch=2, context=64, idle_release_s=0.0)
    with serving.serving([text_model], limits=limits) as (address, server):
        statuses = []

        def ask():
            with client(address) as http:
                for _ in range(10):
                    reply = http.post("/v1/completions", json=LONG | {"max_tokens": 1})
                    statuses.append(reply.status_code)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [200] * 30
        assert len(server.ledger.entries()) == 30


def test_an_idle_server_does_not_spin(text_model):
    with serving.serving([text_model]) as (address, _), client(address) as http:
        http.post("/v1/completions", json=LONG | {"max_tokens": 8})
        time.sleep(0.2)
        before_ns, begin_ns = clock.process_cpu_ns(), clock.monotonic_ns()
        time.sleep(1.0)
        busy_ns = clock.process_cpu_ns() - before_ns
        assert busy_ns < 0.05 * (clock.monotonic_ns() - begin_ns)


def test_the_least_used_model_makes_room(tmp_path):
    models = [
        f"{name}={tiny_bundles.language(tmp_path / name).path}" for name in ("one", "two", "three")
    ]
    limits = Limits(max_batch=2, context=64)
    with serving.serving(models, limits=limits) as (address, server):
        need = server.models.get("one").worker.memory_bytes
    with (
        serving.serving(models, limits=limits, memory_bytes=2 * need + 10) as (address, server),
        client(address) as http,
    ):
        loaded = []
        for name in ("one", "two", "one", "three"):
            reply = http.post("/v1/completions", json=LONG | {"model": name, "max_tokens": 2})
            assert reply.status_code == 200
            loaded.append({n for n, s in server.models.by_name.items() if s.worker.loaded})
        assert loaded == [{"one"}, {"one", "two"}, {"one", "two"}, {"one", "three"}]


def test_what_meter_it_is_stays_on_the_server(text_model, tmp_path):
    lines = tmp_path / "meter.log"
    lines.write_text("# unit=W\n1 20\n2 20\n3 20\n")
    with serving.serving([text_model], meter=f"file:{lines}") as (address, _):
        with client(address) as http:
            reply = http.post("/v1/completions", json=LONG | {"max_tokens": 2})
            [receipt_id] = reply.json()["usage"]["energy"]["receipts"]
            receipt = http.get(f"/v1/receipts/{receipt_id}")
        for text in (reply.text, receipt.text):
            assert "a meter that the server was given" in text
            assert str(tmp_path) not in text


def test_what_has_not_ended_within_the_grace_is_handed_back():
    told = []

    async def endless(scope, receive, send):
        await asyncio.Event().wait()

    async def receive():
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        told.append(message)

    async def stopped():
        guard = access.Access(
            endless, keys=None, local=True, max_body_bytes=9, per_minute=None, refused=told.append
        )
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "client": None}
        task = asyncio.ensure_future(
            guard(scope | {"headers": [(b"host", b"localhost")]}, receive, send)
        )
        await asyncio.sleep(0.01)
        task.cancel()
        await task

    asyncio.run(stopped())
    assert told[0]["status"] == 503
    assert json.loads(told[1]["body"])["error"]["code"] == "shutting_down"


def sent(address, *parts, wait_s=0.0):
    """What comes back on a connection that sends these bytes one after the other, till its end."""
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        answer = b""
        try:
            for part in parts:
                connection.sendall(part)
                time.sleep(wait_s)
            while chunk := connection.recv(65536):
                answer += chunk
        except ConnectionError:
            pass  # closed while we still sent
    return answer


def test_slow_senders_are_cut_off_and_harm_nobody(text_model, monkeypatch):
    monkeypatch.setattr(connections, "HEAD_S", 0.8)
    monkeypatch.setattr(access, "BODY_S", 0.4)
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 90\r\n"
    head += b"content-type: application/json\r\n\r\n"
    with serving.serving([text_model]) as (address, _), client(address) as http:
        slow = [
            (b"",),
            (b"GET /health HTTP/1.1\r\n", *[b"x-a: b\r\n"] * 30),
            tuple(bytes([byte]) for byte in head[:20]),
            (head, b" ", b" "),
        ]
        answers = [None] * len(slow)

        def send(number):
            answers[number] = sent(address, *slow[number], wait_s=0.05)

        threads = [threading.Thread(target=send, args=(number,)) for number in range(len(slow))]
        for thread in threads:
            thread.start()
        asked = LONG | {"max_tokens": 2}
        assert http.post("/v1/completions", json=asked).status_code == 200
        for thread in threads:
            thread.join()
        assert answers[:3] == [b""] * 3
        assert answers[3].startswith(b"HTTP/1.1 504") and b"deadline_exceeded" in answers[3]
        # A second request on a kept connection has its time too; a quick one after it has none.
        twice = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
        assert sent(address, twice, twice, b"GET /hea", wait_s=0.3).count(b'"ok"') == 2


def test_too_many_connections_are_told_so(text_model, home):
    with serving.process([text_model], home) as (address, _), contextlib.ExitStack() as held:
        host, port = address.removeprefix("http://").split(":")
        for _ in range(access.MOST_CONNECTIONS):
            held.enter_context(socket.create_connection((host, int(port))))
        with client(address) as http:
            reply = http.get("/health")
            assert reply.status_code == 503
            assert reply.json()["error"]["code"] == "overloaded"
            held.close()
            assert until(lambda: http.get("/health").status_code == 200)


def test_what_is_not_http_gets_the_shape_of_every_error(text_model):
    with serving.serving([text_model]) as (address, _):
        answer = sent(address, b"\x16\x03\x01 nonsense\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "invalid_http"


def test_models_that_do_not_fit_together_take_turns(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "TURN_S", 0.05)
    names = ("one", "two", "three")
    models = [f"{name}={tiny_bundles.language(tmp_path / name).path}" for name in names]
    limits = Limits(max_batch=2, context=64)
    with serving.serving(models, limits=limits) as (address, server):
        need = server.models.get("one").worker.memory_bytes
    with serving.serving(models, limits=limits, memory_bytes=need + 10) as (address, server):
        statuses = []

        def ask(name):
            with client(address) as http:
                for _ in range(6):
                    asked = LONG | {"model": name, "max_tokens": 4}
                    statuses.append(http.post("/v1/completions", json=asked).status_code)
                    loaded = [s.worker.loaded for s in server.models.by_name.values()]
                    assert sum(loaded) <= 1

        threads = [threading.Thread(target=ask, args=(name,)) for name in names * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert statuses == [200] * 36


def test_who_gives_up_waiting_for_room_is_in_nobodys_way(tmp_path, slowly):
    names = ("one", "two", "three")
    models = [f"{name}={tiny_bundles.language(tmp_path / name).path}" for name in names]
    limits = Limits(max_batch=2, context=64)
    with serving.serving(models, limits=limits) as (address, server):
        need = server.models.get("one").worker.memory_bytes
    with (
        serving.serving(models, limits=limits, memory_bytes=need + 10) as (address, server),
        client(address) as http,
    ):
        first = threading.Thread(
            target=lambda: httpx.post(
                f"{address}/v1/completions",
                json=LONG | {"model": "one"},
                trust_env=False,
                timeout=30,
            )
        )
        first.start()
        assert until(lambda: not server.models.get("one").worker.idle)
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=LONG | {"model": "two"}, timeout=0.3)
        asked = LONG | {"model": "three", "max_tokens": 2}
        assert http.post("/v1/completions", json=asked).status_code == 200
        first.join()
        assert server.models.get("two").worker.idle
        assert not server.models.get("two").worker.loaded


def test_a_model_whose_file_is_gone_is_named_without_its_path(tmp_path):
    bundle = tiny_bundles.language(tmp_path / "gone")
    with serving.serving([f"gone={bundle.path}"]) as (address, _), client(address) as http:
        shutil.rmtree(bundle.path)
        reply = http.post("/v1/completions", json=LONG | {"model": "gone"})
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "model_unavailable"
        assert str(tmp_path) not in reply.text
        assert http.get("/ready").status_code == 200
        assert not bundle.path.exists()  # nothing was put in its place
        tiny_bundles.language(tmp_path / "again").path.rename(bundle.path)
        assert http.post("/v1/completions", json=LONG | {"model": "gone"}).status_code == 200


def test_asking_too_often(text_model):
    with serving.serving([text_model], per_minute=3) as (address, _), client(address) as http:
        asked = LONG | {"max_tokens": 1}
        statuses = [http.post("/v1/completions", json=asked).status_code for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        reply = http.post("/v1/completions", json=asked)
        assert reply.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(reply.headers["retry-after"]) <= 20  # the next of three a minute
        assert http.get("/v1/models").status_code == 200


def test_what_can_wait_waits_for_a_cleaner_hour(text_model, tmp_path):
    def stamp(seconds):
        moment = datetime.fromisoformat(clock.utc_now()) + timedelta(seconds=seconds)
        return moment.isoformat(timespec="milliseconds")

    hours = tmp_path / "hours.csv"
    hours.write_text(f"{stamp(-10)},500\n{stamp(1.5)},100\n{stamp(20)},300\n")
    with (
        serving.serving([text_model], intensity=str(hours)) as (address, server),
        client(address) as http,
    ):
        reply = http.post("/v1/completions", json=LONG | {"max_tokens": 1, "defer": True})
        [receipt_id] = reply.json()["usage"]["energy"]["receipts"]
        assert server.ledger.receipt(receipt_id)["carbon"]["intensity_g_per_kwh"] == 100


def test_a_deferred_request_whose_client_leaves_is_dropped(text_model, tmp_path):
    now = datetime.fromisoformat(clock.utc_now())
    rows = [(now - timedelta(hours=1), 500), (now + timedelta(hours=1), 100)]
    hours = tmp_path / "hours.csv"
    hours.write_text("".join(f"{moment.isoformat()},{g}\n" for moment, g in rows))
    with (
        serving.serving([text_model], intensity=str(hours)) as (address, server),
        client(address) as http,
    ):
        for stream in (False, True):
            with pytest.raises(httpx.ReadTimeout):
                http.post(
                    "/v1/completions", json=LONG | {"defer": True, "stream": stream}, timeout=0.3
                )
        assert until(lambda: server.models.get("tiny-text").worker.idle)
        assert server.ledger.entries() == []


def test_a_mistake_in_a_worker_is_told_and_does_not_last(text_model, monkeypatch):
    step = Batch.step

    def broken(batch):
        raise ZeroDivisionError

    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    with serving.serving([text_model]) as (address, server), client(address) as http:
        monkeypatch.setattr(Batch, "step", broken)
        reply = http.post("/v1/completions", json=LONG)
        assert reply.status_code == 500
        assert "ZeroDivision" not in reply.text
        monkeypatch.setattr(Batch, "step", step)
        assert http.post("/v1/completions", json=LONG).status_code == 200
        assert server.account.billed_uj + server.account.unattributed_uj == server.account.total_uj


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("can't start new thread"),
        Exception("std::bad_alloc"),
        ImportError("onnx.so: failed to map segment from shared object"),
        OutOfMemoryError("cuda:0 is out of memory"),
    ],
)
def test_a_lack_of_memory_is_told_and_does_not_last(text_model, monkeypatch, error):
    """What such requests used is nobody's: no receipt has it."""

    step = Batch.step

    def short(batch):
        raise error

    with serving.serving([text_model]) as (address, server), client(address) as http:
        monkeypatch.setattr(Batch, "step", short)
        reply = http.post("/v1/completions", json=LONG)
        assert reply.status_code == 503
        assert reply.json()["error"]["code"] == "out_of_memory"
        monkeypatch.setattr(Batch, "step", step)
        assert http.post("/v1/completions", json=LONG | {"max_tokens": 2}).status_code == 200
        billed_j = sum(receipt["energy"]["gross_j"] for receipt in server.ledger.entries())
        assert server.account.billed_uj / 1e6 == pytest.approx(billed_j)
        assert server.account.billed_uj + server.account.unattributed_uj == server.account.total_uj


def test_where_no_thread_can_be_started_text_goes_on(text_model, monkeypatch):
    """When memory is short; the server has started its threads before."""

    def refused(thread):
        raise RuntimeError("can't start new thread")

    with serving.serving([text_model]) as (address, _), client(address) as http:
        monkeypatch.setattr(threading.Thread, "start", refused)
        reply = http.post("/v1/completions", json=LONG | {"max_tokens": 2})
        [receipt_id] = reply.json()["usage"]["energy"]["receipts"]
        assert http.get(f"/v1/receipts/{receipt_id}").status_code == 200
        monkeypatch.undo()


def test_a_worker_outlives_what_it_does_not_expect(text_model, monkeypatch, capfd):
    """Who waits is told, the log has the reason, and the next request is served."""
    with serving.serving([text_model]) as (address, _), client(address) as http:
        monkeypatch.setattr(ModelWorker, "_admit", lambda *_: [][1])
        reply = http.post("/v1/completions", json=LONG)
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal")
        assert "IndexError" not in reply.text and "IndexError" in capfd.readouterr().err
        monkeypatch.undo()
        assert http.post("/v1/completions", json=LONG | {"max_tokens": 2}).status_code == 200


def test_a_used_up_budget_is_429(text_model):
    limit = budget.Budget(per="day", limit=1e-9, on_exceed="refuse")
    with (
        serving.serving([text_model], budgets=[limit]) as (address, server),
        client(address) as http,
    ):
        assert http.post("/v1/completions", json=LONG | {"max_tokens": 2}).status_code == 200
        reply = http.post("/v1/completions", json=LONG)
        assert reply.status_code == 429
        error = reply.json()["error"]
        assert error["code"] == "budget_exceeded"
        assert "1e-09 J spent" in error["message"]
        assert "estimated" in error["message"]
        assert "leangen budget" not in error["message"]  # a client cannot raise it


def test_what_waits_does_not_begin_when_a_budget_is_used_up_meanwhile(text_model, slowly):
    limit = budget.Budget(per="day", limit=1e-9, on_exceed="refuse")
    limits = Limits(max_batch=1, context=128)
    with serving.serving([text_model], budgets=[limit], limits=limits) as (address, _):
        replies = []

        def ask():
            with client(address) as http:
                replies.append(http.post("/v1/completions", json=LONG | {"max_tokens": 5}))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = sorted(reply.status_code for reply in replies)
        assert statuses[0] == 200 and statuses[-1] == 429
        assert statuses.count(200) < 3  # the one that ran, and one whose receipt was being written


def two_precisions(build, folder):
    """NAME=PATH of a bundle and of one that passes for a smaller precision of it."""
    dear = build(folder / "dear")
    cheap = folder / "cheap"
    shutil.copytree(dear.path, cheap)
    manifest = json.loads((dear.path / "leangen.json").read_text())
    (cheap / "leangen.json").write_text(json.dumps(manifest | {"scheme": "int8"}))
    (dear.path / "more").write_bytes(bytes(1000))
    manifest["files"]["more"] = {"bytes": 1000, "sha256": ""}
    (dear.path / "leangen.json").write_text(json.dumps(manifest))
    return [f"dear={dear.path}", f"cheap={cheap}"]


def near_its_end(server):
    """The server's budget is nearly used up now."""
    spent_j = sum(receipt["energy"]["gross_j"] for receipt in server.ledger.entries())
    near = budget.Budget(per="day", limit=spent_j * 1.2, on_exceed="refuse")
    object.__setattr__(server.options, "budgets", [near])


def test_a_cheaper_precision_answers_near_the_end_of_a_budget(tmp_path):
    models = two_precisions(tiny_bundles.diffusion, tmp_path)
    asked = {"model": "dear", "seed": 1}
    with serving.serving(models, cheaper=True) as (address, server), client(address) as http:
        first = http.post("/v1/images/generations", json=asked).json()
        assert first["model"] == "dear"
        assert "leangen" not in first
        near_its_end(server)
        second = http.post("/v1/images/generations", json=asked).json()
        assert second["model"] == "cheap"
        assert "cheap answers for dear" in second["leangen"]["reason"]


@pytest.mark.parametrize("family", ["flow/speech", "seq2seq/transcription"])
def test_headers_tell_of_a_cheaper_precision_where_the_answer_is_no_json(tmp_path, family):
    models = two_precisions(tiny_bundles.BUILDERS[family], tmp_path)
    sound = audio.wav_bytes(np.sin(np.arange(8000) / 10), 16_000)
    form = {"model": "dear", "response_format": "text"}
    speech = {"model": "dear", "input": "abc", "phonemes": True}
    with serving.serving(models, cheaper=True) as (address, server), client(address) as http:

        def ask():
            if family == "flow/speech":
                return http.post("/v1/audio/speech", json=speech).headers
            files = {"file": ("sound.wav", sound)}
            return http.post("/v1/audio/transcriptions", data=form, files=files).headers

        first = ask()
        assert (first["x-leangen-model"], first.get("x-leangen-reason")) == ("dear", None)
        near_its_end(server)
        second = ask()
        assert second["x-leangen-model"] == "cheap"
        assert "cheap answers for dear" in second["x-leangen-reason"]


def test_sigterm_lets_a_stream_finish_and_hands_back_what_waits(text_model, home):
    # Under this cap every step waits a second, so that the signal comes in the middle.
    options = ["--power-cap", "0.001", "--max-batch", "1", "--context", "64", "--grace", "20"]
    with serving.process([text_model], home, *options) as (address, child):
        waiting = []

        def wait():
            with client(address) as http:
                waiting.append(http.post("/v1/completions", json=LONG))

        with client(address) as http:
            asked = LONG | {"max_tokens": 4, "stream": True}
            with http.stream("POST", "/v1/completions", json=asked) as reply:
                lines = reply.iter_lines()
                next(lines)
                thread = threading.Thread(target=wait)
                thread.start()
                time.sleep(0.3)
                child.send_signal(signal.SIGTERM)
                thread.join()
                rest = [line for line in lines if line]
                receipt_id = reply.headers["x-leangen-receipt"]
        assert rest[-1] == "data: [DONE]"
        assert waiting[0].status_code == 503
        assert waiting[0].json()["error"]["code"] == "shutting_down"
        assert child.wait(timeout=20) == 0
    with Ledger(home / "ledger.sqlite") as ledger:
        assert ledger.receipt(receipt_id)["units"]["count"] == 4
        assert not ledger.verify().problems


def test_kill_loses_no_acknowledged_receipt(text_model, home):
    with serving.process([text_model], home, "--context", "64") as (address, child):
        with client(address) as http:
            replies = [
                http.post("/v1/completions", json=LONG | {"max_tokens": 3}) for _ in range(5)
            ]
        child.kill()
        child.wait()
    with Ledger(home / "ledger.sqlite") as ledger:
        for reply in replies:
            assert ledger.receipt(reply.json()["usage"]["energy"]["receipts"][0])
        assert not ledger.verify().problems
