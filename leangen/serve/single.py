"""One job, one answer: what the routes of all families but text generation share."""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import Any

from fastapi import Request, Response

from leangen.records import Output
from leangen.serve import calls
from leangen.serve.calls import Call, Server
from leangen.serve.models import Served
from leangen.serve.schemas import Body


def call(
    server: Server, served: Served, request: Request, body: Body, options: dict[str, Any]
) -> Call:
    """The call that carries out one request of the family, with `options`."""
    return Call(server, served, [served.family.Request(**options)], request, body)


async def output(call: Call, request: Request, served: Served) -> Output | None:
    """The job's output; None when the client has gone."""
    async with call:
        results = await calls.unless_gone(request.receive, call.results())
    if results is None:
        return None
    calls.note(request.scope.get("leangen"), call.receipts, model=served.name)
    return results[0].output


def seed(body: Body) -> int:
    """The body's, or one that is drawn."""
    return secrets.randbits(31) if body.seed is None else body.seed


def usage(call: Call) -> dict[str, Any]:
    """Units of work and energy."""
    units = call.receipts[0].units
    return {"units": units.to_json(), "energy": calls.energy_usage(call.receipts)}


async def answer(call: Call, content: dict[str, Any], reason: str | None) -> Response:
    """The JSON response; `reason` says why another model than the named one answers."""
    if reason is not None:
        content = content | {"leangen": {"reason": reason}}
    encoded = await asyncio.to_thread(_encoded, content)
    headers = calls.energy_headers(call.receipts)
    return Response(encoded, media_type="application/json", headers=headers)


def _encoded(content: dict[str, Any]) -> bytes:
    """JSON. Lists are encoded item by item: a long one at once would hold up the event loop."""

    def text(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))

    def member(value: Any) -> str:
        return f"[{','.join(map(text, value))}]" if isinstance(value, list) else text(value)

    return f"{{{','.join(f'{text(key)}:{member(content[key])}' for key in content)}}}".encode()


def headers(call: Call, served: Served, reason: str | None) -> dict[str, str]:
    """Of a response that is not JSON: the model, its cost, and `reason` as for `answer`."""
    said = {"x-leangen-model": served.name}
    said |= {} if reason is None else {"x-leangen-reason": reason}
    # A header holds ASCII, and a model may be called anything.
    plain = {name: text.encode("ascii", "replace").decode() for name, text in said.items()}
    return calls.energy_headers(call.receipts) | plain


def nobody() -> Response:
    """For a client that has gone: nobody reads it."""
    return Response(status_code=499)
