"""Subcommands with a file of their own.

Each module offers `declare(add)`, which adds its parser with `add(name, command, summary, example)`
and its options, and the command itself, which takes the parsed arguments and returns the exit code.
Parsing imports them all: what is heavy is imported inside the command.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from leangen.commands import (
    budget,
    compare,
    doctor,
    export,
    ledger,
    lint,
    metrics,
    pipelines,
    quantize,
    report,
    serve,
    tune,
    verify,
)
from leangen.commands import eval as eval_


class Module(Protocol):
    """A subcommand's file."""

    def declare(self, add: Callable[..., Any]) -> None:
        """Add the parser."""


MODULES: tuple[Module, ...] = (
    export,
    quantize,
    tune,
    lint,
    verify,
    pipelines,
    eval_,
    compare,
    serve,
    ledger,
    budget,
    report,
    metrics,
    doctor,
)
