"""`leangen chat`: a conversation in the terminal, each turn with its joules."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from leangen.console import say, with_u
from leangen.engine import Engine
from leangen.errors import RequestError
from leangen.report import summary


def run(engine: Engine, args: argparse.Namespace) -> int:
    """Read a message, stream the answer, show what it cost; until `/quit` or end of input."""
    if engine.bundle.family != "language":
        raise RequestError(
            f"{args.model} is a {engine.bundle.family} model, chat needs a language model: "
            "use `leangen generate`"
        )
    history = [{"role": "system", "content": args.system}] if args.system else []
    say("/quit ends, /reset forgets the conversation; Ctrl-C stops an answer")
    turns: list[tuple[float | None, float | None]] = []
    while True:
        try:
            message = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if message == "/quit":
            break
        if message == "/reset":
            del history[1 if args.system else 0 :]
            continue
        if not message:
            continue
        turn = [*history, {"role": "user", "content": message}]
        stream = engine.stream(
            messages=turn,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed + len(history),
            speculate=args.speculate,
            prefix_cache=args.prefix_cache,
        )
        answer = ""
        try:
            for step in stream:
                answer += step.text
                print(step.text, end="", flush=True)
        except KeyboardInterrupt:
            stream.close()
        except RequestError as error:
            say(f"{error}; /reset starts again")
            continue
        print()
        history = [*turn, {"role": "assistant", "content": answer}]
        if stream.receipt is not None:
            say(summary(stream.receipt))
            turns.append((stream.receipt.energy.gross_j, stream.receipt.energy.u_j))
    _tell_total(turns)
    return 0


def _tell_total(turns: Sequence[tuple[float | None, float | None]]) -> None:
    """What all turns took together, each given as joules and their u."""
    known = [(j, u or 0.0) for j, u in turns if j is not None]
    if known:
        # The systematic part is common to all turns, so the u of the sum adds linearly.
        total = with_u(sum(j for j, _ in known), sum(u for _, u in known), "J")
        missing = len(turns) - len(known)
        say(f"this conversation: {total}" + (f", {missing} turns not measured" * bool(missing)))
