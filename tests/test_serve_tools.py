"""Tools in a chat: told to the model, calls read from its text, calls that must be made."""

from __future__ import annotations

import json

import httpx
import openai
import pytest
import serving
from gguf_fixtures import Tiny, write
from hypothesis import given, settings
from hypothesis import strategies as st

from leangen.exporters import gguf
from leangen.serve.schemas import Tool
from leangen.serve.tools import Form, Hearing

TEMPLATE = """{% if tools %}Tools: {{ tools | tojson }}
Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call>
{% endif %}{% for message in messages %}{{ message.role }}: {{ message.content }}
{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{% endfor %}{% endfor %}assistant: """
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["days"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
ASKED = [{"role": "user", "content": "hello"}]
TAGGED, BARE = Form(True, "arguments"), Form(False, "parameters")


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    tiny = Tiny(tied=False, template=TEMPLATE, context=1024)
    bundle = gguf.export(write(folder / "tiny.gguf", tiny), folder / "bundle")
    limits = serving.Limits(max_batch=2, context=1024)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LEANGEN_HOME", str(folder / "home"))
        with (
            serving.serving([f"tiny={bundle.path}"], limits=limits) as (address, _),
            openai.OpenAI(
                base_url=f"{address}/v1",
                api_key="none",
                max_retries=0,
                http_client=httpx.Client(trust_env=False),
            ) as opened,
        ):
            yield opened


def ask(client, **options):
    options = {"model": "tiny", "messages": ASKED, "max_tokens": 160, "seed": 1} | options
    return client.chat.completions.create(**options)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_a_call_that_must_be_made_obeys_its_schema(client, choice):
    pytest.importorskip("llguidance", reason="the grammar extra is not installed")
    reply = ask(client, tools=[WEATHER], tool_choice=choice).choices[0]
    assert reply.finish_reason == "tool_calls"
    assert reply.message.content is None
    [call] = reply.message.tool_calls
    assert call.function.name == "weather"
    assert 1 <= json.loads(call.function.arguments)["days"] <= 9
    chunks = list(ask(client, tools=[WEATHER], tool_choice=choice, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert not any(delta.content for delta in deltas)
    [[streamed]] = [delta.tool_calls for delta in deltas if delta.tool_calls]
    assert (streamed.index, streamed.function) == (0, streamed.function)
    assert streamed.function.arguments == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_reply_without_a_call_is_text(client):
    plain = ask(client, tools=[WEATHER, CLOCK], max_tokens=10).choices[0]
    assert plain.finish_reason in ("length", "stop")
    assert plain.message.tool_calls is None
    chunks = ask(client, tools=[WEATHER, CLOCK], max_tokens=10, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == plain.message.content


def test_tools_reach_the_model_unless_they_are_not_to_be_used(client):
    sizes = [
        ask(client, max_tokens=1, **options).usage.prompt_tokens
        for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": [WEATHER]})
    ]
    assert sizes[0] == sizes[1] < sizes[2]


def test_calls_and_results_go_back_to_the_model(client):
    call = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    said = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "noon"},
    ]
    longer = ask(client, messages=said, tools=[CLOCK], max_tokens=1).usage.prompt_tokens
    assert longer > ask(client, tools=[CLOCK], max_tokens=1).usage.prompt_tokens


def test_a_choice_of_no_tool_is_refused(client):
    choice = {"type": "function", "function": {"name": "sun"}}
    with pytest.raises(openai.BadRequestError, match="'sun', which is not among the tools"):
        ask(client, tools=[CLOCK], tool_choice=choice)


@pytest.mark.parametrize(
    ("form", "text", "names"),
    [
        (TAGGED, '<tool_call>\n{"name": "a", "arguments": {"x": 1}}\n</tool_call>', ["a"]),
        (TAGGED, 'Hm. <tool_call>{"name": "a"}</tool_call><tool_call>{"name": "b"}', ["a", "b"]),
        (TAGGED, '{"name": "a", "arguments": {}}', []),
        (TAGGED, "<tool_call>nonsense</tool_call>", []),
        (TAGGED, '<tool_call>{"name": 1}</tool_call>', []),
        (TAGGED, '<tool_call>["a"]</tool_call>', []),
        (BARE, '{"name": "a", "parameters": {"x": 1}}', ["a"]),
        (BARE, 'It is {"name": "a"}', []),
        (BARE, '{"name": "a", "parameters": 3}', []),
    ],
)
def test_calls_are_read(form, text, names):
    calls = form.read(text)
    assert [call["function"]["name"] for call in calls] == names
    for call in calls:
        assert isinstance(json.loads(call["function"]["arguments"]), dict)


@given(st.data())
@settings(max_examples=60)
def test_a_stream_says_what_the_whole_text_says(data):
    form = data.draw(st.sampled_from([TAGGED, BARE]))
    pieces = st.sampled_from(
        ["<tool", "_call>", "</tool_call>", '{"name": "a"}', "{", "}", "hello ", "<", "\n", "a"]
    )
    parts = data.draw(st.lists(pieces, max_size=8))
    hearing = Hearing(form)
    shown = "".join(hearing.push(part) for part in parts)
    rest, calls = hearing.finish()
    text = "".join(parts)
    names = [call["function"]["name"] for call in form.read(text)]
    assert [call["function"]["name"] for call in calls] == names
    if not calls:
        assert shown + rest == text


def test_the_grammar_names_every_tool():
    tools = [Tool.model_validate(tool) for tool in (WEATHER, CLOCK)]
    for form in (TAGGED, BARE):
        grammar = form.grammar(tools)
        assert '"const": "weather"' in grammar and '"const": "clock"' in grammar
