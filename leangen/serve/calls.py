"""From a route to a model's worker and back: submit jobs, take their events, sum what they cost."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from leangen import carbon, clock, otel
from leangen.budget import Guard, spent
from leangen.errors import LeangenError, RequestError
from leangen.intensity import Series
from leangen.ledger import Ledger
from leangen.records import COVERAGE_FACTOR, Receipt
from leangen.serve.account import Account
from leangen.serve.jobs import Event, Finished, Job
from leangen.serve.models import Models, Served
from leangen.serve.options import Options
from leangen.serve.power import cleanest_delay_s, hold_to_budgets
from leangen.serve.prometheus import Metrics

if TYPE_CHECKING:
    from fastapi import Request

    from leangen.serve.schemas import Body

T = TypeVar("T")

CHEAPER_FROM = 0.8
"""From this share of a budget on, a smaller precision answers where that is allowed."""


@dataclass(slots=True, kw_only=True)
class Server:
    """What the routes share."""

    options: Options
    models: Models
    account: Account
    ledger: Ledger
    guard: Guard
    metrics: Metrics
    footprint: carbon.Footprint
    stopping: bool = False

    async def choose(self, name: str, family: str) -> tuple[Served, str | None]:
        """The model that answers, and why if it is not the one that was named.

        Raises UnknownModelError, RequestError for a model of another family, BudgetError.
        """
        served = self.models.get(name)
        if served.key != family:
            raise RequestError(
                f"{name} is of the family {served.key}: this address is for {family} models"
            )
        return await asyncio.to_thread(self._within_budget, served)

    def _within_budget(self, served: Served) -> tuple[Served, str | None]:
        hold_to_budgets(self.guard, self.options.tag)
        smaller = self.models.cheaper(served) if self.options.cheaper else None
        if smaller is not None:
            for budget in self.options.budgets:
                state = spent(budget, self.ledger, clock.utc_now())
                if state.amount >= CHEAPER_FROM * budget.limit:
                    return smaller, f"{state}: {smaller.name} answers for {served.name}"
        return served, None

    def deferred_ns(self, defer: bool) -> int:
        """When a deferrable request may begin, on the monotonic clock; 0 for at once."""
        if not defer:
            return 0
        grid = self.footprint.grid
        if not isinstance(grid, Series):
            raise RequestError(
                "defer needs the carbon intensity over time: start the server with --intensity FILE"
            )
        delay_s, _ = cleanest_delay_s(grid, clock.utc_now(), self.options.defer_s)
        return clock.monotonic_ns() + int(delay_s * 1e9) if delay_s else 0


class Call:
    """The jobs of one HTTP request. Leaving the context cancels what has not ended."""

    def __init__(
        self,
        server: Server,
        served: Served,
        requests: Sequence[Any],
        asked: Request,
        body: Body,
    ) -> None:
        """`asked` is the HTTP request, `body` what it says of when to carry it out."""
        loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._worker = served.worker
        self.finished: dict[int, Finished] = {}
        not_before_ns = server.deferred_ns(body.defer)
        start_ns = max(not_before_ns, clock.monotonic_ns())
        within_s = min(server.options.timeout_s, body.deadline_s or server.options.timeout_s)
        told = asked.scope.get("leangen")
        caller = otel.caller(asked.headers) if server.options.otel else None

        def teller(index: int) -> Callable[[Event], None]:
            def tell(event: Event) -> None:
                with suppress(RuntimeError):  # the loop has been closed: nobody listens
                    loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

            return tell

        self.jobs = [
            Job(
                request=request,
                tell=teller(index),
                client=told["client"] if told else "",
                priority=body.priority,
                caller=caller,
                tag=server.options.tag,
                deadline_ns=start_ns + int(within_s * 1e9),
                not_before_ns=not_before_ns,
            )
            for index, request in enumerate(requests)
        ]

    async def __aenter__(self) -> Call:
        for index, job in enumerate(self.jobs):
            try:
                self._worker.submit(job)
            except LeangenError:
                for earlier in self.jobs[:index]:
                    self._worker.cancel(earlier)
                raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for index, job in enumerate(self.jobs):
            if index not in self.finished:
                self._worker.cancel(job)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(job's index, step or end) as they come, until all jobs have ended.

        An end comes when its receipt is on the disk. Raises the LeangenError that ended a job.
        """
        while len(self.finished) < len(self.jobs):
            index, event = await self._events.get()
            if isinstance(event, LeangenError):
                raise event
            if isinstance(event, Finished):
                if event.ticket is not None:
                    await asyncio.to_thread(event.ticket.wait)
                self.finished[index] = event
            yield index, event

    async def results(self) -> list[Finished]:
        """All jobs to their ends, in their order."""
        async for _ in self.events():
            pass
        return [self.finished[index] for index in range(len(self.jobs))]

    @property
    def receipts(self) -> list[Receipt]:
        """Of the jobs that have ended."""
        return [self.finished[index].receipt for index in sorted(self.finished)]

    @property
    def headers(self) -> dict[str, str]:
        """The response's headers: known before the first step."""
        return {"x-leangen-receipt": ",".join(job.receipt_id for job in self.jobs)}


async def unless_gone(receive: Callable[[], Awaitable[Any]], work: Awaitable[T]) -> T | None:
    """The result of `work`; None when the client disconnects first, and then `work` is cancelled.

    `receive` is the ASGI connection's, whose body has been read.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working: asyncio.Future[T] = asyncio.ensure_future(work)
    watching = asyncio.ensure_future(gone())
    tasks: set[asyncio.Future[Any]] = {working, watching}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def energy_usage(receipts: Sequence[Receipt]) -> dict[str, Any]:
    """`usage.energy`: the sum over receipts; null where one of them has no figure."""
    energies = [receipt.energy for receipt in receipts]
    known = all(energy.gross_uj is not None for energy in energies)
    random_j = math.hypot(*(energy.u_random_j or 0.0 for energy in energies))
    systematic_j = math.fsum(energy.u_systematic_j or 0.0 for energy in energies)
    grams = [receipt.carbon.g for receipt in receipts]
    return {
        "joules": sum(energy.gross_uj or 0 for energy in energies) / 1e6 if known else None,
        "u_joules": math.hypot(random_j, systematic_j) if known else None,
        "k": COVERAGE_FACTOR,
        "source": energies[0].source if known else "unavailable",
        "reason": next((energy.reason for energy in energies if energy.reason), None),
        "gco2e": math.fsum(g for g in grams if g is not None) if None not in grams else None,
        "receipts": [receipt.id for receipt in receipts],
    }


def usage(receipts: Sequence[Receipt], prompts: int = 1) -> dict[str, Any]:
    """OpenAI's `usage`, with `energy`; each prompt counts once, however many replies it had."""
    prompt = int(sum(receipt.units.prompt for receipt in receipts)) * prompts // len(receipts)
    completion = int(sum(receipt.units.count for receipt in receipts))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {
            "cached_tokens": sum(receipt.units.counts.get("reused", 0) for receipt in receipts)
        },
        "energy": energy_usage(receipts),
    }


def energy_headers(receipts: Sequence[Receipt]) -> dict[str, str]:
    """What a finished response says of its energy in headers."""
    energy = energy_usage(receipts)
    headers = {
        "x-leangen-receipt": ",".join(energy["receipts"]),
        "x-leangen-energy-source": energy["source"],
    }
    if energy["joules"] is not None:
        headers["x-leangen-energy-joules"] = f"{energy['joules']:.6f}"
        headers["x-leangen-energy-u-joules"] = f"{energy['u_joules']:.6f}"
    return headers


def note(told: Mapping[str, Any] | None, receipts: Sequence[Receipt], **more: Any) -> None:
    """Add to the request's line in the log."""
    if isinstance(told, dict):
        energy = energy_usage(receipts)
        told.update(receipts=energy["receipts"], joules=energy["joules"], **more)
