"""How many tokens of context the bundle of a language model has, and why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from leangen.errors import RequestError
from leangen.exporters import rope
from leangen.exporters.checkpoint import Layout


def choose(layout: Layout, asked: int | None) -> tuple[Layout, dict[str, Any]]:
    """The layout with the context that was asked for, or else with its own; config keys.

    The keys are `reasons` in the bundle's config, and none where the context is simply the model's.
    Raises RequestError where it cannot have what was asked for.
    """
    stated, tables = layout.config.context, layout.ropes.values()
    if asked is not None and not tables:
        raise RequestError(
            f"--context does not apply: this model has learned {stated} positions; leave it out"
        )
    rooms = [rope.room(parameters, stated) for parameters in tables]
    own = min((default for default, _ in rooms), default=stated)
    most = min((most for _, most in rooms), default=stated)
    context = own if asked is None else asked
    if type(context) is not int or not 0 < context <= most:
        raise RequestError(f"--context is {context!r}, expected 1 to {most} tokens of context")
    why = [f"{context} tokens were asked for, of {most}"] if asked not in (None, most) else []
    why += filter(None, (rope.reason(parameters, context, most) for parameters in tables))
    config = replace(layout.config, context=context)
    keys = {"reasons": {"context_length": "; ".join(why)}} if why else {}
    return replace(layout, config=config), keys
