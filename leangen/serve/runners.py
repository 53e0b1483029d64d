"""How a model's jobs run: language models in a batch, others by shape, the rest one at a time."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

from leangen import clock, families
from leangen.engine import Engine
from leangen.errors import LeangenError
from leangen.families.batch import Batch, Sequence
from leangen.records import Output, Step
from leangen.serve.jobs import Job

BY_SHAPE = ("diffusion", "oneshot", "flow/density", "embedding")
"""Families whose graphs take rows that have nothing to do with each other."""


@dataclass(frozen=True, slots=True)
class Gain:
    """What one job gained in a step."""

    job: Job
    step: Step | None
    """None where it only computed for the job, or ended it."""
    busy_ns: int
    output: Output | None
    """Set with the job's last step."""
    error: LeangenError | None = None
    """What ended this job alone."""


class Runner(Protocol):
    """What a worker drives. Used by one thread."""

    @property
    def room(self) -> int:
        """Jobs that may be added now."""
        ...

    def add(self, job: Job) -> None:
        """Take a job in; raises a LeangenError for one that cannot be carried out."""
        ...

    def remove(self, job: Job) -> Output | None:
        """End a job early; what it has, or None."""
        ...

    def step(self) -> list[Gain]:
        """Compute a little for the jobs. A LeangenError concerns all of them: remove them."""
        ...

    @property
    def cached_tokens(self) -> int:
        """Tokens in the cache of keys and values."""
        ...

    @property
    def capacity_tokens(self) -> int:
        """How many it holds; 0 where there is none."""
        ...


class BatchRunner:
    """Language: sequences join and leave a running batch."""

    def __init__(self, engine: Engine, *, rows: int, capacity: int) -> None:
        context = engine.bundle.config["context_length"]
        self._session = engine.session
        self._batch = Batch(engine.session, rows=rows, capacity=min(capacity, context))
        self._jobs: dict[Sequence, Job] = {}

    @property
    def room(self) -> int:
        """Free rows."""
        return self._batch.rows - self._batch.size

    @property
    def cached_tokens(self) -> int:
        """Of all running sequences."""
        return self._batch.cached_tokens

    @property
    def capacity_tokens(self) -> int:
        """Of all rows."""
        return self._batch.rows * self._batch.capacity

    def add(self, job: Job) -> None:
        """Let a job's sequence join."""
        sequence = Sequence(self._session, job.request, self._batch.capacity)
        self._batch.add(sequence)
        self._jobs[sequence] = job

    def remove(self, job: Job) -> Output | None:
        """Take its sequence out."""
        for sequence, other in list(self._jobs.items()):
            if other is job:
                self._batch.remove(sequence)
                del self._jobs[sequence]
                return sequence.so_far("cancelled")
        return None

    def step(self) -> list[Gain]:
        """A token for every sequence, a chunk of a prompt."""
        gains = []
        for progress in self._batch.step():
            sequence = progress.sequence
            job = self._jobs[sequence]
            gains.append(Gain(job, progress.step, progress.busy_ns, sequence.output))
            if sequence.output is not None:
                del self._jobs[sequence]
        return gains


class SingleRunner:
    """One generation at a time, as the family's own generator steps."""

    cached_tokens = 0
    capacity_tokens = 0

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._job: Job | None = None
        self._running: Generator[Step, None, Output] | None = None

    @property
    def room(self) -> int:
        """Whether it is free."""
        return int(self._job is None)

    def add(self, job: Job) -> None:
        """Begin; nothing is computed yet."""
        self._job = job
        self._running = self._engine.family.run(self._engine.session, job.request)

    def remove(self, job: Job) -> Output | None:
        """Stop the generator."""
        if job is self._job and self._running is not None:
            self._running.close()
            self._job = self._running = None
        return None

    def step(self) -> list[Gain]:
        """The next step of the generator; a request that it refuses ends in the error."""
        job, running = self._job, self._running
        if job is None or running is None:
            return []
        begin_ns = clock.monotonic_ns()
        step: Step | None = None
        output: Output | None = None
        try:
            step = next(running)
        except StopIteration as stop:
            output = stop.value
            self._job = self._running = None
        return [Gain(job, step, clock.monotonic_ns() - begin_ns, output)]


def runner(engine: Engine, *, rows: int, capacity: int) -> Runner:
    """The runner that fits a model's family."""
    if engine.bundle.family == "language" and "io" not in engine.bundle.config:
        return BatchRunner(engine, rows=rows, capacity=capacity)
    if families.key(engine.bundle) in BY_SHAPE:
        from leangen.serve.gathering import GatheringRunner

        return GatheringRunner(engine, rows=rows)
    return SingleRunner(engine)
