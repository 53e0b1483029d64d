"""The server, asked by the official OpenAI client and by plain HTTP."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import urllib.error
import urllib.request
import wave
from http.client import HTTPConnection

import httpx
import numpy as np
import openai
import pytest
import serving
from PIL import Image

from leangen import audio
from leangen.serve import text

CHAT = [{"role": "user", "content": "hello world"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return serving.bundles(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def running(models, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEANGEN_HOME", str(tmp_path_factory.mktemp("served")))
        with serving.serving(models) as (address, server):
            yield address, server


@pytest.fixture
def client(running):
    with openai.OpenAI(
        base_url=f"{running[0]}/v1",
        api_key="none",
        max_retries=0,
        http_client=httpx.Client(trust_env=False, verify=False),
    ) as client:
        yield client


@pytest.fixture
def http(running):
    with httpx.Client(base_url=running[0], trust_env=False, timeout=30, verify=False) as client:
        yield client


def kept(running, receipt_id):
    return running[1].ledger.receipt(receipt_id)


def test_chat(client, running):
    reply = client.chat.completions.create(
        model="tiny-text", messages=CHAT, max_tokens=8, temperature=0
    )
    assert reply.choices[0].message.role == "assistant"
    assert reply.choices[0].finish_reason in ("length", "stop")
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    energy = reply.usage.energy
    [receipt_id] = energy["receipts"]
    receipt = kept(running, receipt_id)
    assert receipt["energy"]["gross_j"] == energy["joules"] > 0
    assert receipt["energy"]["source"] == energy["source"]
    assert receipt["units"]["count"] == reply.usage.completion_tokens


def test_a_stream_joins_to_the_whole_reply(client, running):
    asked = {"model": "tiny-text", "messages": CHAT, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert deltas[0].role == "assistant"
    [end] = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
    assert end == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert kept(running, chunks[-1].usage.energy["receipts"][0])
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_completions_of_several_prompts_and_replies(client):
    reply = client.completions.create(
        model="tiny-text", prompt=["hello", "world 1"], n=2, max_tokens=5, seed=3
    )
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert len(reply.usage.energy["receipts"]) == 4
    again = client.completions.create(
        model="tiny-text", prompt=["hello", "world 1"], n=2, max_tokens=5, seed=3
    )
    assert [c.text for c in again.choices] == [c.text for c in reply.choices]
    alone = client.completions.create(model="tiny-text", prompt="world 1", max_tokens=5, seed=4)
    assert alone.choices[0].text == reply.choices[3].text
    by_tokens = client.completions.create(
        model="tiny-text", prompt=[3, 4, 5], max_tokens=4, extra_body={"ignore_eos": True}
    )
    assert by_tokens.usage.prompt_tokens == 3
    assert by_tokens.usage.completion_tokens == 4


def test_prompts_may_be_tokens(client):
    asked = {"model": "tiny-text", "max_tokens": 3, "temperature": 0}
    prompts = [[5, 6, 7], [8]]
    together = client.completions.create(**asked, prompt=prompts)
    alone = [client.completions.create(**asked, prompt=prompt) for prompt in prompts]
    assert [c.text for c in together.choices] == [reply.choices[0].text for reply in alone]
    assert together.usage.prompt_tokens == sum(reply.usage.prompt_tokens for reply in alone)


def test_stop_strings_end_a_reply(client):
    asked = {"model": "tiny-text", "prompt": "hello", "max_tokens": 30, "seed": 1}
    text = client.completions.create(**asked, extra_body={"ignore_eos": True}).choices[0].text
    stop = text[3:5]
    stopped = client.completions.create(**asked, stop=stop, extra_body={"ignore_eos": True})
    assert stopped.choices[0].text == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_logprobs(client):
    asked = {"model": "tiny-text", "temperature": 0, "max_tokens": 4}
    reply = client.chat.completions.create(
        **asked, messages=CHAT, logprobs=True, top_logprobs=3
    ).choices[0]
    for token in reply.logprobs.content:
        assert len(token.top_logprobs) == 3
        assert token.logprob == token.top_logprobs[0].logprob <= 0  # greedy
    plain = client.completions.create(**asked, prompt="hello", logprobs=2).choices[0]
    assert len(plain.logprobs.tokens) == len(plain.logprobs.token_logprobs)
    assert plain.text.startswith(plain.logprobs.tokens[0])


def test_logprobs_are_streamed_with_their_tokens(client):
    asked = {"model": "tiny-text", "max_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(
        **asked, messages=CHAT, logprobs=True, top_logprobs=2
    ).choices[0]
    chunks = list(
        client.chat.completions.create(
            **asked, messages=CHAT, logprobs=True, top_logprobs=2, stream=True
        )
    )
    parts = [chunk.choices[0].logprobs for chunk in chunks]
    streamed = [token for part in parts if part for token in part.content]
    assert streamed == whole.logprobs.content
    plain = client.completions.create(**asked, prompt="hello", logprobs=2).choices[0].logprobs
    parts = [
        chunk.choices[0].logprobs
        for chunk in client.completions.create(**asked, prompt="hello", logprobs=2, stream=True)
    ]
    for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        joined = [value for part in parts if part for value in getattr(part, name)]
        assert joined == getattr(plain, name)


def test_the_bytes_of_tokens_that_are_parts_of_a_character_join_to_the_text(client):
    # The three bytes of 日, of which each is a token; a bias makes their order certain.
    asked = {"model": "tiny-text", "max_tokens": 1, "temperature": 0}
    parts = []
    for token in (165, 248, 101):
        asked["logit_bias"] = {token: 100}
        chosen = client.chat.completions.create(**asked, messages=CHAT, logprobs=True).choices[0]
        [told] = chosen.logprobs.content
        parts += told.bytes
        assert told.token == f"\\x{told.bytes[0]:02x}"
        plain = client.completions.create(**asked, prompt="hello", logprobs=1).choices[0].logprobs
        assert plain.tokens == [f"bytes:{told.token}"]
    assert bytes(parts).decode() == "日"


def test_each_token_has_its_place_in_the_text():
    places = text._Places()
    tokens = [b"\xe6", b"\x97\xa5", b"a", b"\xf0\x9f", b"\x98\x80", b"!"]  # 日a😀!
    assert [places.pass_over(token) for token in tokens] == [0, 0, 1, 2, 2, 3]


def test_a_reply_that_must_be_json(client):
    pytest.importorskip("llguidance", reason="the grammar extra is not installed")
    schema = {
        "type": "object",
        "properties": {"yes": {"type": "boolean"}},
        "required": ["yes"],
        "additionalProperties": False,
    }
    reply = client.chat.completions.create(
        model="tiny-text",
        messages=CHAT,
        max_tokens=60,
        seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    ).choices[0]
    assert reply.finish_reason in ("stop", "length")
    if reply.finish_reason == "stop":
        assert json.loads(reply.message.content)["yes"] in (True, False)
    assert reply.message.content.lstrip().startswith("{")


def test_penalties_and_biases_reach_the_choice(client):
    asked = {"model": "tiny-text", "prompt": "hello", "max_tokens": 6, "temperature": 0}
    options = {"extra_body": {"ignore_eos": True}}
    plain = client.completions.create(**asked, **options).choices[0].text
    biased = client.completions.create(**asked, logit_bias={"40": 100}, **options).choices[0].text
    assert len(set(biased)) == 1
    assert biased != plain


def test_a_shared_beginning_is_computed_once(client):
    asked = {"model": "tiny-text", "max_tokens": 2, "temperature": 0}
    prompt = "12 world hello " * 9
    first = client.completions.create(**asked, prompt=prompt)
    second = client.completions.create(**asked, prompt=prompt)
    assert second.usage.prompt_tokens_details.cached_tokens >= 32
    assert second.choices[0].text == first.choices[0].text


def test_langchain(running):
    chat_openai = pytest.importorskip("langchain_openai", reason="langchain is not installed")
    model = chat_openai.ChatOpenAI(
        base_url=f"{running[0]}/v1",
        api_key="none",
        model="tiny-text",
        max_tokens=6,
        temperature=0,
        http_client=httpx.Client(trust_env=False, verify=False),
    )
    whole = model.invoke("hello world")
    assert whole.usage_metadata["output_tokens"] > 0
    assert "".join(chunk.content for chunk in model.stream("hello world")) == whole.content


def test_many_at_once_say_what_each_says_alone(running, models):
    import asyncio

    async def ask(prompts):
        async with openai.AsyncOpenAI(
            base_url=f"{running[0]}/v1",
            api_key="none",
            http_client=httpx.AsyncClient(trust_env=False, timeout=60),
        ) as client:
            calls = [
                client.completions.create(
                    model="tiny-text",
                    prompt=prompt,
                    max_tokens=20,
                    temperature=0,
                    extra_body={"ignore_eos": True},
                )
                for prompt in prompts
            ]
            return await asyncio.gather(*calls)

    prompts = [f"hello {n} world" * (1 + n % 3) for n in range(12)]
    together = asyncio.run(ask(prompts))
    for prompt, reply in zip(prompts, together, strict=True):
        [alone] = asyncio.run(ask([prompt]))
        assert alone.choices[0].text == reply.choices[0].text
    shared = [kept(running, reply.usage.energy["receipts"][0]) for reply in together]
    assert any("shared by computing time" in r["energy"]["reason"] for r in shared)
    assert all(r["begin_boottime_ns"] is None for r in shared if "shared" in r["energy"]["reason"])


def test_embeddings(client, http, running):
    texts = ["w1 w2 w3", "w4"]
    reply = client.embeddings.create(model="tiny-vectors", input=texts)  # as base64
    assert [entry.index for entry in reply.data] == [0, 1]
    assert reply.usage.prompt_tokens == reply.usage.total_tokens == 4
    receipt = kept(running, reply.usage.energy["receipts"][0])
    assert receipt["family"] == "embedding"
    assert receipt["units"]["count"] == 4
    assert "w1" not in json.dumps(receipt)
    for given in (texts[0], [[1, 2, 3]], [1, 2, 3]):
        asked = {"model": "tiny-vectors", "input": given, "encoding_format": "float"}
        [plain] = http.post("/v1/embeddings", json=asked).json()["data"]
        assert plain["embedding"] == pytest.approx(reply.data[0].embedding, abs=1e-6)
        assert sum(value**2 for value in plain["embedding"]) == pytest.approx(1, abs=1e-5)


def test_an_encoder_decoder_completes_too(client, running):
    asked = {"model": "tiny-translator", "prompt": "hello", "max_tokens": 4, "temperature": 0}
    whole = client.completions.create(**asked)
    chunks = client.completions.create(**asked, stream=True)
    text = "".join(chunk.choices[0].text for chunk in chunks)
    assert text == whole.choices[0].text
    assert kept(running, whole.usage.energy["receipts"][0])["family"] == "seq2seq"


def test_images(client, running):
    for model, size, units in (("tiny-image", 8, 2), ("tiny-shot", 8, 2), ("tiny-pixels", 6, 72)):
        reply = client.images.generate(model=model, prompt="", n=2, extra_body={"seed": 5})
        first, second = (
            Image.open(io.BytesIO(base64.b64decode(image.b64_json))) for image in reply.data
        )
        assert first.size == second.size == (size, size)
        assert first.tobytes() != second.tobytes()
        [receipt_id] = reply.usage.energy["receipts"]
        assert kept(running, receipt_id)["units"]["count"] == units
        assert json.loads(first.text["Comment"])["id"] == receipt_id


def test_a_size_that_a_model_does_not_draw_costs_nothing(client, running):
    before = len(running[1].ledger.entries())
    for model, size in (("tiny-image", "8x8"), ("tiny-pixels", "6x6")):
        with pytest.raises(openai.BadRequestError, match=f"draws {size}"):
            client.images.generate(model=model, prompt="", size="1024x1024")
    assert len(running[1].ledger.entries()) == before


def test_speech(client, running):
    with client.audio.speech.with_streaming_response.create(
        model="tiny-voice",
        voice="default",
        input="abc ab.",
        response_format="wav",
        extra_body={"phonemes": True, "seed": 1},
    ) as reply:
        sound = reply.read()
        headers = reply.headers
    with wave.open(io.BytesIO(sound)) as file:
        assert file.getnframes() > 0
        assert file.getnchannels() == 1
    assert float(headers["x-leangen-energy-joules"]) > 0
    asked = {"model": "tiny-voice", "input": "abc ab.", "extra_body": {"phonemes": True, "seed": 1}}
    named = client.audio.speech.create(**asked, voice="alloy", response_format="wav")
    with wave.open(io.BytesIO(sound)) as file, wave.open(io.BytesIO(named.content)) as again:
        assert file.readframes(file.getnframes()) == again.readframes(again.getnframes())
    with pytest.raises(openai.BadRequestError, match="expected one of default"):
        client.audio.speech.create(**asked, voice="bob", response_format="wav")
    receipt_id = headers["x-leangen-receipt"]
    assert kept(running, receipt_id)["family"] == "flow"
    assert receipt_id.encode() in sound  # the file tells what it cost, raw samples cannot
    raw = client.audio.speech.create(**asked, voice="default", response_format="pcm")
    with wave.open(io.BytesIO(sound)) as file:
        assert raw.content == file.readframes(file.getnframes())


def test_transcriptions(client, http, running):
    sound = audio.wav_bytes(np.sin(np.arange(24_000) / 10), 16_000)
    asked = {"model": "tiny-ears", "file": ("sound.wav", sound)}
    heard = client.audio.transcriptions.create(**asked)
    again = client.audio.transcriptions.create(**asked, response_format="verbose_json")
    assert again.text == heard.text
    assert again.duration == pytest.approx(1.5)
    assert again.segments[0].start == 0
    assert again.segments[-1].end == again.duration
    receipt = kept(running, heard.usage.energy["receipts"][0])
    assert receipt["units"] == {"kind": "audio-second", "count": 1.5, "prompt": 1.5}
    plain = client.audio.transcriptions.create(**asked, response_format="text")
    assert plain.strip() == heard.text
    times = client.audio.transcriptions.create(**asked, response_format="srt")
    assert times.startswith("1\n00:00:00,000 --> 00:00:01,")
    web = client.audio.transcriptions.create(**asked, response_format="vtt")
    assert web.startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.")


def test_bad_uploads_get_openais_error_shape(http):
    sound = audio.wav_bytes(np.zeros(1600), 16_000)
    for data, content, says in (
        ({"model": "tiny-ears"}, b"no sound", "as PCM WAV"),
        ({"model": "tiny-text"}, sound, "family language"),
        ({"model": "tiny-ears", "response_format": "mp3"}, sound, "response_format"),
        ({"model": "tiny-ears", "temperature": "hot"}, sound, "temperature"),
        ({"model": "tiny-ears", "prompt": "names"}, sound, "prompt is not supported"),
        ({"model": "tiny-ears", "language": "de"}, sound, "de"),
        ({"model": "tiny-ears"}, audio.wav_bytes(np.zeros(160), 1), "has 1 samples a second"),
        ({"model": "tiny-ears"}, audio.wav_bytes(np.zeros(160), 2**31 - 1), "2147483647 samples"),
        ({"model": "tiny-ears", "colour": "red"}, sound, "colour is not known here"),
        ({"model": "tiny-ears", "defer": "true"}, sound, "--intensity"),
        ({"model": "tiny-ears", "deadline_s": "0"}, sound, "deadline_s"),
        (
            {"model": "tiny-ears", "timestamp_granularities[]": ["word", "segment"]},
            sound,
            "timestamp_granularities",
        ),
        ({}, sound, "model"),
    ):
        reply = http.post("/v1/audio/transcriptions", data=data, files={"file": ("a", content)})
        assert reply.status_code == 400, reply.text
        assert says in reply.json()["error"]["message"]
    missing = http.post("/v1/audio/transcriptions", data={"model": "tiny-ears", "file": "text"})
    assert missing.status_code == 400
    assert missing.json()["error"]["param"] == "file"


def test_flows(http, running):
    drawn = http.post("/v1/flows/sample", json={"model": "tiny-flow", "count": 5, "seed": 1}).json()
    assert len(drawn["rows"]) == 5
    assert len(drawn["rows"][0]) == len(drawn["columns"]) == 3
    scored = http.post(
        "/v1/flows/log_density", json={"model": "tiny-flow", "rows": [*drawn["rows"], [99, 99, 99]]}
    ).json()
    assert all(isinstance(value, float) for value in scored["log_density"][:-1])
    assert scored["log_density"][-1] is None
    assert kept(running, scored["usage"]["energy"]["receipts"][0])


def test_models_and_receipts(client, http):
    assert {model.id for model in client.models.list()} == set(serving.NAMES.values())
    assert client.models.retrieve("tiny-text").id == "tiny-text"
    reply = client.completions.create(model="tiny-text", prompt="hello", max_tokens=2)
    [receipt_id] = reply.usage.energy["receipts"]
    assert http.get(f"/v1/receipts/{receipt_id}").json()["schema"] == "leangen.receipt/1"
    assert http.get(f"/v1/receipts/{'0' * 32}").status_code == 404
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"status": "ready"}


def test_metrics(http, client):
    client.completions.create(model="tiny-text", prompt="hello", max_tokens=4)
    text = http.get("/metrics").text
    for name in (
        'leangen_num_requests_running{model_name="tiny-text"} 0.0',
        'leangen_time_to_first_token_seconds_count{model_name="tiny-text"}',
        'leangen_generation_tokens_total{model_name="tiny-text"}',
        'leangen_serving_energy_joules_total{source="estimated"}',
        "leangen_energy_joules_total",
        "leangen_kv_cache_usage_perc",
    ):
        assert name in text


def test_the_page_needs_nothing_from_elsewhere(http):
    page = http.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http://" not in page.text.replace("http://www.w3.org", "")
    assert "https://" not in page.text


def test_json_that_is_sent_as_something_else_is_told_apart(http):
    reply = http.post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})
    assert reply.status_code == 400
    assert "content-type: application/json" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/v1/completions", b"{nonsense", 400, "JSON"),
        ("/v1/completions", b"[]", 400, "JSON object"),
        ("/v1/completions", {"model": "tiny-text"}, 400, "prompt"),
        ("/v1/completions", {"model": "no", "prompt": "a"}, 404, "not served here"),
        ("/v1/completions", {"model": "../../etc/passwd", "prompt": "a"}, 404, "not served here"),
        ("/v1/completions", {"model": "tiny-text", "prompt": ""}, 400, "empty"),
        ("/v1/completions", {"model": "tiny-text", "prompt": "a " * 500}, 400, "shorten"),
        ("/v1/completions", {"model": "tiny-text", "prompt": [999999]}, 400, "vocabulary"),
        ("/v1/completions", {"model": "tiny-text", "prompt": "a", "max_tokens": "9"}, 400, "int"),
        ("/v1/completions", {"model": "tiny-text", "prompt": "a", "n": 99}, 400, "less than"),
        ("/v1/completions", b'{"model": "tiny-text", "prompt": "\\ud800"}', 400, "surrogate"),
        ("/v1/completions", b'{"model": "tiny-text", "prompt": "\xff"}', 400, "body"),
        ("/v1/completions", b"[" * 100_000, 400, "body"),
        (
            "/v1/completions",
            {"model": "tiny-text", "prompt": "a", "max_tokens": 10**30},
            400,
            "less than",
        ),
        ("/v1/completions", {"model": "tiny-text", "prompt": "a", "bogus": 1}, 400, "bogus"),
        (
            "/v1/completions",
            {"model": "tiny-text", "prompt": "a", "logprobs": 99},
            400,
            "less than",
        ),
        (
            "/v1/completions",
            {"model": "tiny-text", "prompt": "a", "logit_bias": {"x": 1}},
            400,
            "token ids",
        ),
        ("/v1/completions", {"model": "tiny-text", "prompt": "a", "defer": True}, 400, "defer"),
        ("/v1/completions", {"model": "tiny-image", "prompt": "a"}, 400, "family diffusion"),
        ("/v1/chat/completions", {"model": "tiny-text", "messages": []}, 400, "messages"),
        (
            "/v1/chat/completions",
            {"model": "tiny-text", "messages": CHAT, "response_format": {"type": "json_schema"}},
            400,
            "lacks json_schema",
        ),
        (
            "/v1/chat/completions",
            {"model": "tiny-text", "messages": CHAT, "tools": [{"type": "function"}]},
            400,
            "tools.0.function",
        ),
        (
            "/v1/chat/completions",
            {
                "model": "tiny-text",
                "messages": CHAT,
                "tools": [{"type": "function", "function": {"name": "f"}}],
            },
            400,
            "no tools in its chat template",
        ),
        (
            "/v1/chat/completions",
            {"model": "tiny-text", "messages": [{"role": "user"}]},
            400,
            "has no content",
        ),
        ("/v1/completions", {"model": "tiny-vectors", "prompt": "a"}, 400, "family embedding"),
        ("/v1/embeddings", {"model": "tiny-text", "input": "a"}, 400, "family language"),
        ("/v1/embeddings", {"model": "tiny-vectors", "input": []}, 400, "input"),
        ("/v1/embeddings", {"model": "tiny-vectors", "input": ["a", 1]}, 400, "input"),
        ("/v1/embeddings", {"model": "tiny-vectors", "input": "w1 " * 99}, 400, "99 tokens"),
        ("/v1/embeddings", {"model": "tiny-vectors", "input": [999]}, 400, "vocabulary"),
        (
            "/v1/embeddings",
            {"model": "tiny-vectors", "input": "a", "dimensions": 8},
            400,
            "have 64",
        ),
        ("/v1/images/generations", {"model": "tiny-image", "prompt": "a cat"}, 400, "no prompt"),
        ("/v1/images/generations", {"model": "tiny-pixels", "steps": 3}, 400, "takes no steps"),
        ("/v1/images/generations", {"model": "tiny-text"}, 400, "family language"),
        (
            "/v1/completions",
            {"model": "tiny-translator", "prompt": "a", "logprobs": 1},
            400,
            "no log-probabilities",
        ),
        ("/v1/images/generations", {"model": "tiny-image", "conditions": {"x": 1}}, 400, "'x'"),
        (
            "/v1/audio/speech",
            {"model": "tiny-voice", "input": "a", "voice": "bob"},
            400,
            "voice is 'bob'",
        ),
        ("/v1/flows/sample", {"model": "tiny-flow", "count": 10**9}, 400, "less than"),
        ("/v1/flows/log_density", {"model": "tiny-flow", "rows": [[1]]}, 400, "shape"),
        ("/v1/flows/log_density", {"model": "tiny-flow", "rows": "/etc/passwd"}, 400, "list"),
        ("/v1/nothing", {}, 404, "Not Found"),
        ("/v1/completions", b'{"model":', 400, "not JSON: Expecting value at character 9"),
        ("/v1/completions", b"", 400, "body is empty"),
        ("/v1/flows/log_density", {"model": "tiny-flow", "rows": [[1], [1, 2]]}, 400, "3 numbers"),
        (
            "/v1/chat/completions",
            {"model": "tiny-text", "messages": CHAT, "top_logprobs": 2},
            400,
            "logprobs is not",
        ),
    ],
)
def test_bad_requests_get_openais_error_shape(http, path, body, status, says):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = http.post(path, content=content, headers={"content-type": "application/json"})
    error = reply.json()["error"]
    assert reply.status_code == status, error
    assert set(error) == {"message", "type", "param", "code"}
    assert says in error["message"]
    assert "Traceback" not in reply.text


@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        ({"colour": "red"}, "colour", "is not known here: leave it out"),
        ({"prompt": [1, -2]}, "prompt.1", "greater than or equal to 0"),
        ({"prompt": ["a", 1]}, "prompt.1", "valid string"),
        ({"prompt": [[1], [2, "a"]]}, "prompt.1.1", "valid integer"),
        ({"prompt": []}, "prompt", "at least 1"),
        ({"prompt": {"a": 1}}, "prompt", "valid string"),
        ({"stop": ["a"] * 17}, "stop", "at most 16"),
        ({"stream_options": {"x": 1}}, "stream_options.x", "not known here"),
    ],
)
def test_what_is_wrong_with_a_value_is_named_by_its_place(http, asked, param, says):
    reply = http.post("/v1/completions", json={"model": "tiny-text", "prompt": "a"} | asked)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param
    assert says in reply.json()["error"]["message"]


def test_a_part_of_a_message_that_is_no_text_is_named(http):
    picture = {"type": "image_url", "image_url": {"url": "x"}}
    asked = {"model": "tiny-text", "messages": [{"role": "user", "content": [picture]}]}
    error = http.post("/v1/chat/completions", json=asked).json()["error"]
    assert error["param"] == "messages.0.content.0.type"


def test_the_openai_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError, match="shorten the prompt"):
        client.completions.create(model="tiny-text", prompt="a " * 500)


def test_a_stream_that_cannot_begin_has_its_own_status(client):
    with pytest.raises(openai.BadRequestError, match="shorten the prompt"):
        client.completions.create(model="tiny-text", prompt="a " * 500, stream=True)


def test_the_host_must_be_this_machine(http):
    reply = http.get("/v1/models", headers={"host": "evil.example"})
    assert reply.status_code == 400
    assert "not this machine" in reply.json()["error"]["message"]


def test_no_page_of_another_site_can_ask(http):
    for origin in ("http://evil.example", "http://localhost.evil.example:80", "null"):
        reply = http.post(
            "/v1/audio/transcriptions",
            data={"model": "tiny-ears"},
            files={"file": audio.wav_bytes(np.zeros(160), 16_000)},
            headers={"origin": origin},
        )
        assert reply.status_code == 400
        assert "may not ask" in reply.json()["error"]["message"]
        assert "access-control-allow-origin" not in reply.headers
    own = http.get("/v1/models", headers={"origin": f"http://localhost:{http.base_url.port}"})
    assert own.status_code == 200
    assert "access-control-allow-origin" not in own.headers


def test_a_huge_body_is_refused_before_it_is_read(http):
    connection = HTTPConnection(http.base_url.host, http.base_url.port, timeout=30)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("content-length", "3000000")
    connection.endheaders()  # and nothing after them
    stated = connection.getresponse()
    assert stated.status == 413
    assert json.loads(stated.read())["error"]["code"] == "request_too_large"
    connection.close()

    def megabytes():
        for _ in range(100):
            yield b"x" * 1_000_000

    unstated = http.post("/v1/completions", content=megabytes())
    assert unstated.status_code == 413
    # A client that sends all before it reads sees the answer too.
    whole = urllib.request.Request(f"{http.base_url}/v1/completions", bytes(100_000_000))
    with pytest.raises(urllib.error.HTTPError) as met:
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(whole, timeout=30)
    assert met.value.code == 413
    assert json.loads(met.value.read())["error"]["code"] == "request_too_large"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_schema_names_the_models(http):
    for _ in range(2):
        schemas = http.get("/openapi.json").json()["components"]["schemas"]
        asked = [body["properties"] for body in schemas.values() if "properties" in body]
        named = [set(fields["model"]["enum"]) for fields in asked if "model" in fields]
        assert named and all(names == set(serving.NAMES.values()) for names in named)


def test_curl(running):
    def curl(path, body, *options):
        command = ["curl", "-sN", f"{running[0]}{path}", "-H", "content-type: application/json"]
        command += ["-d", json.dumps(body), *options]
        done = subprocess.run(command, capture_output=True, check=True, timeout=60)
        return done.stdout.decode()

    asked = {"model": "tiny-text", "messages": CHAT, "max_tokens": 5, "temperature": 0}
    whole = json.loads(curl("/v1/chat/completions", asked))
    assert whole["usage"]["energy"]["joules"] > 0
    lines = curl("/v1/chat/completions", asked | {"stream": True}).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines[:-2]]
    text = "".join(delta.get("content") or "" for delta in deltas)
    assert text == whole["choices"][0]["message"]["content"]
    headers = curl("/v1/images/generations", {"model": "tiny-image"}, "-D", "-", "-o", "/dev/null")
    assert re.search(r"x-leangen-energy-joules: [\d.]+", headers)
