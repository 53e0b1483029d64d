"""/v1/completions and /v1/chat/completions, whole or streamed (server-sent events)."""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from leangen import clock
from leangen.errors import LeangenError
from leangen.families import language
from leangen.records import Output, Step
from leangen.serve import calls, problems
from leangen.serve.calls import Call, Server
from leangen.serve.schemas import ChatBody, CompletionBody, TextBody

COMPLETION_TOKENS = 16
"""OpenAI's default of completions' max_tokens."""
CHAT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class _Form:
    """How one of the two endpoints words its replies."""

    id: str
    object: str
    chunk_object: str
    model: str
    created: int
    reason: str | None
    """Why another model than the named one answers."""

    @property
    def chat(self) -> bool:
        return self.object == "chat.completion"

    def head(self, name: str) -> dict[str, Any]:
        head = {"id": self.id, "object": name, "created": self.created, "model": self.model}
        return head if self.reason is None else head | {"leangen": {"reason": self.reason}}

    def choice(self, index: int, output: Output) -> dict[str, Any]:
        text = output.text or ""
        content: dict[str, Any] = {"text": text}
        if self.chat:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        told = output.extra.get("logprobs")
        logprobs = None if told is None else (_chat_logprobs if self.chat else _logprobs)(told)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": _finish(output)}

    def chunk(self, index: int, text: str, finish: str | None, *, first: bool) -> dict[str, Any]:
        content: dict[str, Any] = {"text": text}
        if self.chat:
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            content = {"delta": delta | ({"content": text} if text or first else {})}
        choice = {"index": index, **content, "logprobs": None, "finish_reason": finish}
        return self.head(self.chunk_object) | {"choices": [choice]}


def router(server: Server) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        body.refuse_unsupported()
        seeds = _seeds(body)
        prompts: Sequence[dict[str, Any]]
        if isinstance(body.prompt, str):
            prompts = [{"prompt": body.prompt}]
        elif isinstance(body.prompt[0], str):
            prompts = [{"prompt": text} for text in body.prompt]
        else:
            prompts = [{"tokens": body.prompt}]
        length = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        requests = [
            language.Request(**prompt, **body.options(length, seed))
            for prompt in prompts
            for seed in seeds
        ]
        return await _answer(server, body, request, requests, "cmpl", len(prompts))

    @routes.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        body.refuse_unsupported()
        messages = [message.plain() for message in body.messages]
        length = body.max_completion_tokens or body.max_tokens or CHAT_TOKENS
        requests = [
            language.Request(messages=messages, **body.options(length, seed))
            for seed in _seeds(body)
        ]
        return await _answer(server, body, request, requests, "chatcmpl", 1)

    return routes


def _seeds(body: TextBody) -> list[int]:
    """One per reply; without a seed they are drawn, as the API's replies differ each time."""
    first = secrets.randbits(31) if body.seed is None else body.seed
    return [first + index for index in range(body.n or 1)]


async def _answer(
    server: Server,
    body: TextBody,
    request: Request,
    requests: list[language.Request],
    kind: str,
    prompts: int,
) -> Response:
    served, reason = await server.choose(body.model, "language")
    chat = kind == "chatcmpl"
    form = _Form(
        id=f"{kind}-{uuid.uuid4().hex}",
        object="chat.completion" if chat else "text_completion",
        chunk_object="chat.completion.chunk" if chat else "text_completion",
        model=served.name,
        created=int(datetime.fromisoformat(clock.utc_now()).timestamp()),
        reason=reason,
    )
    told = request.scope.get("leangen")
    client = told["client"] if told else ""
    call = Call(server, served, requests, client=client, priority=body.priority, defer=body.defer)
    if body.stream:
        return await _stream(call, form, body, prompts, request)
    async with call:
        results = await calls.unless_gone(request.receive, call.results())
    if results is None:
        return Response(status_code=499)  # nobody reads it
    receipts = call.receipts
    calls.note(told, receipts, model=served.name)
    content = form.head(form.object) | {
        "choices": [form.choice(index, done.output) for index, done in enumerate(results)],
        "usage": calls.usage(receipts, prompts),
    }
    return JSONResponse(content, headers=calls.energy_headers(receipts))


async def _stream(
    call: Call, form: _Form, body: TextBody, prompts: int, request: Request
) -> Response:
    """Starts when the first step is done: until then an error still has its own status."""
    await call.__aenter__()
    events = call.events()
    first = None
    try:
        first = await calls.unless_gone(request.receive, anext(events))
    finally:
        if first is None:
            await call.__aexit__()
    if first is None:
        return Response(status_code=499)  # nobody reads it
    told = request.scope.get("leangen")

    async def chunks() -> AsyncIterator[str]:
        begun: set[int] = set()
        try:
            async for index, event in _resume(first, events):
                if isinstance(event, Step):
                    text, finish = event.text, None
                else:
                    text, finish = "", _finish(call.finished[index].output)
                if text or finish:
                    yield _sse(form.chunk(index, text, finish, first=index not in begun), body)
                    begun.add(index)
            if body.stream_options is not None and body.stream_options.include_usage:
                tail = form.head(form.chunk_object) | {"choices": []}
                yield _sse(tail | {"usage": calls.usage(call.receipts, prompts)}, None)
            yield "data: [DONE]\n\n"
        except LeangenError as error:
            yield _sse(problems.body(error), None)
        finally:
            await call.__aexit__()
            if call.receipts:
                calls.note(told, call.receipts, model=form.model)

    headers = call.headers | {"cache-control": "no-store", "x-accel-buffering": "no"}
    return StreamingResponse(chunks(), media_type="text/event-stream", headers=headers)


async def _resume(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for event in rest:
        yield event


def _sse(content: dict[str, Any], body: TextBody | None) -> str:
    if body is not None and body.stream_options and body.stream_options.include_usage:
        content = content | {"usage": None}  # the API's form: only the last one has it
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _chat_logprobs(told: list[dict[str, Any]]) -> dict[str, Any]:
    def entry(token: str, logprob: float) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    content = [
        entry(one["token"], one["logprob"])
        | {"top_logprobs": [entry(*likely) for likely in one["likeliest"]]}
        for one in told
    ]
    return {"content": content, "refusal": None}


def _logprobs(told: list[dict[str, Any]]) -> dict[str, Any]:
    lengths = [len(one["token"]) for one in told]
    return {
        "tokens": [one["token"] for one in told],
        "token_logprobs": [one["logprob"] for one in told],
        "top_logprobs": [dict(one["likeliest"]) for one in told],
        "text_offset": [sum(lengths[:index]) for index in range(len(told))],
    }


def _finish(output: Output) -> str:
    return {"eos": "stop", "stop": "stop"}.get(output.stop_reason or "", "length")
