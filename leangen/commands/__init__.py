"""The subcommands, one file each.

Each module offers `declare(add)`, which adds its parser with `add(name, command, summary, example)`
and its options, and the command itself, which takes the parsed arguments and returns the exit code.
Parsing imports them all: what is heavy is imported inside the command.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from leangen.commands import (
    bench,
    budget,
    chat,
    compare,
    demo,
    doctor,
    export,
    generate,
    ledger,
    lint,
    meters,
    metrics,
    pipelines,
    pull,
    quantize,
    report,
    serve,
    store,
    tune,
    verify,
)
from leangen.commands import eval as eval_


class Module(Protocol):
    """A subcommand's file."""

    def declare(self, add: Callable[..., Any]) -> None:
        """Add the parser."""


MODULES: tuple[Module, ...] = (
    demo,
    generate,
    chat,
    serve,
    bench,
    compare,
    eval_,
    export,
    quantize,
    tune,
    lint,
    verify,
    pipelines,
    pull,
    store,
    meters,
    ledger,
    budget,
    report,
    metrics,
    doctor,
)
"""In the order of `leangen --help`."""
