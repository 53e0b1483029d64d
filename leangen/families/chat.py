"""Messages to the prompt that a model was trained on, through its own chat template.

Templates come with the model, so they run in jinja's sandbox, with the helpers and the whitespace
rules of Hugging Face transformers, which they are written for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from leangen import clock
from leangen.errors import BundleError, RequestError

Messages = Sequence[Mapping[str, Any]]
Render = Callable[[Messages, Messages | None], str]


def compile_template(source: str, *, bos_token: str = "", eos_token: str = "") -> Render:
    """A function from messages (`role`, `content`) and tools (JSON schemas of functions, or None)
    to the prompt, ending where the reply starts.

    Raises BundleError for a template that does not parse; the function raises RequestError where
    the template refuses the messages.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise BundleError(
            f"the chat template does not parse ({error}): use a plain prompt"
        ) from None

    def render(messages: Messages, tools: Messages | None = None) -> str:
        try:
            return template.render(
                # Plain copies: a template sees no object of ours.
                messages=json.loads(json.dumps([*messages])),
                tools=json.loads(json.dumps(tools and [*tools])),
                documents=None,
                add_generation_prompt=True,
                bos_token=bos_token,
                eos_token=eos_token,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise RequestError(
                f"the model's chat template refuses these messages: {error}; "
                "change their roles or order, or use a plain prompt"
            ) from None

    return render


class _Generation(Extension):
    """`{% generation %}` marks what the model said, for training: here it is only its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own `tojson` escapes for HTML, which templates for models do not expect.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    # Local time: templates tell the model what day it is.
    return datetime.fromisoformat(clock.utc_now()).astimezone().strftime(pattern)
