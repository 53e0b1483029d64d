"""Whose joules are they? One account of a process's energy, shared among the requests it serves.

All models of a server run on the same machine and under the same meters, so there is one account.
From one look at the meters to the next is a stretch. Its energy goes to the workers (one per model)
by the time that each computed in it, and a worker's part to its requests by the computing time that
its steps reported for each. All are integers of microjoules, so that

    total = what requests got + unattributed

holds exactly, whatever the schedule. Energy of a stretch in which nobody computed goes to the next;
what remains when the last request leaves is `unattributed_uj`. While no request is open nothing is
read and nothing is counted: that is the idle machine's, not a request's.

Each request has a window of its own as well, over all the time that it was served. It tells the
faults and the uncertainty: a request's u is the part of the window's u that its share is of the
window's energy.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

from leangen import clock, meters
from leangen.attribution import RequestShares, largest_remainder
from leangen.energy import Baseline
from leangen.meters.meter import UNIT_UJ, Meter, MeterFault, Selection
from leangen.meters.window import gained
from leangen.records import MeterWindow, Reading

STRETCH_S = 0.05
"""A stretch lasts at least this, if nobody leaves, and `LOOK_COST` looks."""
LOOK_COST = 200
LONGEST_BASELINE_S = 5.0


@dataclass(eq=False, slots=True)
class Tab:
    """One request's place in the account, from its admission to its end."""

    window: meters.OpenWindow
    started_at: str
    begin_ns: int
    company: int = 0
    """The most other requests that were open at the same time."""
    faults: dict[int, str] = field(default_factory=dict)
    """By the meter's index: what kept a stretch from having a figure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bill:
    """What a request gets: its part of each meter's energy and of the time."""

    windows: tuple[MeterWindow, ...]
    started_at: str
    duration_ns: int
    own_ns: int
    begin_boottime_ns: int
    company: int


@dataclass(eq=False, slots=True)
class Worker:
    """One thread that computes; `Account.worker` makes it."""

    since_ns: int | None = None
    """When the step that is under way began."""
    busy_ns: int = 0
    """Computing time of this stretch, in steps that have ended."""
    work: dict[Hashable, float] = field(default_factory=dict)
    """Computing time by request, of steps that have ended since the last look."""
    held: list[int] = field(default_factory=list)
    """Of each meter, and of the time: what awaits the end of the step that is under way."""


class Account:
    """The process's account; usable from many threads."""

    def __init__(self, selection: Selection, baseline: Baseline | None = None) -> None:
        self.selection = selection
        self.baseline = baseline
        self.total_uj = 0
        """All that was counted."""
        self.billed_uj = 0
        """What requests that have left got."""
        self.power_w = 0.0
        """Mean power of the last stretch; 0 while no request is open."""
        self._lock = threading.Lock()
        self._tabs: set[Tab] = set()
        self._workers: set[Worker] = set()
        # Shares of each meter's microjoules, and the last of the nanoseconds.
        self._shares = [RequestShares() for _ in (*selection.meters, "time")]
        self._last: list[Reading | None] = []
        self._stretch_ns = 0
        self._look_ns = 0

    @property
    def unattributed_uj(self) -> int:
        """What no request can be charged with."""
        with self._lock:
            open_uj = sum(sum(shares.by_request.values()) for shares in self._shares[:-1])
            held_uj = sum(sum(worker.held[:-1]) for worker in self._workers)
            return self.total_uj - self.billed_uj - open_uj - held_uj

    def measure_baseline(self) -> None:
        """Learn the idle power; call it while nothing runs. None where it would take long."""
        seconds = max(1.0, meters.least_seconds(self.selection))
        self.baseline = self.selection.baseline
        if self.baseline is None and seconds <= LONGEST_BASELINE_S:
            self.baseline = meters.measure_baseline(self.selection, seconds)

    def worker(self) -> Worker:
        """A place for one more thread that computes."""
        worker = Worker(held=[0] * len(self._shares))
        with self._lock:
            self._workers.add(worker)
        return worker

    def dismiss(self, worker: Worker) -> None:
        """The worker computes no more."""
        with self._lock:
            self._workers.discard(worker)

    def open(self) -> Tab:
        """Begin to serve a request."""
        with self._lock:
            if self._tabs:
                self._settle()
            else:
                self._start()
            tab = Tab(meters.begin(self.selection), clock.utc_now(), clock.monotonic_ns())
            self._tabs.add(tab)
            for other in self._tabs:
                other.company = max(other.company, len(self._tabs) - 1)
            return tab

    def begin_step(self, worker: Worker) -> None:
        """The worker computes from now on."""
        with self._lock:
            worker.since_ns = clock.monotonic_ns()

    def end_step(self, worker: Worker, work: Mapping[Tab, int]) -> None:
        """It has computed, `work` nanoseconds for each request."""
        with self._lock:
            now_ns = clock.monotonic_ns()
            worker.busy_ns += self._under_way(worker, now_ns)
            worker.since_ns = None
            for tab, busy_ns in work.items():
                worker.work[tab] = worker.work.get(tab, 0) + busy_ns
            wait_ns = max(int(STRETCH_S * 1e9), LOOK_COST * self._look_ns)
            if now_ns - self._stretch_ns >= wait_ns:
                self._settle()

    def disown(self, bill: Bill) -> None:
        """No receipt is made of this bill, so its energy is nobody's."""
        with self._lock:
            self.billed_uj -= sum(window.energy_uj or 0 for window in bill.windows)

    def close(self, tab: Tab) -> Bill:
        """The request has left: its bill."""
        with self._lock:
            self._settle()
            duration_ns = clock.monotonic_ns() - tab.begin_ns
            windows = meters.end(tab.window)
            *parts_uj, own_ns = (shares.finish(tab) for shares in self._shares)
            bill = Bill(
                windows=tuple(
                    _part(window, part_uj, tab.faults.get(index))
                    for index, (window, part_uj) in enumerate(zip(windows, parts_uj, strict=True))
                ),
                started_at=tab.started_at,
                duration_ns=duration_ns,
                own_ns=own_ns,
                begin_boottime_ns=tab.window.begin_boottime_ns,
                company=tab.company,
            )
            self.billed_uj += sum(window.energy_uj or 0 for window in bill.windows)
            self._tabs.discard(tab)
            if not self._tabs:
                self._stop()
            return bill

    def _start(self) -> None:
        for meter in self.selection.meters:
            if meter.sampler is not None:
                meter.sampler.start()
        self._last = [_read(meter) for meter in self.selection.meters]
        self._stretch_ns = clock.monotonic_ns()

    def _stop(self) -> None:
        self.power_w = 0.0
        for meter in self.selection.meters:
            if meter.sampler is not None:
                meter.sampler.stop()
        for worker in self._workers:
            worker.held = [0] * len(self._shares)

    def _under_way(self, worker: Worker, now_ns: int) -> int:
        """Computing time of this stretch in a step that has not ended."""
        if worker.since_ns is None:
            return 0
        return max(0, now_ns - max(worker.since_ns, self._stretch_ns))

    def _settle(self) -> None:
        """Look at the meters, and share the stretch that ends here."""
        now_ns = clock.monotonic_ns()
        under_way_ns = {worker: self._under_way(worker, now_ns) for worker in self._workers}
        times_ns = {w: w.busy_ns + under_way_ns[w] for w in self._workers}
        if any(times_ns.values()):
            self._divide(now_ns, times_ns)
        for worker in self._workers:
            if any(worker.work.values()):
                for index, shares in enumerate(self._shares):
                    ended, worker.held[index] = largest_remainder(
                        worker.held[index], [max(1, worker.busy_ns), under_way_ns[worker]]
                    )
                    shares.add(ended, worker.work)
            worker.work.clear()
            worker.busy_ns = 0
        for tab in self._tabs:
            meters.keep_up(tab.window)

    def _divide(self, now_ns: int, times_ns: Mapping[Worker, int]) -> None:
        """Look at the meters, and give each worker its part of the stretch to hold."""
        amounts = [*self._gains(), now_ns - self._stretch_ns]
        self.total_uj += sum(amounts[:-1])
        self.power_w = sum(amounts[:-1]) * 1e3 / max(1, amounts[-1])
        self._stretch_ns = now_ns
        self._look_ns = clock.monotonic_ns() - now_ns
        for index, amount in enumerate(amounts):
            parts = largest_remainder(amount, list(times_ns.values()))
            for worker, part in zip(times_ns, parts, strict=True):
                worker.held[index] += part

    def _gains(self) -> list[int]:
        """Microjoules of each meter since the last look; a fault is noted, and counts as 0."""
        gains = []
        for index, (meter, before) in enumerate(
            zip(self.selection.meters, self._last, strict=True)
        ):
            try:
                after = meter.read()
                counts = 0 if before is None else gained(meter, before, after)
                fault = None if before is not None else "unreadable"
                self._last[index] = after
            except MeterFault as met:
                counts, fault = 0, met.fault
                self._last[index] = None
            gains.append(counts * UNIT_UJ[meter.unit])
            if fault is not None:
                for tab in self._tabs:
                    tab.faults[index] = fault
        return gains


def _read(meter: Meter) -> Reading | None:
    try:
        return meter.read()
    except MeterFault:
        return None


def _part(window: MeterWindow, part_uj: int, fault: str | None) -> MeterWindow:
    """A request's part of its own window; without a figure where a stretch of it has none."""
    if fault is not None or window.energy_uj is None:
        faults = window.faults or ((fault,) if fault else ())
        return replace(window, energy_uj=None, u_random_j=None, u_systematic_j=None, faults=faults)
    share = part_uj / window.energy_uj if window.energy_uj else 0.0
    return replace(
        window,
        energy_uj=part_uj,
        u_random_j=(window.u_random_j or 0.0) * share,
        u_systematic_j=(window.u_systematic_j or 0.0) * share,
        terms={name: term * share for name, term in window.terms.items()},
    )
