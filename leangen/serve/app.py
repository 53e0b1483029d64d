"""The application: routes, and every error in OpenAI's shape."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.exceptions import HTTPException

import leangen
from leangen.errors import LeangenError
from leangen.serve import embeddings, media, problems, text, transcriptions
from leangen.serve.calls import Server
from leangen.serve.problems import NotFoundError

PAGE = Path(__file__).parent / "assets" / "page.html"
HELPERS = 4
"""Threads for what would hold up the event loop: coding pictures and sound, reading the ledger."""
_RECEIPT_ID = re.compile(r"[0-9a-f]{32}")


def create(server: Server) -> FastAPI:
    """The FastAPI app over a server's parts; `leangen.serve.access` guards it."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with server.ledger.writing():
            server.models.start()
            await _start_helpers()
            yield
            await asyncio.to_thread(server.models.stop, server.options.grace_s)
            await asyncio.to_thread(server.ledger.flush)

    app = _App(
        list(server.models.by_name),
        title="leangen",
        version=leangen.__version__,
        summary="Generative models in low precision; every answer says what it cost.",
        lifespan=lifespan,
        docs_url=None,  # these load scripts from elsewhere
        redoc_url=None,
    )
    _errors(app)
    app.include_router(text.router(server))
    app.include_router(embeddings.router(server))
    app.include_router(media.router(server))
    app.include_router(transcriptions.router(server))
    _operations(app, server)
    return app


class _App(FastAPI):
    """Its schema says which models there are, so that generated clients and tests can name them.

    It is made when first asked for: that takes longer than all the rest of a start.
    """

    def __init__(self, names: list[str], **options: Any) -> None:
        super().__init__(**options)
        self._names = names

    def openapi(self) -> dict[str, Any]:
        made = self.openapi_schema is not None
        schema = super().openapi()
        for body in () if made else schema["components"]["schemas"].values():
            if "model" in body.get("properties", {}):
                body["properties"]["model"]["enum"] = self._names
        return schema


async def _start_helpers() -> None:
    """Start all threads that `asyncio.to_thread` may use, for `ModelWorker.start`'s reason."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(HELPERS))
    together = threading.Barrier(HELPERS)
    await asyncio.gather(*(asyncio.to_thread(together.wait) for _ in range(HELPERS)))


def _operations(app: FastAPI, server: Server) -> None:
    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(server, name) for name in server.models.by_name]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        server.models.get(name)
        return _model(server, name)

    @app.get("/v1/receipts/{receipt_id}")
    async def receipt(receipt_id: str) -> dict[str, Any]:
        found = None
        if _RECEIPT_ID.fullmatch(receipt_id):
            found = await asyncio.to_thread(server.ledger.receipt, receipt_id)
        if found is None:
            raise NotFoundError(f"the ledger has no receipt {receipt_id[:40]!r}")
        return found

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        status = {"status": "stopping" if server.stopping else "ready"}
        return JSONResponse(status, status_code=503 if server.stopping else 200)

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        exposition = await asyncio.to_thread(server.metrics.exposition)
        return Response(exposition, media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", response_class=FileResponse, include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE, media_type="text/html", headers=_PAGE_HEADERS)


_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; img-src data:; media-src blob:; connect-src 'self'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def _model(server: Server, name: str) -> dict[str, Any]:
    served = server.models.get(name)
    return {
        "id": name,
        "object": "model",
        "created": 0,
        "owned_by": "leangen",
        "family": served.key,
        "scheme": served.bundle.scheme,
        "bytes": served.bundle.size_bytes,
        "loaded": served.worker.loaded,
        "conditions": served.bundle.config.get("conditions") or {},
        "columns": served.bundle.config.get("columns") or [],
        "voices": media.voices(served),
        "chats": bool(served.bundle.config.get("chat_template")),
        "reads_text": bool(served.bundle.config.get("text")),
    }


def _errors(app: FastAPI) -> None:
    @app.exception_handler(LeangenError)
    async def known(request: Request, error: LeangenError) -> JSONResponse:
        told = request.scope.get("leangen")
        if told is not None:
            told["error"] = str(error)
        return JSONResponse(problems.body(error), status_code=problems.status(error))

    @app.exception_handler(MemoryError)
    @app.exception_handler(RuntimeError)
    async def short_of_memory(request: Request, error: Exception) -> JSONResponse:
        why = problems.out_of_memory(error)
        if why is None:
            raise error
        return await known(request, why)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return JSONResponse(problems.invalid(error.errors(), error.body), status_code=400)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        content = problems.shaped(str(error.detail), "invalid_request_error", "not_found")
        if error.status_code != 404:
            content["error"]["code"] = f"http_{error.status_code}"
        return JSONResponse(content, status_code=error.status_code, headers=error.headers)

    @app.exception_handler(Exception)
    async def unknown(_: Request, error: Exception) -> JSONResponse:
        # Starlette logs the traceback; the client learns nothing of it.
        content = problems.shaped(problems.INTERNAL, "server_error", "internal")
        return JSONResponse(content, status_code=500)
