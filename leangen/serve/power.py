"""Holding back: budgets, a cap on power, and cleaner hours for what can wait."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta

from leangen import clock
from leangen.budget import Guard
from leangen.errors import RequestError
from leangen.intensity import Series
from leangen.serve.problems import BudgetError

BURST_S = 5.0
"""So long may the power be above the cap after a rest."""
LONGEST_PAUSE_S = 1.0


def hold_to_budgets(guard: Guard, tag: str | None) -> None:
    """BudgetError where a budget is used up: what a client is told of it, who cannot raise it."""
    state = guard.refusing(tag)
    if state is not None:
        raise BudgetError(f"{state}; nothing was generated")


class PowerCap:
    """Keeps the mean power at `cap_w`: steps wait while more energy was used than the cap allows.

    The allowance grows by `cap_w` each second, up to `BURST_S` of it, and the account's energy is
    taken off. It works on what the meters see while requests are served; a cap below the machine's
    idle power cannot be kept, and then each step waits the longest pause.
    """

    def __init__(self, cap_w: float) -> None:
        if not 0 < cap_w < float("inf"):
            raise RequestError(f"power cap is {cap_w} W, expected more than 0")
        self.cap_w = cap_w
        self._lock = threading.Lock()
        self._allowance_j = cap_w * BURST_S
        self._seen_uj = 0
        self._seen_ns = clock.monotonic_ns()

    def pause_s(self, total_uj: int) -> float:
        """How long to wait after a step, given the account's total up to now."""
        with self._lock:
            now_ns = clock.monotonic_ns()
            grown_j = self.cap_w * (now_ns - self._seen_ns) / 1e9
            spent_j = (total_uj - self._seen_uj) / 1e6
            self._seen_uj, self._seen_ns = total_uj, now_ns
            self._allowance_j += grown_j - spent_j
            self._allowance_j = min(self._allowance_j, self.cap_w * BURST_S)
            return min(max(0.0, -self._allowance_j / self.cap_w), LONGEST_PAUSE_S)


def cleanest_delay_s(series: Series, now: str, horizon_s: float) -> tuple[float, float]:
    """(seconds until the cleanest known step within the horizon, its gCO2e/kWh).

    0 seconds where now is the cleanest. Raises RequestError where the file has no value for now.
    """
    here = series.at(now)
    moment = datetime.fromisoformat(now).astimezone(UTC)
    end = moment + timedelta(seconds=horizon_s)
    best_s, best_g = 0.0, here.intensity_g_per_kwh
    for start, intensity in zip(series.starts, series.intensities_g_per_kwh, strict=True):
        if moment < start <= end and intensity < best_g:
            best_s, best_g = (start - moment).total_seconds(), intensity
    return best_s, best_g
