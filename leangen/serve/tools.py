"""Tools in a chat: told to the model through its template, and read from what it says.

Two forms are known, by the model's own template: `<tool_call>{"name": ..., "arguments": {...}}
</tool_call>` (Hermes, Qwen, SmolLM3), and the JSON object alone (Llama). A call that must be made
(`tool_choice` `required`, or a function's name) is held to its form and to the function's schema by
a grammar, which takes the extra `grammar`; where the model may choose, its text is read.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from leangen.errors import RequestError
from leangen.serve.models import Served
from leangen.serve.schemas import ChatBody, Choice, Tool

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_CALL = re.compile(rf"{OPEN}\s*(.*?)\s*(?:{CLOSE}|$)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Form:
    """How a model writes its calls."""

    tagged: bool
    arguments: str
    """The key that holds them."""

    def grammar(self, tools: Sequence[Tool]) -> str:
        """Exactly one call of one of these, in the syntax of Lark as llguidance takes it."""
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool.function.name},
                    self.arguments: tool.function.parameters or {"type": "object"},
                },
                "required": ["name", self.arguments],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        # Else a small model may go on with blanks for ever.
        schema = {"anyOf": calls, "x-guidance": {"whitespace_flexible": False}}
        call = f"%json {json.dumps(schema)}"
        if not self.tagged:
            return f"start: {call}"
        return f'start: "{OPEN}\\n" call "\\n{CLOSE}"\ncall: {call}'

    def read(self, text: str) -> list[dict[str, Any]]:
        """The calls in a reply as the API has them; none where it is plain text."""
        parts = _CALL.findall(text) if self.tagged else [text]
        calls = []
        for part in parts:
            try:
                said = json.loads(part)
            except ValueError:
                continue
            match said:
                case {"name": str(name)} if isinstance(said.get(self.arguments, {}), dict):
                    function = {
                        "name": name,
                        "arguments": json.dumps(said.get(self.arguments, {}), ensure_ascii=False),
                    }
                    calls.append(
                        {
                            "id": f"call_{uuid.uuid4().hex[:24]}",
                            "type": "function",
                            "function": function,
                        }
                    )
        return calls


@dataclass(frozen=True, slots=True)
class Tools:
    """What a request says of tools."""

    form: Form
    told: list[dict[str, Any]]
    """For the template."""
    lark: str | None
    """The grammar of a call that must be made."""


class Hearing:
    """A streamed reply, of which what may be a call is held back."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self._held = ""
        self._said = False

    def push(self, text: str) -> str:
        """More text; what of the reply is surely no call."""
        self._held += text
        begin = OPEN if self._form.tagged else "{"
        at = self._held.find(begin)
        if at < 0:
            at = len(self._held) - _overlap(self._held, begin)
        if not self._form.tagged and (self._said or self._held[:at].strip()):
            at = len(self._held)  # a JSON object within a text is no call
        shown, self._held = self._held[:at], self._held[at:]
        self._said = self._said or bool(shown.strip())
        return shown

    def finish(self) -> tuple[str, list[dict[str, Any]]]:
        """What is left of the text, and the calls."""
        calls = self._form.read(self._held)
        return ("" if calls else self._held), calls


def of(body: ChatBody, served: Served) -> Tools | None:
    """The tools of a request; None where it has none, or the model is not to use them.

    Raises RequestError where the model's template has no place for tools, and for a choice that
    names none of them.
    """
    if not body.tools or body.tool_choice == "none":
        return None
    template = served.bundle.config.get("chat_template")
    form = None if template is None else _form(served.bundle.asset(template))
    if form is None:
        raise RequestError(f"{served.name} has no tools in its chat template: leave tools out")
    chosen = body.tools
    if isinstance(body.tool_choice, Choice):
        wanted = body.tool_choice.function.name
        chosen = [tool for tool in body.tools if tool.function.name == wanted]
        if not chosen:
            raise RequestError(f"tool_choice names {wanted!r}, which is not among the tools")
    must = body.tool_choice not in (None, "auto")
    told = [tool.model_dump(exclude_none=True) for tool in body.tools]
    return Tools(form, told, form.grammar(chosen) if must else None)


@cache
def _form(path: Path) -> Form | None:
    template = path.read_text(encoding="utf-8")
    if not re.search(r"\btools\b", template):
        return None
    arguments = "arguments" if "arguments" in template else "parameters"
    return Form(tagged=OPEN in template, arguments=arguments)


def _overlap(text: str, begin: str) -> int:
    """How much of the text's end may be the start of `begin`."""
    sizes = range(min(len(text), len(begin) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(begin[:size])), 0)
