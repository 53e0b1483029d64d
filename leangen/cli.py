"""The command line: one file per subcommand in `leangen.commands`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from leangen import __version__, commands
from leangen.console import say
from leangen.errors import LeangenError

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 2 bad input or surroundings, 130 interrupted."""
    args = _parser().parse_args(argv)
    command: Command = args.command
    try:
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
