"""One thread per model: it loads the model, runs its jobs, and unloads it when nobody comes.

While nothing is to be done the thread waits on a condition, and after `idle_release_s` it ends and
takes the model's memory with it; the next job starts it again.
"""

from __future__ import annotations

import gc
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

from leangen import clock, host, otel
from leangen.console import say
from leangen.engine import Engine
from leangen.errors import LeangenError
from leangen.receipts import Measured
from leangen.records import Output
from leangen.serve import problems, runners
from leangen.serve.account import Account, Tab, Worker
from leangen.serve.jobs import FairQueue, Finished, Job
from leangen.serve.power import PowerCap
from leangen.serve.problems import DeadlineError, StoppingError
from leangen.serve.prometheus import Metrics
from leangen.serve.room import Room
from leangen.serve.runners import Gain, Runner

ROOM_S = 0.5
"""How often a model that waits for room asks again, when nobody nudges it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much one model takes on."""

    max_batch: int = 8
    """Sequences that run at once."""
    context: int = 2048
    """Tokens of one sequence, prompt and reply."""
    queue: int = 256
    """Jobs that wait."""
    idle_release_s: float = 300.0


@dataclass(slots=True)
class _Running:
    """What is known of a job that runs."""

    tab: Tab
    last_ns: int
    steps: list[tuple[str, float, int]] = field(default_factory=list)
    busy_ns: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    since_step_ns: int = 0
    """Computing time since its last step."""
    began: bool = False
    """Whether it has got its first unit of work."""


class ModelWorker:
    """Serves the jobs of one model. `submit` and the properties may be used from any thread."""

    def __init__(
        self,
        name: str,
        load: Callable[[], Engine],
        *,
        room: Room,
        memory_bytes: int,
        account: Account,
        metrics: Metrics,
        limits: Limits,
        cap: PowerCap | None = None,
        allow: Callable[[], None] = lambda: None,
    ) -> None:
        """`allow` raises a LeangenError where no further job may begin."""
        self.name = name
        self.memory_bytes = memory_bytes
        """What it may come to hold: its weights, and the cache of a full batch."""
        self.last_used_ns = 0
        self._load = load
        self._room = room
        self._account = account
        self._metrics = metrics
        self._limits = limits
        self._cap = cap
        self._allow = allow
        self._wake = threading.Condition()
        self._queue = FairQueue(limits.queue)
        self._running: dict[Job, _Running] = {}
        self._thread: threading.Thread | None = None
        self._engine: Engine | None = None
        self._runner: Runner | None = None
        self._release = False
        self._stopping = False
        self._grace_ends_ns: int | None = None

    @property
    def loaded(self) -> bool:
        """Whether the model is in memory."""
        return self._engine is not None

    @property
    def idle(self) -> bool:
        """Whether it has no job."""
        with self._wake:
            return not self._running and not len(self._queue)

    @property
    def load_figures(self) -> dict[str, float]:
        """Jobs that run and wait, and how full the cache is, for the metrics."""
        with self._wake:
            runner = self._runner
            capacity = runner.capacity_tokens if runner else 0
            return {
                "running": len(self._running),
                "waiting": len(self._queue),
                "kv_cache_usage": runner.cached_tokens / capacity if runner and capacity else 0.0,
            }

    def submit(self, job: Job) -> None:
        """Queue a job. Raises OverloadError, and StoppingError while the server shuts down."""
        self.start()
        with self._wake:
            if self._stopping:
                raise StoppingError("the server is shutting down: ask again in a moment")
            self._queue.put(job)
            self.last_used_ns = clock.monotonic_ns()
            self._wake.notify()

    def start(self) -> None:
        """Start the worker's thread if it has none.

        The server does so at its own start: when memory is short, Python may wait for ever for a
        thread that could not begin.
        """
        with self._wake:
            if self._thread is None and not self._stopping:
                thread = threading.Thread(
                    target=self._run, name=f"leangen-{self.name}", daemon=True
                )
                thread.start()
                self._thread = thread

    def cancel(self, job: Job) -> None:
        """Nobody waits for the job any more."""
        job.cancelled = True
        with self._wake:
            self._wake.notify()

    def release(self) -> None:
        """Begin no more jobs, and unload the model when those that run have ended.

        Jobs that wait then have it loaded again.
        """
        with self._wake:
            self._release = True
            self._wake.notify()

    def nudge(self) -> None:
        """There may be room for the model now."""
        with self._wake:
            self._wake.notify()

    def stop(self, grace_s: float) -> None:
        """Hand back what waits, give what runs `grace_s` to finish, unload, and wait for that."""
        with self._wake:
            self._stopping = True
            self._grace_ends_ns = clock.monotonic_ns() + int(grace_s * 1e9)
            thread = self._thread
            self._wake.notify()
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        account = self._account.worker()
        try:
            while not self._done():
                try:
                    while self._wait():
                        self._turn(account)
                    self._unload()
                except Exception as error:  # nobody may wait for ever because of it
                    self._give_up(error)
        finally:
            self._account.dismiss(account)

    def _give_up(self, error: Exception) -> None:
        """Tell every job that it failed, and begin anew."""
        short = problems.out_of_memory(error)
        if short is None:
            traceback.print_exception(error)
        say(f"leangen: error: {self.name}: {short or 'the worker stopped unexpectedly'}")
        self._unload()
        with self._wake:
            left = [*self._running, *self._queue.clear()]
        for running in self._running.values():
            self._account.disown(self._account.close(running.tab))
        self._running.clear()
        for job in left:
            job.tell(short or LeangenError("the model's worker stopped unexpectedly"))

    def _done(self) -> bool:
        """Whether nothing will be left to do."""
        with self._wake:
            return self._stopping and not len(self._queue)

    def _wait(self) -> bool:
        """Return when there is something to do; False when the model is to be unloaded."""
        idle_since_ns = clock.monotonic_ns()
        while True:
            with self._wake:
                now_ns = clock.monotonic_ns()
                gone = self._queue.clear() if self._stopping else self._queue.drop(now_ns)
                if not gone:
                    if self._release and self._runner is not None and not self._running:
                        return False
                    wakes_ns = self._queue.wakes_ns()
                    if self._running or (wakes_ns is not None and wakes_ns <= now_ns):
                        return True
                    until_ns = [] if wakes_ns is None else [wakes_ns]
                    if self._runner is not None:
                        until_ns.append(idle_since_ns + int(self._limits.idle_release_s * 1e9))
                        if now_ns >= until_ns[-1]:
                            return False
                    if self._stopping and (wakes_ns is None or self._runner is not None):
                        return False
                    wait_s = (min(until_ns) - now_ns) / 1e9 if until_ns else None
                    self._wake.wait(None if wait_s is None else max(0.001, wait_s))
            for job in gone:
                self._tell_why_ended(job)
            if gone and self._runner is None:
                self._room.leave(self)  # who still has jobs asks again

    def _turn(self, account: Worker) -> None:
        """Load if need be, admit, end what is over, and compute one step."""
        runner = self._loaded_runner()
        if runner is None:
            return
        self._admit(runner)
        now_ns = clock.monotonic_ns()
        for job in list(self._running):
            if job.cancelled or job.overdue(now_ns) or self._out_of_grace(now_ns):
                self._end(job, runner.remove(job))
                self._tell_why_ended(job)
        if self._running:
            self._step(runner, account)
        self.last_used_ns = clock.monotonic_ns()

    def _loaded_runner(self) -> Runner | None:
        """The runner; None while there is no room for it, or after telling every job why not."""
        if self._runner is None and not self._room.enter(self):
            with self._wake:
                self._wake.wait(ROOM_S)
            return None
        if self._runner is None:
            try:
                self._engine = self._load()
                self._runner = runners.runner(
                    self._engine, rows=self._limits.max_batch, capacity=self._limits.context
                )
                self._room.loaded(self)
            except LeangenError as error:
                say(f"leangen: error: {self.name}: {error}")
                self._unload()
                with self._wake:
                    jobs = self._queue.clear()
                for job in jobs:
                    job.tell(error)
        return self._runner

    def _unload(self) -> None:
        if self._runner is not None:
            for job in self._running:  # left over by a mistake
                self._runner.remove(job)
        self._engine = self._runner = None
        gc.collect()  # the engine and its closures refer to each other
        host.trim_memory()
        self._room.leave(self)
        self._release = False

    def _admit(self, runner: Runner) -> None:
        while runner.room and not self._release:
            with self._wake:
                job = self._queue.take(clock.monotonic_ns())
            if job is None:
                return
            now_ns = clock.monotonic_ns()
            self._metrics.queued(self.name, (now_ns - job.queued_ns) / 1e9)
            self._running[job] = _Running(self._account.open(), now_ns)
            try:
                self._allow()  # others may have used up a budget since it came
                runner.add(job)
            except LeangenError as error:
                self._end(job, None)
                job.tell(error)

    def _step(self, runner: Runner, account: Worker) -> None:
        self._account.begin_step(account)
        gains: list[Gain] = []
        failure = None
        try:
            gains = runner.step()
        except LeangenError as error:
            failure = error
        work: Counter[Tab] = Counter()
        for gain in gains:
            work[self._running[gain.job].tab] += gain.busy_ns
        self._account.end_step(account, work)
        self._metrics.stepped(self.name, len(work))
        for gain in gains:
            self._gained(gain)
        if failure is not None:
            for job in list(self._running):
                self._end(job, runner.remove(job))
                job.tell(failure)
        if self._cap is not None:
            clock.sleep(self._cap.pause_s(self._account.total_uj))

    def _gained(self, gain: Gain) -> None:
        job, running = gain.job, self._running[gain.job]
        running.since_step_ns += gain.busy_ns
        if gain.step is not None:
            now_ns = clock.monotonic_ns()
            running.steps.append((gain.step.kind, gain.step.units, now_ns - running.last_ns))
            running.busy_ns.append(running.since_step_ns)
            running.since_step_ns = 0
            running.counts.update(gain.step.counts)
            if gain.step.units and not running.began:
                running.began = True
                self._metrics.first_unit(self.name, (now_ns - job.queued_ns) / 1e9)
            elif gain.step.units:
                self._metrics.later_unit(self.name, (now_ns - running.last_ns) / 1e9)
            running.last_ns = now_ns
            job.tell(gain.step)
        if gain.output is not None:
            finished = self._end(job, gain.output)
            if finished is not None:
                job.tell(finished)
        elif gain.error is not None:
            self._end(job, None)
            job.tell(gain.error)

    def _end(self, job: Job, output: Output | None) -> Finished | None:
        """Take a job off, and put what it cost on the account; None where it did nothing."""
        try:
            return self._billed(job, self._running[job], output)
        finally:
            del self._running[job]

    def _billed(self, job: Job, running: _Running, output: Output | None) -> Finished | None:
        engine = self._engine
        bill = self._account.close(running.tab)
        if not running.steps or engine is None:
            self._account.disown(bill)
            return None
        shared = bill.company > 0
        receipt = engine.receipt(
            job.request,
            output,
            Measured(
                started_at=bill.started_at,
                begin_boottime_ns=None if shared else bill.begin_boottime_ns,
                duration_ns=bill.duration_ns,
                windows=bill.windows,
                steps=running.steps,
                counts=running.counts,
                own_ns=bill.own_ns if shared else None,
                busy_ns=running.busy_ns,
                note=f"shared by computing time with up to {bill.company} requests that ran "
                "meanwhile"
                if shared
                else None,
                receipt_id=job.receipt_id,
            ),
        )
        receipt = replace(receipt, tag=job.tag)
        with nullcontext() if job.caller is None else otel.within(job.caller):
            ticket = engine.keep(receipt)
        self._metrics.finished(self.name, receipt, output, clock.monotonic_ns() - job.queued_ns)
        done = output or Output(stop_reason="cancelled")
        return Finished(done, receipt, ticket)

    def _out_of_grace(self, now_ns: int) -> bool:
        return self._grace_ends_ns is not None and now_ns >= self._grace_ends_ns

    def _tell_why_ended(self, job: Job) -> None:
        if job.cancelled:
            return
        if job.overdue(clock.monotonic_ns()):
            job.tell(DeadlineError("the request's time was over before it was done"))
        else:
            job.tell(StoppingError("the server is shutting down: ask again in a moment"))
