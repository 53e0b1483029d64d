"""/v1/embeddings."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from leangen.errors import RequestError
from leangen.records import Output
from leangen.serve import calls, single
from leangen.serve.calls import Server
from leangen.serve.schemas import EmbeddingBody


def router(server: Server) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post("/v1/embeddings")
    async def embeddings(body: EmbeddingBody, request: Request) -> Response:
        served, reason = await server.choose(body.model, "embedding")
        size = served.bundle.config["dimensions"]
        if body.dimensions not in (None, size):
            raise RequestError(
                f"dimensions is {body.dimensions}: the vectors of {served.name} have {size}"
            )
        call = single.call(server, served, request, body, body.texts())
        output = await single.output(call, request, served)
        if output is None:
            return single.nobody()
        tokens = int(call.receipts[0].units.count)
        content = {
            "object": "list",
            "model": served.name,
            "data": await asyncio.to_thread(_entries, output, body.encoding_format == "base64"),
            "usage": {
                "prompt_tokens": tokens,
                "total_tokens": tokens,
                "energy": calls.energy_usage(call.receipts),
            },
        }
        return await single.answer(call, content, reason)

    return routes


def _entries(output: Output, base64_wanted: bool) -> list[dict[str, Any]]:
    vectors = np.asarray(output.array, "<f4")
    return [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(vector.tobytes()).decode()
            if base64_wanted
            else vector.tolist(),
        }
        for index, vector in enumerate(vectors)
    ]
