"""/v1/audio/transcriptions and /v1/audio/translations: a WAV file goes up, its words come back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Request, Response, UploadFile
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from leangen import audio
from leangen.records import Output
from leangen.serve import calls, single
from leangen.serve.calls import Server
from leangen.serve.schemas import Body, Deadline, Model, Number, Priority, refuse


class Sound(BaseModel):
    """POST /v1/audio/translations: a form."""

    model_config = ConfigDict(extra="forbid")

    file: UploadFile
    model: Model
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] = "json"
    temperature: Annotated[Number, Field(ge=0, le=1)] = 0.0
    prompt: str | None = None
    stream: bool = False
    priority: Priority = 0
    defer: bool = False
    deadline_s: Deadline = None

    def options(self) -> dict[str, Any]:
        """Of the family's request."""
        return {"task": "translate", "temperature": self.temperature}

    def schedule(self) -> Body:
        """When it is to be carried out."""
        return Body(
            model=self.model,
            priority=self.priority,
            defer=self.defer,
            deadline_s=self.deadline_s,
        )


class Speech(Sound):
    """POST /v1/audio/transcriptions."""

    language: Annotated[str, Field(max_length=20)] | None = None
    granularities: Annotated[
        list[Literal["segment"]], Field(alias="timestamp_granularities[]")
    ] = []

    def options(self) -> dict[str, Any]:
        """Of the family's request."""
        return {"language": self.language, "temperature": self.temperature}


_FORM = Form(media_type="multipart/form-data")


def router(server: Server) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.post("/v1/audio/transcriptions", response_model=None)
    async def transcriptions(request: Request, form: Annotated[Speech, _FORM]) -> Response:
        return await _written(server, request, form)

    @routes.post("/v1/audio/translations", response_model=None)
    async def translations(request: Request, form: Annotated[Sound, _FORM]) -> Response:
        return await _written(server, request, form)

    return routes


async def _written(server: Server, request: Request, form: Sound) -> Response:
    refuse("prompt", form.prompt)
    refuse("stream", form.stream)
    options, shape = form.options(), form.response_format
    served, reason = await server.choose(form.model, "seq2seq/transcription")
    samples, rate_hz = await asyncio.to_thread(audio.read_wav, form.file.file)
    given = {"audio": samples, "sample_rate_hz": rate_hz} | options
    call = single.call(server, served, request, form.schedule(), given)
    output = await single.output(call, request, served)
    if output is None:
        return single.nobody()
    text, seconds = (output.text or "").strip(), float(output.prompt_units)
    if shape in ("json", "verbose_json"):
        usage = {"type": "duration", "seconds": round(seconds, 3)}
        content: dict[str, Any] = {"text": text, "usage": usage}
        if shape == "verbose_json":
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
        return await single.answer(call, content, reason)
    if shape != "text":
        text = _subtitles(_segments(output), web=shape == "vtt")
    return PlainTextResponse(text + "\n", headers=single.headers(call, served, reason))


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
