"""Messages to the prompt that a model was trained on, through its own chat template.

Templates come with the model, so they run in jinja's sandbox, with the helpers and the whitespace
rules of Hugging Face transformers, which they are written for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from leangen import clock
from leangen.errors import BundleError, RequestError

Render = Callable[[Sequence[Mapping[str, str]]], str]


def compile_template(source: str, *, bos_token: str = "", eos_token: str = "") -> Render:
    """A function from messages (`role`, `content`) to the prompt, ending where the reply starts.

    Raises BundleError for a template that does not parse; the function raises RequestError where
    the template refuses the messages.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_refuse, strftime_now=_strftime_now)
    try:
        template = environment.from_string(source)
    except TemplateError as error:
        raise BundleError(
            f"the chat template does not parse ({error}): use a plain prompt"
        ) from None

    def render(messages: Sequence[Mapping[str, str]]) -> str:
        try:
            return template.render(
                messages=[dict(message) for message in messages],
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


def _to_json(value: Any, indent: int | None = None) -> str:
    # jinja's own `tojson` escapes for HTML, which templates for models do not expect.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.fromisoformat(clock.utc_now()).strftime(pattern)
