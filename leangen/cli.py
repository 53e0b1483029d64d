"""The command line: one file per subcommand in `leangen.commands`."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from leangen import __version__, commands
from leangen.console import say
from leangen.errors import LeangenError

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 2 bad input or surroundings, 130 interrupted, 143 terminated."""
    with _ended_by_signals():
        return _run(argv)


def _run(argv: Sequence[str] | None) -> int:
    for stream, errors in (
        (sys.stdin, "replace"),
        (sys.stdout, "backslashreplace"),  # what an encoding lacks is shown by its number
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)
    try:
        args = _parser().parse_args(argv)
        command: Command = args.command
        if getattr(args, "on_every_machine", False):
            from leangen import cluster

            return cluster.on_every_machine(sys.argv[1:] if argv is None else argv)
        return command(args)
    except LeangenError as error:
        say(f"leangen: error: {error}")
        return 2
    except KeyboardInterrupt:
        say("leangen: interrupted; nothing half-written was left")
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader went away; Python would complain again at exit
        return 141
    except MemoryError:
        say("leangen: error: there is not memory enough: ask for less at once, or a smaller model")
        return 2
    except OSError as error:
        # Commands name the files that they read and write; what is left has most often no name.
        where = "standard output" if error.filename is None else os.fsdecode(error.filename)
        say(f"leangen: error: {where}: {error.strerror or error}")
        _drop_output()
        return 2


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM, and SIGHUP of a closed terminal, end a command as Ctrl-C does.

    What was begun is then tidied away, and what a generation spent goes to the ledger.
    """

    def end(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    caught = []
    if threading.current_thread() is threading.main_thread():
        numbers = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))
        caught = [n for n in numbers if n is not None and signal.getsignal(n) is signal.SIG_DFL]
    for number in caught:  # what nohup ignores stays ignored
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def _drop_output() -> None:
    """What standard output still holds goes nowhere: Python would complain again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage of some commands fills a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="leangen",
        description="Low-precision inference of generative models, with the joules of every run.",
        epilog='Start with `leangen demo`, or: leangen generate smollm2-135m:int4 --prompt "Hi"',
    )
    parser.add_argument("--version", action="version", version=f"leangen {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, command: Command, summary: str, example: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=command)
        return sub

    for module in commands.MODULES:
        module.declare(add)
    return parser
