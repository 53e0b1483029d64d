"""A power sensor as a counter: a thread samples it while a window is open, trapezoids add up.

Outside windows nothing runs. A look of the window is a sample too, so the energy is exact to its
edges. With h the time between two samples and d the difference of their powers, the variance of
the energy grows per interval by

    h^2 d^2 / 2         white noise that sampling aliases; a step inside costs a sixth of it
    h^2 p^2 / 3 more    where h is a gap (over `GAP` periods: a starved thread, a sleeping machine):
                        there the power is only known to lie between 0 and twice the mean p

so a steady load has next to no sampling uncertainty and a bursty one shows it. Gaps count as not
covered. How fast to sample depends on the sensor: 1 Hz was off by up to 80% on an Odroid that
needed 350 Hz (arXiv 2206.10377); nothing is gained beyond the sensor's own rate.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

from leangen import clock
from leangen.meters.meter import MeterFault, Sampling
from leangen.records import Reading

GAP = 4


class PowerSampler:
    """Integrates `read_power_w` (watts; raises MeterFault) every `period_s`. Thread-safe."""

    def __init__(self, read_power_w: Callable[[], float], period_s: float) -> None:
        self.period_s = period_s
        self._read_power_w = read_power_w
        self._lock = threading.Lock()
        self._users = 0
        self._ended = threading.Event()
        self._fault: MeterFault | None = None
        self._energy_j = 0.0
        self._sampling = Sampling(0.0, 0, 0)
        self._at_ns = 0
        self._last: tuple[int, float] | None = None

    def start(self) -> None:
        """Sample from now on. A fault of earlier windows is forgotten."""
        with self._lock:
            self._users += 1
            if self._users > 1:
                return
            self._fault = None
            self._last = None
            self._ended = threading.Event()
        threading.Thread(
            target=self._run, args=(self._ended,), name="leangen-power-sampler", daemon=True
        ).start()

    def stop(self) -> None:
        """End one window's sampling."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._ended.set()
                self._last = None

    def read(self) -> Reading:
        """Sample now; the energy since the first window began, without the times between windows.

        Raises MeterFault, also for a fault that the thread met.
        """
        with self._lock:
            self._sample()
            return Reading(round(self._energy_j * 1e6), "uJ", self._at_ns)

    def sampling(self) -> Sampling:
        """The record so far."""
        with self._lock:
            return self._sampling

    def _run(self, ended: threading.Event) -> None:
        while not ended.wait(self.period_s):
            with self._lock:
                if ended.is_set():
                    return
                try:
                    self._sample()
                except MeterFault:
                    return  # kept: the next look of the window raises it

    def _sample(self) -> None:
        if self._fault is not None:
            raise self._fault
        try:
            before_ns = clock.monotonic_ns()
            power_w = self._read_power_w()
            self._at_ns = (before_ns + clock.monotonic_ns()) // 2
            if not math.isfinite(power_w):
                raise MeterFault("garbage", f"a power of {power_w} W")
        except MeterFault as fault:
            if self._users:
                self._fault = fault
            raise
        if self._last is not None:
            self._add(self._at_ns - self._last[0], self._last[1], power_w)
        if self._users:
            self._last = self._at_ns, power_w

    def _add(self, elapsed_ns: int, before_w: float, after_w: float) -> None:
        elapsed_s = elapsed_ns / 1e9
        self._energy_j += (before_w + after_w) / 2 * elapsed_s
        covered_ns = elapsed_ns if elapsed_s <= GAP * self.period_s else None
        self._sampling = self._sampling.extended(
            elapsed_s, before_w, after_w, covered_ns=covered_ns
        )
