"""What waits for a model: jobs, and the order in which they are served."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from leangen import clock
from leangen.errors import LeangenError
from leangen.ledger import Ticket
from leangen.records import Output, Receipt, Step
from leangen.serve.problems import OverloadError


@dataclass(frozen=True, slots=True)
class Finished:
    """The last event of a job that was carried out."""

    output: Output
    receipt: Receipt
    ticket: Ticket | None
    """Wait for it before the receipt is promised to anybody."""


Event = Step | Finished | LeangenError
"""What a job tells: its steps, then how it ended."""


@dataclass(eq=False, slots=True, kw_only=True)
class Job:
    """One generation that a client asked for."""

    request: Any
    """The family's request."""
    tell: Callable[[Event], None]
    """Called in the worker's thread."""
    client: str = ""
    """Clients of one priority take turns."""
    priority: int = 0
    """Lower goes first, as in vLLM."""
    tag: str | None = None
    caller: Any = None
    """As of `otel.caller`, where traces are kept."""
    deadline_ns: int | None = None
    """On the monotonic clock; it ends the job with an error wherever it stands."""
    not_before_ns: int = 0
    """A deferred job is not begun earlier."""
    receipt_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    queued_ns: int = field(default_factory=clock.monotonic_ns)
    cancelled: bool = False
    """Set by the event loop when nobody waits any more; the worker ends it at its next step."""

    def overdue(self, now_ns: int) -> bool:
        """Whether the deadline has passed."""
        return self.deadline_ns is not None and now_ns >= self.deadline_ns


class FairQueue:
    """By priority; within one, clients take turns; within a client, first come first served.

    Not for two threads at once: the worker holds its lock around every call.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._jobs: list[tuple[int, Job]] = []
        self._arrivals = itertools.count()
        self._served: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: Job) -> None:
        """Queue a job. Raises OverloadError when as many wait as may."""
        if len(self._jobs) >= self._limit:
            raise OverloadError(
                f"{self._limit} requests wait for this model already: try again in a few seconds"
            )
        if all(other.client != job.client for _, other in self._jobs):
            # Who comes back after a rest has no claim to the turns that were not taken meanwhile.
            least = min((self._served.get(o.client, 0) for _, o in self._jobs), default=0)
            self._served[job.client] = max(self._served.get(job.client, 0), least)
        self._jobs.append((next(self._arrivals), job))

    def take(self, now_ns: int) -> Job | None:
        """The next job that may begin now; None when there is none."""
        ready = [(number, job) for number, job in self._jobs if job.not_before_ns <= now_ns]
        if not ready:
            return None
        number, job = min(
            ready,
            key=lambda entry: (entry[1].priority, self._served.get(entry[1].client, 0), entry[0]),
        )
        self._jobs.remove((number, job))
        self._served[job.client] = self._served.get(job.client, 0) + 1
        if not self._jobs:
            self._served.clear()
        return job

    def drop(self, now_ns: int) -> list[Job]:
        """Take out the jobs that nobody waits for, or whose time is over."""
        gone = [job for _, job in self._jobs if job.cancelled or job.overdue(now_ns)]
        self._jobs = [(number, job) for number, job in self._jobs if job not in gone]
        return gone

    def clear(self) -> list[Job]:
        """Take all out."""
        jobs = [job for _, job in self._jobs]
        self._jobs.clear()
        return jobs

    def wakes_ns(self) -> int | None:
        """When a job may begin or is over, if nothing else happens; None while none waits."""
        return min((_wakes_ns(job) for _, job in self._jobs), default=None)


def _wakes_ns(job: Job) -> int:
    times: Iterable[int] = (job.not_before_ns, *([job.deadline_ns] if job.deadline_ns else []))
    return min(times)
