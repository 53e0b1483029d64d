"""The labelled estimate for machines without a counter: idle power plus CPU time.

    E = 0.74 W x CPUs x wall time  +  (3.50 - 0.74) W x CPU seconds of this process

0.74 W and 3.50 W are a server's power per logical CPU, idle and fully busy: the averages that Cloud
Carbon Footprint (Thoughtworks, "Methodology", 2021, AWS figures) took from the SPECpower_ssj2008
results. Its formula min + utilisation x (max - min) is the one above, with this process's own CPU
time as the utilisation. CPUs are those that this process may use: affinity and cgroup quota.

Class uncertainty, k=2: 60%. Published CPU-time models missed by 39-46% on the profiling data of
their own authors (codecarbon's linear and cubic models); a laptop or a board draws far from what a
server does per CPU. The factor is common to the idle and the active term, so it is stated as fully
systematic: it cancels in a comparison on one machine and never shrinks with repetition.

`leangen meters calibrate` fits the two powers to a counter, a battery or an external meter of this
machine (`fit`); the estimate then uses them with the fit's own, smaller u, and says so.

It is used only where no sensor can be read, and never added to a measurement.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from leangen import clock, threads
from leangen.meters import fit
from leangen.meters.meter import Meter, Tick, Unavailable
from leangen.records import Reading

IDLE_W_PER_CPU = 0.74
BUSY_W_PER_CPU = 3.50
U_SYSTEMATIC = 0.60


def open(root: Path = Path("/")) -> list[Meter | Unavailable]:
    """The estimate for this process; there always is one."""
    cpus = usable_cpus(root)
    stored = fit.load(root)
    idle_w, active_w, u_systematic, note = _server_averages(cpus)
    if stored is not None and stored.cpus == cpus:
        idle_w, active_w, u_systematic = stored.idle_w, stored.core_w, stored.u_systematic
        note = (
            f"{idle_w:.3g} W idle + {active_w:.3g} W x CPU time of this process, fitted to "
            f"{', '.join(stored.reference)} on {stored.date[:10]} with a residual of "
            f"{stored.residual:.1%}, within {u_systematic:.0%}"
        )
    elif stored is not None:
        note += (
            f"; the calibration of {stored.date[:10]} was with {stored.cpus:g} CPUs, not "
            f"{cpus:g}: run `leangen meters calibrate` again"
        )

    def read() -> Reading:
        cpu_ns = clock.process_cpu_ns()
        t_ns = clock.monotonic_ns()
        return Reading(int((idle_w * t_ns + active_w * cpu_ns) / 1e3), "uJ", t_ns)

    return [
        Meter(
            name="estimate:cpu-time",
            source="estimated",
            scope=f"process-{os.getpid()}",
            in_total=True,
            unit="uJ",
            tick=_probe_cpu_clock(),
            u_systematic=u_systematic,
            # It cannot jump as a sensor may, and seems to: the process may be stopped between the
            # two clocks of a reading, and other CPUs' threads are accounted for once a tick.
            max_power_w=math.inf,
            wraps_at=None,
            coverage=None,
            read=read,
            note=note,
            idle_power_w=idle_w,
        )
    ]


def usable_cpus(root: Path = Path("/")) -> float:
    """CPUs that this process may use: affinity, cut by the cgroup's quota."""
    allowed = float(len(os.sched_getaffinity(0)))
    quota = threads.cgroup_cpus(root)
    return allowed if quota is None else min(allowed, quota)


def _server_averages(cpus: float) -> tuple[float, float, float, str]:
    """Idle watts, watts per busy CPU, u and the note of the uncalibrated estimate."""
    active_w = BUSY_W_PER_CPU - IDLE_W_PER_CPU
    note = (
        f"{IDLE_W_PER_CPU} W idle x {cpus:g} CPUs + {active_w:.2f} W x CPU time of this "
        f"process (server averages of Cloud Carbon Footprint, 2021), within {U_SYSTEMATIC:.0%}"
    )
    return IDLE_W_PER_CPU * cpus, active_w, U_SYSTEMATIC, note


def _probe_cpu_clock() -> Tick:
    """The largest step of this process's CPU clock: under 10 us, or 4-10 ms on some kernels."""
    steps: list[int] = []
    last = clock.process_cpu_ns()
    give_up_ns = clock.monotonic_ns() + 50_000_000
    while len(steps) < 3 and clock.monotonic_ns() < give_up_ns:
        now = clock.process_cpu_ns()
        if now != last:
            steps.append(now - last)
            last = now
    if not steps:
        return Tick(0.05, "the CPU clock did not move in 50 ms of probing")
    return Tick(max(steps) / 1e9, "probed: the steps of the process's CPU clock")
