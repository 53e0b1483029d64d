"""/v1/completions and /v1/chat/completions, whole or streamed (server-sent events)."""

from __future__ import annotations

import codecs
import json
import secrets
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from leangen import clock
from leangen.errors import LeangenError, RequestError
from leangen.families import language
from leangen.records import Output, Step
from leangen.serve import calls, problems, tools
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
    calls: tools.Form | None = None
    """How the model writes calls of tools, where it was told of any."""

    @property
    def chat(self) -> bool:
        return self.object == "chat.completion"

    def head(self, name: str) -> dict[str, Any]:
        head = {"id": self.id, "object": name, "created": self.created, "model": self.model}
        return head if self.reason is None else head | {"leangen": {"reason": self.reason}}

    def choice(self, index: int, output: Output) -> dict[str, Any]:
        text, finish = output.text or "", _finish(output)
        content: dict[str, Any] = {"text": text}
        if self.chat:
            made = [] if self.calls is None else self.calls.read(text)
            said = {"content": None, "tool_calls": made} if made else {"content": text}
            content = {"message": {"role": "assistant", "refusal": None} | said}
            finish = "tool_calls" if made else finish
        told = self.logprobs(output.extra.get("logprobs") or (), _Places())
        return {"index": index, **content, "logprobs": told, "finish_reason": finish}

    def chunk(
        self,
        index: int,
        text: str,
        finish: str | None = None,
        *,
        first: bool,
        logprobs: dict[str, Any] | None = None,
        made: Sequence[dict[str, Any]] = (),
    ) -> dict[str, Any]:
        content: dict[str, Any] = {"text": text}
        if self.chat:
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            delta |= {"content": text} if text or (first and not made) else {}
            numbered = [{"index": number, **call} for number, call in enumerate(made)]
            content = {"delta": delta | ({"tool_calls": numbered} if made else {})}
        choice = {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}
        return self.head(self.chunk_object) | {"choices": [choice]}

    def logprobs(self, told: Sequence[Mapping[str, Any]], places: _Places) -> Any:
        """Of the next tokens of a text; None of none."""
        if not told:
            return None
        return _chat_logprobs(told) if self.chat else _logprobs(told, places)


def router(server: Server) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        body.refuse_unsupported()
        seeds = _seeds(body)
        prompts = body.prompts()
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
        told = tools.of(body, server.models.get(body.model))
        given: dict[str, Any] = {} if told is None else {"tools": told.told, "lark": told.lark}
        requests = [
            language.Request(messages=messages, **body.options(length, seed), **given)
            for seed in _seeds(body)
        ]
        form = None if told is None else told.form
        return await _answer(server, body, request, requests, "chatcmpl", 1, form)

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
    form_of_calls: tools.Form | None = None,
) -> Response:
    chat = kind == "chatcmpl"
    family = server.models.get(body.model).key
    translates = family == "seq2seq/text" and not chat
    served, reason = await server.choose(body.model, family if translates else "language")
    if translates and body.likeliest() is not None:
        raise RequestError(f"{served.name} tells no log-probabilities here: leave logprobs out")
    form = _Form(
        id=f"{kind}-{uuid.uuid4().hex}",
        object="chat.completion" if chat else "text_completion",
        chunk_object="chat.completion.chunk" if chat else "text_completion",
        model=served.name,
        created=int(datetime.fromisoformat(clock.utc_now()).timestamp()),
        reason=reason,
        calls=form_of_calls,
    )
    told = request.scope.get("leangen")
    call = Call(server, served, requests, request, body)
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

    replies = {index: _Streamed(form, index) for index in range(len(call.jobs))}

    async def chunks() -> AsyncIterator[str]:
        try:
            async for index, event in _resume(first, events):
                if isinstance(event, Step):
                    parts = replies[index].step(event)
                else:
                    parts = replies[index].end(call.finished[index].output)
                for part in parts:
                    yield _sse(part, body)
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


class _Streamed:
    """One reply as it is streamed: what may be a call of a tool is held back."""

    def __init__(self, form: _Form, index: int) -> None:
        self._form = form
        self._index = index
        self._hearing = None if form.calls is None else tools.Hearing(form.calls)
        self._begun = False
        self._places = _Places()

    def step(self, step: Step) -> list[dict[str, Any]]:
        """The chunks of a step: one, or none where it shows nothing."""
        text = step.text if self._hearing is None else self._hearing.push(step.text)
        logprobs = self._form.logprobs(step.logprobs, self._places)
        return [self._chunk(text, logprobs=logprobs)] if text or logprobs else []

    def end(self, output: Output) -> list[dict[str, Any]]:
        """The last chunks: what was held back, and why the reply ended."""
        text, made = ("", []) if self._hearing is None else self._hearing.finish()
        held = [self._chunk(text, made=made)] if text or made else []
        return [*held, self._chunk("", "tool_calls" if made else _finish(output))]

    def _chunk(self, text: str, finish: str | None = None, **more: Any) -> dict[str, Any]:
        first, self._begun = not self._begun, True
        return self._form.chunk(self._index, text, finish, first=first, **more)


async def _resume(first: Any, rest: AsyncIterator[Any]) -> AsyncIterator[Any]:
    yield first
    async for event in rest:
        yield event


def _sse(content: dict[str, Any], body: TextBody | None) -> str:
    if body is not None and body.stream_options and body.stream_options.include_usage:
        content = content | {"usage": None}  # the API's form: only the last one has it
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _chat_logprobs(told: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def entry(one: Mapping[str, Any]) -> dict[str, Any]:
        said = one["bytes"]
        return {"token": _shown(said, ""), "logprob": one["logprob"], "bytes": list(said)}

    content = [
        entry(one) | {"top_logprobs": [entry(likely) for likely in one["likeliest"]]}
        for one in told
    ]
    return {"content": content, "refusal": None}


def _logprobs(told: Sequence[Mapping[str, Any]], places: _Places) -> dict[str, Any]:
    def text(one: Mapping[str, Any]) -> str:
        return _shown(one["bytes"], "bytes:")

    return {
        "tokens": [text(one) for one in told],
        "token_logprobs": [one["logprob"] for one in told],
        "top_logprobs": [
            {text(each): each["logprob"] for each in one["likeliest"]} for one in told
        ],
        "text_offset": [places.pass_over(one["bytes"]) for one in told],
    }


def _shown(said: bytes, mark: str) -> str:
    """A token's text; a part of a character is written as OpenAI does, `\\xe2\\x80`."""
    try:
        return said.decode()
    except UnicodeDecodeError:
        return mark + "".join(f"\\x{byte:02x}" for byte in said)


class _Places:
    """Where in a text its tokens begin: in the middle of a character, where that begins."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._letters = 0

    def pass_over(self, said: bytes) -> int:
        """The next token's place."""
        place = self._letters
        self._letters += len(self._decoder.decode(said))
        return place


def _finish(output: Output) -> str:
    return {"eos": "stop", "stop": "stop"}.get(output.stop_reason or "", "length")
