"""Requests of one model that want the same graph run together, by shape.

A family's generator computes by `session.run`. Here each job's generator runs in a greenlet that
stands still at each such call; calls of several jobs whose inputs differ in nothing but the size of
the first axis become one run, whose results are cut apart again. A family needs to know nothing of
it. Threads would do too, but none can be started when memory is short.

A run is only shared where the graph leaves the first axis of every input and output open. Floats
may round otherwise in company than alone, in the last digit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from greenlet import getcurrent, greenlet

from leangen import clock
from leangen.engine import Engine
from leangen.errors import LeangenError
from leangen.records import Output, Step
from leangen.serve.jobs import Job
from leangen.serve.runners import Gain
from leangen.session import Session

MOST_BYTES = 64_000_000
"""Of the inputs of one run, unless a single job wants more."""


@dataclass(frozen=True, slots=True)
class _Ask:
    """A run that a job waits for."""

    role: str
    feeds: Mapping[str, Any]
    outputs: Sequence[str] | None

    @property
    def key(self) -> tuple[Any, ...]:
        """What runs that may be shared have in common."""
        shapes = ((n, v.dtype.str, np.shape(v)[1:]) for n, v in sorted(self.feeds.items()))
        return self.role, None if self.outputs is None else tuple(self.outputs), *shapes

    @property
    def rows(self) -> int:
        """The size of the first axis; 0 where its inputs have none in common."""
        sizes = {len(value) if np.ndim(value) else 0 for value in self.feeds.values()}
        return sizes.pop() if len(sizes) == 1 else 0

    @property
    def bytes(self) -> int:
        """Of its inputs."""
        return sum(np.asarray(value).nbytes for value in self.feeds.values())


class _Strand:
    """A job's generator, in a greenlet that runs only while `resume` waits for it."""

    def __init__(self, engine: Engine, job: Job) -> None:
        self.job = job
        self.ask: _Ask | None = None
        """What it waits for."""
        self._engine = engine
        self._reply: Any = None
        self._worker = getcurrent()
        self._greenlet = greenlet(self._run)

    def answer(self, result: Any) -> None:
        """Give the results of the run that it waits for."""
        self.ask, self._reply = None, result

    def resume(self) -> _Ask | Step | Output:
        """Go on to the next run, step or end; raises what ended it otherwise."""
        reply, self._reply = self._reply, None
        event: _Ask | Step | Output = self._greenlet.switch(reply)
        if isinstance(event, _Ask):
            self.ask = event
        return event

    def close(self) -> None:
        """End it wherever it stands."""
        if not self._greenlet.dead:
            self._greenlet.throw()

    def _run(self, _: None) -> Output:
        asking: Any = _Asking(self._engine.session, self._worker.switch)
        running = self._engine.family.run(asking, self.job.request)
        while True:
            try:
                step = next(running)
            except StopIteration as stop:
                output: Output = stop.value
                return output
            self._worker.switch(step)


class _Asking:
    """A session whose runs are carried out by somebody else."""

    def __init__(self, session: Session, ask: Any) -> None:
        self._session = session
        self._ask = ask

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(
        self, role: str, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None
    ) -> list[Any]:
        """As `Session.run`."""
        arrays = {name: np.asarray(value) for name, value in feeds.items()}
        results: list[Any] = self._ask(_Ask(role, arrays, outputs))
        return results


class GatheringRunner:
    """Up to `rows` jobs at once; a `Runner`."""

    cached_tokens = 0
    capacity_tokens = 0

    def __init__(self, engine: Engine, *, rows: int) -> None:
        self._engine = engine
        self._rows = rows
        self._strands: list[_Strand] = []
        self._open: dict[str, bool] = {}

    @property
    def room(self) -> int:
        """Jobs that may join."""
        return self._rows - len(self._strands)

    def add(self, job: Job) -> None:
        """Begin; nothing is computed yet."""
        self._strands.append(_Strand(self._engine, job))

    def remove(self, job: Job) -> Output | None:
        """Stop a job."""
        for strand in [strand for strand in self._strands if strand.job is job]:
            strand.close()
            self._strands.remove(strand)
        return None

    def step(self) -> list[Gain]:
        """Take every job on to where it waits for a run or has done a step; carry out one run."""
        gains = [gain for strand in list(self._strands) for gain in self._on(strand)]
        if group := self._together():
            gains += self._carry_out(group)
        return gains

    def _on(self, strand: _Strand) -> list[Gain]:
        if strand.ask is not None:
            return []
        begin_ns = clock.monotonic_ns()
        step = output = error = None
        try:
            event = strand.resume()
            step = event if isinstance(event, Step) else None
            output = event if isinstance(event, Output) else None
        except LeangenError as met:
            error = met
        if output is not None or error is not None:
            self._strands.remove(strand)
        return [Gain(strand.job, step, clock.monotonic_ns() - begin_ns, output, error)]

    def _together(self) -> list[_Strand]:
        """Those that wait for the same run as the first that waits."""
        waiting = [(strand, strand.ask) for strand in self._strands if strand.ask is not None]
        if not waiting:
            return []
        first, wanted = waiting[0]
        if not wanted.rows or not self._is_open(wanted.role):
            return [first]
        group: list[_Strand] = []
        size = 0
        for strand, ask in waiting:
            if ask.key == wanted.key and (not group or size + ask.bytes <= MOST_BYTES):
                group.append(strand)
                size += ask.bytes
        return group

    def _carry_out(self, group: Sequence[_Strand]) -> list[Gain]:
        asks = [strand.ask for strand in group if strand.ask is not None]
        begin_ns = clock.monotonic_ns()
        names = asks[0].feeds
        feeds = {name: np.concatenate([ask.feeds[name] for ask in asks]) for name in names}
        if len(asks) == 1:
            feeds = dict(asks[0].feeds)
        results = self._engine.session.run(asks[0].role, feeds, asks[0].outputs)
        cuts = np.cumsum([ask.rows for ask in asks])[:-1]
        parts = [np.split(result, cuts) if len(asks) > 1 else [result] for result in results]
        for index, strand in enumerate(group):
            strand.answer([part[index] for part in parts])
        busy_ns, rows = clock.monotonic_ns() - begin_ns, sum(max(1, ask.rows) for ask in asks)
        return [
            Gain(strand.job, None, busy_ns * max(1, ask.rows) // rows, None)
            for strand, ask in zip(group, asks, strict=True)
        ]

    def _is_open(self, role: str) -> bool:
        """Whether every input and output of the graph leaves its first axis open."""
        if role not in self._open:
            graph = self._engine.session.graph(role)
            values = [*graph.get_inputs(), *graph.get_outputs()]
            self._open[role] = all(v.shape and not isinstance(v.shape[0], int) for v in values)
        return self._open[role]
