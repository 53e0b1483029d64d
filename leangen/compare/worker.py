"""One model in a process of its own, which generates when it is told to.

So its peak memory is its own, and the others sleep while it is measured.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, cast

from leangen.errors import LeangenError, RequestError
from leangen.records import Receipt

_PATIENCE_S = 10.0


class Worker:
    """A process with the bundle in `path` loaded; a context manager that ends it.

    loading: options of `leangen.load`. Raises what loading raises, and RequestError when the
    process dies.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        *,
        loading: Mapping[str, Any],
        prompt: Any,
        options: Mapping[str, Any],
    ) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")  # a forked ORT has lost its threads
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(theirs, str(path), dict(loading), prompt, dict(options)),
            daemon=True,
        )
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def warm_up(self) -> tuple[Receipt, int, bool]:
        """As `benchmark.warm_up`."""
        return cast(tuple[Receipt, int, bool], self._ask("warm_up", 0))

    def repeat(self, repeats: int) -> Receipt:
        """As `Engine.repeat`: one receipt over all."""
        return cast(Receipt, self._ask("repeat", repeats))

    def close(self) -> None:
        """End the process."""
        self._pipe.close()  # its next read ends it
        self._process.join(_PATIENCE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._process.kill()
        self.close()

    def _ask(self, order: str, count: int) -> Any:
        try:
            self._pipe.send((order, count))
        except OSError:
            raise self._died() from None
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(answer, LeangenError):
            raise answer
        return answer

    def _died(self) -> RequestError:
        self._process.join(_PATIENCE_S)
        return RequestError(
            f"the process of {self.name} ended with code {self._process.exitcode}: it may have run "
            "out of memory; compare fewer schemes at a time"
        )


def _serve(
    pipe: Connection, path: str, loading: dict[str, Any], prompt: Any, options: dict[str, Any]
) -> None:
    """What the process does: load, then generate on demand until the pipe closes."""
    from leangen import api, benchmark

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends us
    try:
        engine = api.load_model(path, **loading)
        request = engine.or_example(prompt, options)
        pipe.send(None)
        while True:
            order, count = pipe.recv()
            if order == "warm_up":
                pipe.send(benchmark.warm_up(engine, request))
            else:
                pipe.send(engine.repeat(count, **request).receipt)
    except LeangenError as error:
        pipe.send(error)
    except (EOFError, BrokenPipeError):
        pass  # the parent is done with us, or gone
