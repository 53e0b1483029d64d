"""`leangen serve --ray`: the same app on the machines of a Ray cluster. The extra is `ray`.

Each model is a Ray Serve deployment of its own, whose replicas are whole servers for that model;
`Front` on the head node guards, looks at which model is asked for, and hands the request on. A
replica keeps receipts in its own machine's ledger before they are acknowledged, and sends them to
the head's, where `/v1/receipts/{id}` and `leangen ledger` find them all; with `LEANGEN_LEDGER` set
to a PostgreSQL database all machines write there, and nothing has to be sent.
"""

from __future__ import annotations

import asyncio
import json
import queue
import re
import signal
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import Any

from leangen import clock, cluster
from leangen.console import say
from leangen.errors import RequestError, StorageError, UnknownModelError
from leangen.ledger import Ledger
from leangen.ledger.rows import canonical
from leangen.serve import models, problems, prometheus
from leangen.serve.access import Access, Message, Receive, Scope, Send, read_keys
from leangen.serve.options import Options
from leangen.serve.problems import LostError, NotFoundError
from leangen.store import Store

NAME = "leangen"
DEARER = 1.25
"""Joules a token this many times the least seen: rather let requests wait than add a replica."""
_LOST = "the machine that worked on this request is gone: ask again"
_BATCH = 200
_RETRY_S = 5.0
_FORM_MODEL = re.compile(rb'name="model"\r\n(?:[^\r\n]+\r\n)*\r\n([^\r\n]+)\r\n')


def replicas_for(context: Any, requests_each: int) -> tuple[int, dict[str, Any]]:
    """How many replicas a model needs: as many as its requests fill with full batches.

    A full batch is the cheapest per token, so the last replica is given up, and its requests wait,
    while the joules per token are above `DEARER` times the least that this model has shown.
    `context` is Ray's AutoscalingContext.
    """
    told = context.raw_metrics or {}
    latest = [series[-1].value for series in told.get("joules_per_unit", {}).values() if series]
    state = dict(context.policy_state or {})
    wanted = context.total_num_requests / requests_each
    count = int(-(-wanted // 1))
    if known := [value for value in latest if value > 0]:
        now = sum(known) / len(known)
        state["least"] = min(now, state.get("least", now))
        if now > DEARER * state["least"]:
            count = int(wanted)
    least, most = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
    return max(least, min(most, count)), state


class Policy:
    """`replicas_for` as Ray takes it."""

    def __init__(self, requests_each: int) -> None:
        self._requests_each = requests_each

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """The number of replicas, and what to remember."""
        return replicas_for(context, self._requests_each)


class Replica:
    """A server for one model, within Ray."""

    def __init__(self, options: Options) -> None:
        from leangen.serve import app, run

        self._kept: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._units = self._joules = 0.0
        _, self._server = run.build(options, on_receipt=self._note)
        self._app = app.create(self._server)
        if not isinstance(Store().ledger_path, str):
            threading.Thread(target=self._send, daemon=True).start()

    async def asgi(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """The messages of one response as they are sent; closing it tells the app so."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        gone, given = asyncio.Event(), False

        async def receive() -> Message:
            nonlocal given
            if not given:
                given = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        task = asyncio.ensure_future(self._app(scope, receive, sent.put))
        task.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                yield message
            await task
        finally:
            gone.set()

    def exposition(self) -> tuple[str, str]:
        """This replica's name and its metrics as text."""
        from ray import serve

        return (
            serve.get_replica_context().replica_id.unique_id,
            self._server.metrics.exposition().decode(),
        )

    def record_autoscaling_stats(self) -> dict[str, float]:
        """For `replicas_for`: since it was asked last."""
        joules, units = self._joules, self._units
        self._joules = self._units = 0.0
        return {"joules_per_unit": joules / units if units else 0.0}

    def _note(self, receipt: Any) -> None:
        self._units += receipt.units.count
        self._joules += receipt.energy.gross_j or 0.0
        self._kept.put(receipt.to_json())

    def _send(self) -> None:
        """Send the ledger's receipts, those of earlier lives too, and then each new one."""
        from ray import serve

        front = serve.get_deployment_handle("Front", NAME)
        for group in self._groups():
            while True:
                try:
                    front.keep.remote([canonical(document) for document in group]).result()
                    break
                except Exception as error:  # Ray raises many types when the head is away
                    say(f"leangen: receipts wait for the head: {type(error).__name__}")
                    clock.sleep(_RETRY_S)

    def _groups(self) -> Iterator[list[dict[str, Any]]]:
        earlier = self._server.ledger.documents()
        while group := list(islice(earlier, _BATCH)):
            yield group
        while True:
            group = [self._kept.get()]
            while len(group) < _BATCH and not self._kept.empty():
                group.append(self._kept.get())
            yield group

    def __del__(self) -> None:
        self._server.models.stop(self._server.options.grace_s)
        self._server.ledger.flush()


class Router:
    """The ASGI app behind the guard: to the model that a request names."""

    def __init__(self, handles: Mapping[str, Any], ledger: Ledger) -> None:
        self._handles = handles
        self._ledger = ledger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI; raises LeangenErrors, which the guard answers."""
        if scope["type"] != "http":  # Ray Serve starts and ends an app as a web server does
            for event in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{event}.complete"})
            return
        from ray.exceptions import RayError

        try:
            await self._answer(scope, receive, send)
        except RayError as error:
            say(f"leangen: error: a replica was lost: {type(error).__name__}")
            raise LostError(_LOST) from error

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, body = scope["path"], (await receive()).get("body", b"")
        if path in ("/health", "/ready"):
            status = "ok" if path == "/health" else "ready"
            await _json(send, {"status": status})
        elif path == "/v1/models":
            parts = [json.loads(await self._whole(name, scope)) for name in self._handles]
            data = [model for part in parts for model in part["data"]]
            await _json(send, {"object": "list", "data": data})
        elif path == "/metrics":
            told = [handle.broadcast("exposition") for handle in self._handles.values()]
            parts = [part for one in told for part in await one.results_async()]
            await _send(send, prometheus.gathered(dict(parts)), b"text/plain; version=0.0.4")
        elif path.startswith("/v1/receipts/"):
            receipt_id = path.rpartition("/")[2][:40]
            found = await asyncio.to_thread(self._ledger.receipt, receipt_id)
            if found is None:
                raise NotFoundError(f"the ledger has no receipt {receipt_id!r}, or not yet")
            await _json(send, found)
        else:
            await self._hand_on(self._named(scope, body), scope, body, receive, send)

    def _named(self, scope: Scope, body: bytes) -> str:
        """The model that a request is about; the first where it names none."""
        path = scope["path"]
        if path.startswith("/v1/models/"):
            name = path.removeprefix("/v1/models/")
        elif found := _FORM_MODEL.search(body):
            name = found[1].decode("utf-8", "replace")
        else:
            try:
                said = json.loads(body or b"{}")
            except (ValueError, RecursionError):
                said = None  # the replica says what is wrong with it
            name = said.get("model") if isinstance(said, dict) else None
        if not isinstance(name, str):
            return next(iter(self._handles))
        if name not in self._handles:
            raise UnknownModelError(
                f"model {name[:80]!r} is not served here: expected one of "
                f"{', '.join(self._handles)}"
            )
        return name

    async def _hand_on(
        self, name: str, scope: Scope, body: bytes, receive: Receive, send: Send
    ) -> None:
        from ray.exceptions import RayError

        messages = self._ask(name, scope, body)

        async def forward() -> None:
            streams: bool | None = None
            try:
                async for message in messages:
                    await send(message)
                    if streams is None:
                        kinds = [
                            value for key, value in message["headers"] if key == b"content-type"
                        ]
                        streams = kinds[0].startswith(b"text/event-stream") if kinds else False
            except RayError:
                if not streams:
                    raise
                told = f"data: {json.dumps(problems.body(LostError(_LOST)))}\n\n"
                await send({"type": "http.response.body", "body": told.encode()})

        async def gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.ensure_future(forward()), asyncio.ensure_future(gone())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
            else:
                messages.cancel()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _whole(self, name: str, scope: Scope) -> bytes:
        messages = self._ask(name, scope, b"")
        return b"".join([message.get("body", b"") async for message in messages])

    def _ask(self, name: str, scope: Scope, body: bytes) -> Any:
        kept = ("type", "method", "path", "raw_path", "query_string", "headers", "leangen")
        plain = {key: scope[key] for key in kept if key in scope}
        plain |= {"http_version": "1.1", "scheme": "http", "root_path": "", "client": ("", 0)}
        return self._handles[name].options(stream=True).asgi.remote(plain, body)


async def _json(send: Send, content: Any) -> None:
    await _send(send, json.dumps(content).encode(), b"application/json")


async def _send(send: Send, body: bytes, kind: bytes) -> None:
    headers = [(b"content-type", kind)]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def application(options: Options, names: Mapping[str, str], most: int) -> Any:
    """The Ray Serve application of models by name and reference, up to `most` replicas each."""
    from ray import serve
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    replicas = {}
    for name, ref in names.items():
        scaling = AutoscalingConfig(
            min_replicas=1,
            max_replicas=most,
            policy=AutoscalingPolicy(
                policy_function=f"{__name__}:Policy",
                policy_kwargs={"requests_each": options.limits.max_batch},
            ),
        )
        replicas[name] = serve.deployment(
            name=re.sub(r"[^A-Za-z0-9_.-]", "_", name),
            autoscaling_config=scaling,
            max_ongoing_requests=options.limits.max_batch + options.limits.queue,
            ray_actor_options={"num_cpus": options.threads or 1},
            graceful_shutdown_timeout_s=options.grace_s + 5,
        )(Replica).bind(replace(options, models=[f"{name}={ref}"]))

    def app() -> Access:
        handles = {
            name: serve.get_deployment_handle(bound._bound_deployment.name, NAME)
            for name, bound in replicas.items()
        }
        return Access(
            Router(handles, Ledger(Store().ledger_path)),
            keys=None if options.api_key_file is None else read_keys(options.api_key_file),
            local=options.local,
            max_body_bytes=options.max_body_bytes,
            per_minute=options.per_minute,
            refused=lambda _: None,
        )

    class Front:
        def __init__(self, *parts: Any) -> None:
            self._ledger = Ledger(Store().ledger_path)

        def keep(self, documents: list[str]) -> None:
            """Receipts from a replica's ledger; those that are here already are left out."""
            try:
                self._ledger.add(json.loads(document) for document in documents)
            except (StorageError, ValueError) as error:
                say(f"leangen: error: {error}")

    head = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}}
    front = serve.deployment(name="Front", ray_actor_options=head)(serve.ingress(app)(Front))
    return front.bind(*replicas.values())


def run(options: Options) -> None:
    """Deploy, and serve until SIGTERM or Ctrl-C; then the replicas finish what runs."""
    if options.port == 0:
        raise RequestError("port is 0: with --ray give the port to listen on")
    ray = cluster.connect()
    from ray import serve

    refs = {ref.rpartition("=")[2]: ref for ref in options.models}
    found = models.find(options.models, Store(), say)
    names = dict(zip(found, refs, strict=True))
    serve.start(
        proxy_location="HeadOnly", http_options={"host": options.host, "port": options.port}
    )
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    machines = sum(node["Alive"] for node in ray.nodes())
    serve.run(application(options, names, machines), name=NAME)
    say(f"serving {', '.join(names)} at http://{options.host}:{options.port}, Ctrl-C ends")
    over.wait()
    serve.delete(NAME)
    serve.shutdown()
