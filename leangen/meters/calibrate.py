"""`leangen meters calibrate`: fit the estimate to a counter, a battery or an external meter.

Idle, one core, all cores, several times round, each a window of the reference with the CPU time
that this process took in it; then least squares (`fit.solve`). The load is element-wise NumPy
arithmetic in cache, one thread a core: vector units busy, no memory bandwidth.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from leangen import clock
from leangen.errors import RequestError
from leangen.meters.estimate import usable_cpus
from leangen.meters.fit import Fit, solve
from leangen.meters.meter import Selection
from leangen.meters.window import begin, end

ROUNDS = 3
LONGEST_S = 3600.0
"""A window; a fit that takes most of a day is a slip."""
Load = Callable[[int], AbstractContextManager[None]]
"""Keeps that many cores busy while its context is open."""


def calibrate(selection: Selection, seconds: float, *, load: Load | None = None) -> Fit:
    """Fit the estimate's two powers to `selection`, in about 9 windows of `seconds` each.

    Raises RequestError when there is nothing to fit to, when a window is too short for the
    reference's tick, or had a fault, or the figures make no sense.
    """
    if selection.source not in ("measured", "integrated"):
        raise RequestError(
            "nothing to calibrate against: no counter, board sensor or discharging battery can be "
            "read (`leangen meters` says why); give --meter exec:COMMAND or file:PATH of a wall or "
            "USB meter"
        )
    slowest = max(selection.meters, key=lambda meter: meter.tick.seconds)
    if seconds < 5 * slowest.tick.seconds:
        raise RequestError(
            f"--seconds {seconds:g} is too short for {slowest.name}, which moves every "
            f"{slowest.tick.seconds:g} s: give at least {5 * slowest.tick.seconds:g}"
        )
    if not seconds <= LONGEST_S:
        raise RequestError(f"--seconds is {seconds:g}, expected at most {LONGEST_S:g}")
    load = load or busy
    cpus = usable_cpus()
    most = max(1, int(cpus))
    levels = sorted({0, 1, most})
    rows = [_window(selection, seconds, cores, load) for _ in range(ROUNDS) for cores in levels]
    try:
        idle_w, core_w, residual = solve(rows)
    except ValueError as error:
        raise RequestError(
            f"the calibration failed: {error}; try again on a quiet machine"
        ) from None
    if idle_w < 0 or core_w <= 0:
        raise RequestError(
            f"the fit makes no sense: {idle_w:.3g} W idle, {core_w:.3g} W per busy core; "
            "try again on a quiet machine or with longer windows (--seconds)"
        )
    return Fit(
        idle_w=idle_w,
        core_w=core_w,
        residual=residual,
        reference=tuple(meter.name for meter in selection.meters),
        reference_u=max(meter.u_systematic for meter in selection.meters),
        cpus=cpus,
        windows=len(rows),
        date=clock.utc_now(),
    )


def _window(
    selection: Selection, seconds: float, cores: int, load: Load
) -> tuple[float, float, float]:
    """Wall seconds, CPU seconds and joules of one window."""
    with load(cores):
        clock.sleep(min(0.5, seconds / 4))  # clocks and governors settle
        cpu_ns, wall_ns = clock.process_cpu_ns(), clock.monotonic_ns()
        window = begin(selection)
        clock.sleep(seconds)
        windows = end(window)
        wall_s = (clock.monotonic_ns() - wall_ns) / 1e9
        cpu_s = (clock.process_cpu_ns() - cpu_ns) / 1e9
    energies_uj = [w.energy_uj for w in windows]
    faults = "; ".join(f"{w.sensor}: {', '.join(w.faults)}" for w in windows if w.faults)
    if faults or any(uj is None for uj in energies_uj):
        raise RequestError(f"a calibration window had no figure ({faults}): try again")
    return wall_s, cpu_s, sum(uj or 0 for uj in energies_uj) / 1e6


@contextmanager
def busy(cores: int) -> Iterator[None]:
    """Keep `cores` cores busy."""
    import numpy as np

    ended = threading.Event()

    def work() -> None:
        a = np.full(131_072, 1.0001, np.float32)
        b = np.full(131_072, 1e-4, np.float32)
        while not ended.is_set():
            for _ in range(100):  # NumPy lets the other threads run meanwhile
                np.multiply(a, a, out=a)
                np.add(a, b, out=a)
                np.minimum(a, 1.0, out=a)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(cores)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        ended.set()
        for worker in workers:
            worker.join()
