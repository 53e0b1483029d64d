"""The bodies that clients send, as the OpenAI API has them. Unknown fields are refused.

Fields that the API has and leangen cannot honour are declared, so that the answer says so and does
not leave them out silently; those that change nothing in a reply are taken and not used.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from leangen.errors import RequestError
from leangen.families.sampling import MOST_LOGPROBS

Model = Annotated[str, Field(min_length=1, max_length=200)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Priority = Annotated[int, Field(ge=-1000, le=1000)]
Deadline = Annotated[Number, Field(gt=0)] | None

MOST_REPLIES = 16
MOST_TOKENS = 1_000_000
MOST_TEXTS = 2048
MOST_PROMPTS = 64
MOST_TOOLS = 128


class Body(BaseModel):
    """Strict: a number is no string, and what is not known is refused."""

    model_config = ConfigDict(strict=True, extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        """JSON may escape half of a surrogate pair, which is no character."""
        if isinstance(data, bytes):
            raise ValueError("expected JSON, sent as content-type: application/json")
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text holds half of a surrogate pair, which is no Unicode") from None
        return data

    model: Model
    seed: Seed | None = None
    priority: Priority = 0
    """Lower goes first, as in vLLM."""
    defer: bool = False
    """May wait for an hour with cleaner electricity."""
    deadline_s: Deadline = None
    """Seconds after which the reply is of no more use; the server's own limit holds as well."""
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


class StreamOptions(BaseModel):
    """What a stream is to tell."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: Any = None


class TextBody(Body):
    """What completions and chat completions share."""

    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=MOST_TOKENS)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0)] | None = None
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1, le=MOST_REPLIES)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    frequency_penalty: Number | None = None
    presence_penalty: Number | None = None
    logit_bias: dict[str, Annotated[Number, Field(ge=-100, le=100)]] | None = None

    def options(self, max_new_tokens: int | None, seed: int) -> dict[str, Any]:
        """Of the language family's request; what is not given is OpenAI's default."""
        chosen = {
            "max_new_tokens": max_new_tokens,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "logit_bias": _by_token(self.logit_bias),
            "logprobs": self.likeliest(),
        }
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return {
            **{name: value for name, value in chosen.items() if value is not None},
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "stop": tuple(stop),
            "ignore_eos": self.ignore_eos,
            "seed": seed,
        }

    def likeliest(self) -> int | None:
        """How many likeliest tokens are wanted with each token's log-probability, if it is."""
        return None


Length = Annotated[int, Field(ge=1, le=MOST_TOKENS)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, max_length=MOST_TOKENS)]


class CompletionBody(TextBody):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    max_tokens: Length | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None

    def likeliest(self) -> int | None:
        """As the field says; 0 asks for the chosen token's alone."""
        return self.logprobs

    def prompts(self) -> list[dict[str, Any]]:
        """The family's `prompt` or `tokens`, of each prompt."""
        if isinstance(self.prompt, str):
            return [{"prompt": self.prompt}]
        if isinstance(self.prompt[0], int):
            return [{"tokens": self.prompt}]
        name = "prompt" if isinstance(self.prompt[0], str) else "tokens"
        return [{name: each} for each in self.prompt]

    def refuse_unsupported(self) -> None:
        """RequestError for what this server cannot honour."""
        refuse("echo", self.echo)
        refuse("suffix", self.suffix)
        refuse("best_of", None if self.best_of == (self.n or 1) else self.best_of)


class Part(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text"]
    text: str


class Function(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """The JSON schema of its arguments."""
    strict: bool | None = None


class Tool(BaseModel):
    """One of `tools`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: Function


class Called(BaseModel):
    """The function of a call that the model made."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call that the model made, sent back with its result."""

    model_config = ConfigDict(strict=True, extra="forbid")

    id: str
    type: Literal["function"] = "function"
    function: Called

    def plain(self) -> dict[str, Any]:
        """As templates take it: its arguments as JSON, where they are."""
        try:
            arguments = json.loads(self.function.arguments)
        except ValueError:
            arguments = self.function.arguments
        function = {"name": self.function.name, "arguments": arguments}
        return {"id": self.id, "type": self.type, "function": function}


class Named(BaseModel):
    """The name of a function."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str


class Choice(BaseModel):
    """A `tool_choice` of one function."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["function"]
    function: Named


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True, extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(min_length=1)] | None = None
    name: str | None = None
    refusal: None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MOST_TOOLS)] | None = None
    tool_call_id: str | None = None

    def plain(self) -> dict[str, Any]:
        """As the chat template takes it; RequestError for a message without content."""
        content = self.content
        if content is None and not self.tool_calls:
            raise RequestError("a message has no content, expected text")
        parts = content if isinstance(content, list) else []
        text = content if isinstance(content, str) else "".join(part.text for part in parts)
        said = {"role": "system" if self.role == "developer" else self.role, "content": text}
        calls = {"tool_calls": [call.plain() for call in self.tool_calls or ()]}
        return said | (calls if self.tool_calls else {})


class JsonSchema(BaseModel):
    """`response_format.json_schema`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """Text, any JSON object, or JSON of a schema."""

    model_config = ConfigDict(strict=True, extra="forbid")

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_of_reply(self) -> dict[str, Any] | None:
        """The JSON schema that the reply must obey; None for text."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"type": "object"}
        if self.json_schema is None:
            raise RequestError("response_format lacks json_schema: give its schema")
        return self.json_schema.schema_


class ChatBody(TextBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_tokens: Length | None = None
    max_completion_tokens: Length | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Choice | None = None
    parallel_tool_calls: Any = None
    reasoning_effort: Any = None

    def options(self, max_new_tokens: int | None, seed: int) -> dict[str, Any]:
        """As the base, and what the reply must be."""
        wanted = self.response_format
        schema = None if wanted is None else wanted.schema_of_reply()
        constraint = {} if schema is None else {"json_schema": schema}
        return super().options(max_new_tokens, seed) | constraint

    def likeliest(self) -> int | None:
        """As the fields say."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def refuse_unsupported(self) -> None:
        """RequestError for what this server cannot honour."""
        refuse("reasoning_effort", self.reasoning_effort)
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs is set and logprobs is not: set both, or neither")


Text = Annotated[str, Field(min_length=1)]


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_TEXTS)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_TEXTS)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None

    def texts(self) -> dict[str, Any]:
        """The family's `prompt` or `tokens`."""
        if isinstance(self.input, str) or isinstance(self.input[0], str):
            return {"prompt": self.input}
        return {"tokens": [self.input] if isinstance(self.input[0], int) else self.input}


class ImageBody(Body):
    """POST /v1/images/generations."""

    prompt: str = ""
    n: Annotated[int, Field(ge=1, le=MOST_REPLIES)] | None = None
    size: str | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] | None = None
    steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    sampler: str | None = None
    negative_prompt: str | None = None
    guidance: Number | None = None
    """Scale of classifier-free guidance: 1 is none."""
    conditions: dict[str, Number | str] = Field(default_factory=dict)


class SpeechBody(Body):
    """POST /v1/audio/speech."""

    input: Annotated[str, Field(min_length=1, max_length=4096)]
    voice: Annotated[str, Field(max_length=100)] = "default"
    response_format: Literal["wav", "pcm"] = "wav"
    speed: Annotated[Number, Field(ge=0.25, le=4)] = 1.0
    phonemes: bool = False
    """`input` is espeak's IPA and not text."""
    noise_scale: Annotated[Number, Field(ge=0)] | None = None


class FlowSampleBody(Body):
    """POST /v1/flows/sample."""

    count: Annotated[int, Field(ge=1, le=100_000)] = 1


class FlowDensityBody(Body):
    """POST /v1/flows/log_density."""

    rows: Annotated[list[list[Number]], Field(min_length=1, max_length=100_000)]


def _by_token(bias: dict[str, float] | None) -> dict[int, float] | None:
    """A logit bias by token id; JSON has only texts for keys."""
    if bias is None:
        return None
    wrong = next((token for token in bias if not (token.isdecimal() and len(token) < 10)), None)
    if wrong is not None:
        raise RequestError(f"logit_bias has the key {wrong[:20]!r}, expected token ids")
    return {int(token): value for token, value in bias.items()}


def refuse(name: str, value: Any) -> None:
    """RequestError for a field that is set to something and not supported."""
    if value:
        raise RequestError(f"{name} is not supported here: leave it out")
