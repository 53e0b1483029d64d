"""/v1/audio/transcriptions and /v1/audio/translations: a WAV file goes up, its words come back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Request, Response, UploadFile
from fastapi.responses import PlainTextResponse

from leangen import audio
from leangen.errors import RequestError
from leangen.records import Output
from leangen.serve import calls, single
from leangen.serve.calls import Server
from leangen.serve.schemas import Body

Answer = Literal["json", "text", "srt", "verbose_json", "vtt"]
Model = Annotated[str, Form(min_length=1, max_length=200)]
Language = Annotated[str | None, Form(max_length=20)]
Temperature = Annotated[float, Form(ge=0, le=1, allow_inf_nan=False)]


def router(server: Server) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.post("/v1/audio/transcriptions", response_model=None)
    async def transcriptions(
        request: Request,
        file: UploadFile,
        model: Model,
        language: Language = None,
        response_format: Annotated[Answer, Form()] = "json",
        temperature: Temperature = 0.0,
    ) -> Response:
        options = {"language": language, "temperature": temperature}
        return await _written(server, request, file, model, response_format, options)

    @routes.post("/v1/audio/translations", response_model=None)
    async def translations(
        request: Request,
        file: UploadFile,
        model: Model,
        response_format: Annotated[Answer, Form()] = "json",
        temperature: Temperature = 0.0,
    ) -> Response:
        options = {"task": "translate", "temperature": temperature}
        return await _written(server, request, file, model, response_format, options)

    return routes


async def _written(
    server: Server,
    request: Request,
    file: UploadFile,
    model: str,
    response_format: Answer,
    options: dict[str, Any],
) -> Response:
    form = await request.form()
    for name in ("prompt", "stream", "timestamp_granularities[]"):
        if form.get(name) not in (None, "", "false", "segment"):
            raise RequestError(f"{name} is not supported here: leave it out")
    served, reason = await server.choose(model, "seq2seq/transcription")
    samples, rate_hz = await asyncio.to_thread(audio.read_wav, file.file)
    given = {"audio": samples, "sample_rate_hz": rate_hz} | options
    call = single.call(server, served, request, Body(model=model), given)
    output = await single.output(call, request, served)
    if output is None:
        return single.nobody()
    text, seconds = (output.text or "").strip(), float(output.prompt_units)
    if response_format in ("json", "verbose_json"):
        usage = {"type": "duration", "seconds": round(seconds, 3)}
        content: dict[str, Any] = {"text": text, "usage": usage}
        if response_format == "verbose_json":
            content |= {
                "task": options.get("task", "transcribe"),
                "language": output.extra["language"] or "en",
                "duration": seconds,
                "segments": [
                    {"id": number, "start": begin, "end": end, "text": said}
                    for number, (begin, end, said) in enumerate(_segments(output))
                ],
            }
        content["usage"] |= {"energy": calls.energy_usage(call.receipts)}
        return single.answer(call, content, reason)
    if response_format != "text":
        text = _subtitles(_segments(output), web=response_format == "vtt")
    return PlainTextResponse(text + "\n", headers=calls.energy_headers(call.receipts))


def _segments(output: Output) -> list[tuple[float, float, str]]:
    """(begin, end, text) of each window: as fine as the model listens."""
    windows = list(output.extra["windows"])
    ends = [begin for begin, _ in windows[1:]] + [float(output.prompt_units)]
    return [(begin, end, text) for (begin, text), end in zip(windows, ends, strict=True)]


def _subtitles(segments: Sequence[tuple[float, float, str]], *, web: bool) -> str:
    """SubRip, or WebVTT."""
    mark = "." if web else ","
    parts = ["WEBVTT"] if web else []
    for number, (begin, end, text) in enumerate(segments, 1):
        times = f"{_time(begin, mark)} --> {_time(end, mark)}\n{text}"
        parts.append(times if web else f"{number}\n{times}")
    return "\n\n".join(parts)


def _time(seconds: float, mark: str) -> str:
    """`00:01:02,345`."""
    ms = round(seconds * 1000)
    return f"{ms // 3600000:02}:{ms // 60000 % 60:02}:{ms // 1000 % 60:02}{mark}{ms % 1000:03}"
