"""How a tuned model is run: steps, where the family has them, threads, and how long they spin.

Fewer steps cost quality, so they are chosen first, by what the exact model loses with them; the
precision of the nodes then has what is left of the budget, and both are judged together. Threads
and spinning change time and joules alone: they are tried on the finished bundle, in turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from leangen import clock, families, quality, threads
from leangen.bundle import Bundle
from leangen.console import Progress
from leangen.quality import Measure, Task
from leangen.session import SPIN_US, Session
from leangen.tune import costs
from leangen.tune.costs import Objective

SPINS_US = (0, SPIN_US, 1000)
"""Microseconds that an idle thread waits busily for more work; ORT's own is about the last."""
ROUNDS = 3
_STEPS_SHARE = 0.5
"""Of the budget's squared loss that fewer steps may take."""


def fewest_steps(
    session: Session,
    task: Task,
    observed: Any,
    within: Callable[[list[Measure], float], bool],
    progress: Progress,
) -> int | None:
    """The fewest steps with which the exact model stays within a share of the budget.

    observed: of the exact model with its usual steps. within: (measures, share of the squared loss)
    -> whether they are. None where the family has no steps, or as few as can be.
    """
    config = session.bundle.config
    usual = task.steps or config.get("steps")
    if session.bundle.family != "diffusion" or not usual or usual < 2:
        return None
    least, enough = 0, int(usual)
    while enough - least > 1:
        steps = (least + enough) // 2
        progress(0, 0, f"trying {steps} of {usual} steps")
        fewer = quality.observe(session, observed, replace(task, steps=steps))
        if within(quality.measure(session.bundle, observed, fewer), _STEPS_SHARE):
            enough = steps
        else:
            least = steps
    return enough


def best_run(bundle: Bundle, aim: Objective, progress: Progress) -> dict[str, int]:
    """Threads and spin time of least cost for a generation of the family's example."""
    most, _ = threads.choose(None)
    tried = list(product(_halves(most), SPINS_US))
    runs = [_run(bundle, count, spin_us) for count, spin_us in tried]
    spent: list[list[float]] = [[] for _ in runs]
    for turn in range(ROUNDS + 1):
        for place, run in enumerate(runs):
            progress(place, len(runs), f"{tried[place][0]} threads, {tried[place][1]} us")
            begin_ns = clock.monotonic_ns()
            run()
            seconds = (clock.monotonic_ns() - begin_ns) / 1e9
            if turn:  # the first warms up
                meter = aim.selection
                spent[place].append(seconds if meter is None else costs.joules(run, seconds, meter))
    best = int(np.argmin([np.median(each) for each in spent]))
    return {"threads": tried[best][0], "spin_us": tried[best][1]}


def _halves(most: int) -> Iterator[int]:
    while most:
        yield most
        most //= 2


def _run(bundle: Bundle, count: int, spin_us: int) -> Callable[[], None]:
    tried = replace(bundle, config={**bundle.config, "run": {"spin_us": spin_us}})
    session = Session(tried, threads=count)
    family = families.of(bundle)
    request = family.Request(**family.EXAMPLE)

    def run() -> None:
        for _ in family.run(session, request):
            pass

    return run
