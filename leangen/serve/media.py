"""/v1/images/generations, /v1/audio/speech, /v1/flows/sample and /v1/flows/log_density."""

from __future__ import annotations

import asyncio
import base64
import math
from dataclasses import fields, replace
from datetime import datetime
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

from leangen import clock, families
from leangen import media as files
from leangen.errors import RequestError
from leangen.families import density, latents
from leangen.records import Output, Receipt
from leangen.serve import single
from leangen.serve.calls import Server
from leangen.serve.models import Served
from leangen.serve.schemas import FlowDensityBody, FlowSampleBody, ImageBody, SpeechBody

DRAWING = ("diffusion", "oneshot", "autoregressive/image", "autoregressive/rows")
PCM_HZ = 24_000
"""OpenAI's rate of raw `pcm`; a voice of another rate says its own in the header."""
WAV_HEADER_BYTES = 44
OPENAI_VOICES = tuple("alloy ash ballad coral echo fable nova onyx sage shimmer verse".split())


def router(server: Server) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.post("/v1/images/generations")
    async def images(body: ImageBody, request: Request) -> Response:
        served, reason = await _choose_images(server, body)
        _check_size(served, body, _size(served))
        options: dict[str, Any] = {"count": body.n or 1, "seed": single.seed(body)}
        options |= {"conditions": body.conditions} if body.conditions else {}
        steered = {
            "prompt": body.prompt or None,
            "negative_prompt": body.negative_prompt,
            "steps": body.steps,
            "sampler": body.sampler,
            "guidance": body.guidance,
        }
        options |= {name: value for name, value in steered.items() if value is not None}
        known = {field.name for field in fields(served.family.Request)}
        if strange := [name for name in options if name not in known]:
            raise RequestError(f"{served.name} takes no {strange[0]}: leave it out")
        call = single.call(server, served, request, body, options)
        output = await single.output(call, request, served)
        if output is None:
            return single.nobody()
        pictures = await asyncio.to_thread(_pngs, output, call.receipts[0])
        height, width = np.asarray(output.array).shape[1:3]
        _check_size(served, body, (height, width))
        content = {
            "created": int(datetime.fromisoformat(clock.utc_now()).timestamp()),
            "model": served.name,
            "output_format": "png",
            "size": f"{width}x{height}",
            "data": [{"b64_json": base64.b64encode(png).decode()} for png in pictures],
            "usage": single.usage(call),
        }
        return await single.answer(call, content, reason)

    @routes.post("/v1/audio/speech", response_class=Response)
    async def speech(body: SpeechBody, request: Request) -> Response:
        served, reason = await server.choose(body.model, "flow/speech")
        options = {
            "phonemes" if body.phonemes else "text": body.input,
            "length_scale": served.bundle.config["length_scale"] / body.speed,
            "noise_scale": body.noise_scale,
            "seed": single.seed(body),
            "speaker": _speaker(served, body.voice),
        }
        call = single.call(server, served, request, body, options)
        output = await single.output(call, request, served)
        if output is None:
            return single.nobody()
        raw = body.response_format == "pcm"
        receipt = None if raw else call.receipts[0]
        sound = await asyncio.to_thread(files.encode, output, ".wav", receipt)
        rate_hz = output.sample_rate_hz or PCM_HZ
        kind = f"audio/pcm;rate={rate_hz}" if raw else "audio/wav"
        sound = sound[WAV_HEADER_BYTES:] if raw else sound
        return Response(sound, media_type=kind, headers=single.headers(call, served, reason))

    @routes.post("/v1/flows/sample")
    async def sample(body: FlowSampleBody, request: Request) -> Response:
        served, reason = await server.choose(body.model, "flow/density")
        options = {"count": body.count, "seed": single.seed(body)}
        call = single.call(server, served, request, body, options)
        output = await single.output(call, request, served)
        if output is None:
            return single.nobody()
        content = {
            "model": served.name,
            "columns": list(served.bundle.config["columns"]),
            "rows": await asyncio.to_thread(_rows, output),
            "usage": single.usage(call),
        }
        return await single.answer(call, content, reason)

    @routes.post("/v1/flows/log_density")
    async def log_density(body: FlowDensityBody, request: Request) -> Response:
        """In nats; null outside the flow's support, where the density is 0."""
        served, reason = await server.choose(body.model, "flow/density")
        call = single.call(server, served, request, body, {"data": body.rows})
        output = await single.output(call, request, served)
        if output is None:
            return single.nobody()
        scores = np.asarray(output.array).reshape(len(body.rows), -1).T.tolist()
        content = {
            "model": served.name,
            **{
                name: [_finite(value) for value in column]
                for name, column in zip(output.extra["columns"], scores, strict=True)
            },
            "usage": single.usage(call),
        }
        return await single.answer(call, content, reason)

    return routes


async def _choose_images(server: Server, body: ImageBody) -> tuple[Served, str | None]:
    family = server.models.get(body.model).key
    served, reason = await server.choose(body.model, family if family in DRAWING else "diffusion")
    if families.media(served.bundle) != "image":
        raise RequestError(f"{served.name} encodes images: expected a model that makes them")
    if body.prompt and not served.bundle.config.get("text"):
        raise RequestError(
            f"{served.name} draws from noise and conditions and reads no prompt: send an empty "
            "one, and conditions if it has any"
        )
    if "upscale" in served.bundle.config:
        raise RequestError(f"{served.name} enlarges an image, which this address does not take")
    return served, reason


def _size(served: Served) -> tuple[int, int] | None:
    """(height, width) of what a model draws, where that is known before it has drawn."""
    config = served.bundle.config
    if "size" in config:
        height, width = config["size"]
    elif served.key == "diffusion":
        _, height, width = latents.image_shape(config)
    else:
        return None
    return height, width


def _check_size(served: Served, body: ImageBody, size: tuple[int, int] | None) -> None:
    if size is not None and body.size not in (None, "auto", f"{size[1]}x{size[0]}"):
        raise RequestError(f"size is {body.size!r}: {served.name} draws {size[1]}x{size[0]}")


def _pngs(output: Output, receipt: Receipt) -> list[bytes]:
    images = np.asarray(output.array)
    return [
        files.encode(replace(output, array=images[index : index + 1]), ".png", receipt)
        for index in range(len(images))
    ]


def voices(served: Served) -> list[str]:
    """The speakers of a voice model; those of OpenAI's names stand for them in turn."""
    return list(served.bundle.config.get("speaker_ids") or {})


def _speaker(served: Served, voice: str) -> str | None:
    """The voice's speaker; RequestError for one that it has not."""
    speakers = voices(served)
    if voice in speakers:
        return voice
    if voice in OPENAI_VOICES and speakers:
        return speakers[OPENAI_VOICES.index(voice) % len(speakers)]
    if voice in ("default", served.name, served.bundle.name, *OPENAI_VOICES):
        return None
    raise RequestError(
        f"voice is {voice!r}, expected one of {', '.join(('default', *speakers))}, or a name of "
        "OpenAI's such as alloy"
    )


def _rows(output: Output) -> list[list[float | None]]:
    return [[_finite(value) for value in row] for row in density.as_rows(output.array).tolist()]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
