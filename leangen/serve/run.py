"""Building a server from its options, and running it until it is told to stop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

from leangen import carbon, meters, otel
from leangen.budget import Guard
from leangen.bundle import Bundle
from leangen.console import say
from leangen.engine import Engine
from leangen.errors import DependencyError, RequestError
from leangen.host import host
from leangen.ledger import Ledger
from leangen.records import Receipt
from leangen.serve import models
from leangen.serve.access import Access, read_keys
from leangen.serve.account import Account
from leangen.serve.calls import Server
from leangen.serve.options import Options
from leangen.serve.power import PowerCap, hold_to_budgets
from leangen.serve.prometheus import Metrics
from leangen.session import Session
from leangen.store import Store

KEEP_ALIVE_S = 15


def build(
    options: Options, *, on_receipt: Callable[[Receipt], None] | None = None
) -> tuple[Any, Server]:
    """The guarded ASGI app and its parts; models are found here, and loaded by their first job.

    `on_receipt` is told of each receipt after it went to the ledger.

    Raises DependencyError without the extra `serve`, and what finding the models raises.
    """
    try:
        import python_multipart  # noqa: F401  FastAPI wants it for uploads

        from leangen.serve import app
    except ModuleNotFoundError as error:
        if error.name not in ("fastapi", "pydantic", "starlette", "python_multipart"):
            raise
        raise DependencyError(
            "the server needs its libraries: pip install 'leangen[serve]'"
        ) from error
    if options.otel:
        otel.export()
    keys = None if options.api_key_file is None else read_keys(options.api_key_file)
    footprint = carbon.footprint(options.region, intensity=options.intensity)
    cap = None if options.power_cap_w is None else PowerCap(options.power_cap_w)
    store = Store()
    bundles = models.find(options.models, store, say)
    selection = meters.probed(
        meters.select(meter=options.meter),
        boot_id=host().boot_id,
        cache=store.home / "probes.json",
    )
    if options.meter is not None and meters.is_external(options.meter):
        # Clients see the reason: a path or a command of this machine is not for them.
        selection = replace(selection, reason="a meter that the server was given")
    account = Account(selection)
    account.measure_baseline()
    metrics = Metrics()
    ledger = Ledger(store.ledger_path)
    guard = Guard(store.home, ledger, options.budgets)

    def engine_of(bundle: Bundle) -> Engine:
        engine = Engine(
            Session(bundle, threads=options.threads),
            ledger=ledger,
            footprint=footprint,
            guard=guard,
            baseline_s=0.0,
            selection=selection,
        )
        engine.share_meters(selection, account.baseline)
        if options.otel:
            engine.on_receipt.append(otel.record)
        if on_receipt is not None:
            engine.on_receipt.append(on_receipt)
        return engine

    server = Server(
        options=options,
        models=models.Models(
            bundles,
            account=account,
            metrics=metrics,
            limits=options.limits,
            build=engine_of,
            memory_bytes=options.memory_bytes,
            cap=cap,
            allow=partial(hold_to_budgets, guard, options.tag),
        ),
        account=account,
        ledger=ledger,
        guard=guard,
        metrics=metrics,
        footprint=footprint,
    )
    metrics.watch(account, ledger, server.models.figures)
    guarded = Access(
        app.create(server),
        keys=keys,
        local=options.local,
        max_body_bytes=options.max_body_bytes,
        per_minute=options.per_minute,
        refused=metrics.refused,
    )
    return guarded, server


def run(options: Options) -> None:
    """Serve until SIGTERM or Ctrl-C; what runs then may finish, what waits is handed back.

    Raises RequestError for an address that cannot be listened on.
    """
    guarded, server = build(options)
    import uvicorn

    from leangen.serve.connections import Connection

    class Graceful(uvicorn.Server):
        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if self.should_exit:
                self.force_exit = True
                return
            self.should_exit = True
            server.stopping = True
            # Not in this frame: it interrupts the event loop, and stopping waits for the workers.
            threading.Thread(target=server.models.stop, args=(options.grace_s,)).start()

    config = uvicorn.Config(
        guarded,
        http=Connection,
        ws="none",
        host=options.host,
        port=options.port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(options.grace_s) + 5,
    )
    web = Graceful(config)
    guarded.connections = lambda: len(web.server_state.connections)
    listener = _listen(config)
    address = listener.getsockname()
    names = ", ".join(server.models.by_name)
    say(f"serving {names} at http://{_shown(address[0])}:{address[1]}, Ctrl-C ends")
    try:
        asyncio.run(web.serve(sockets=[listener]))
    finally:
        server.models.stop(0)  # done already, unless the web server failed
        listener.close()


def _listen(config: Any) -> Any:
    import socket

    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise RequestError(
            f"cannot listen on {config.host}:{config.port}: {error.strerror or error}; "
            "choose another --host or --port"
        ) from error
    return listener


def _shown(address: str) -> str:
    return f"[{address}]" if ":" in address else address
