"""What measuring adds to a generation of 50 ms.

    python bench/overhead.py --json

Counters on a powercap tree in memory (a package and its dram) stand in for RAPL, so what the
hardware needs for a read (a few us) is not in the figures; CPU time is of this process alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from leangen import attribution, clock, energy, meters
from leangen.records import MeterWindow

GENERATION_S = 0.050
STEPS = 50


def tree(root: Path) -> Path:
    """A package with dram, both counting."""
    for zone, name in (("intel-rapl:0", "package-0"), ("intel-rapl:0:0", "dram")):
        folder = root / "sys/class/powercap" / zone
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text("262143328850\n")
        (folder / "energy_uj").write_text("1000000\n")
    return root


def median_us(work: Callable[[], object], repeats: int = 300) -> float:
    """Median CPU time of one call, in microseconds."""
    spent = []
    for _ in range(repeats):
        start_ns = clock.process_cpu_ns()
        work()
        spent.append((clock.process_cpu_ns() - start_ns) / 1e3)
    return statistics.median(spent)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        selection = meters.select(tree(Path(folder)))
        window = meters.begin(selection)
        window.due_ns = 2**62
        idle_us = median_us(lambda: [meters.keep_up(window) for _ in range(100)]) / 100
        look_us = median_us(window.look)
        edges_us = median_us(lambda: meters.end(meters.begin(selection)))
        cpu_us = 2 * median_us(attribution.cpu_times)
        closed = [
            MeterWindow(
                sensor=meter.name,
                source="measured",
                energy_uj=1_000_000,
                u_random_j=0.02,
                u_systematic_j=0.05,
                tick_s=0.001,
            )
            for meter in selection.meters
        ]
        steps = [("prefill", 10**6), *[("decode", 10**6)] * (STEPS - 1)]
        account_us = median_us(
            lambda: energy.account(
                closed,
                scope=selection.scope,
                reason=None,
                duration_ns=int(GENERATION_S * 1e9),
                baseline=None,
                units=STEPS,
                steps=steps,
            )
        )
    budget_us = GENERATION_S * 1e6
    # Looks are due when 1/200 of the time since the last pays for them, at every step at most.
    looks = min(STEPS, budget_us / max(look_us * 200, 2500))
    total_us = edges_us + cpu_us + STEPS * idle_us + looks * look_us
    figures = {
        "begin_and_end_us": edges_us,
        "cpu_times_us": cpu_us,
        "step_us": idle_us,
        "look_us": look_us,
        "looks": looks,
        "within_generation_us": total_us,
        "share_of_50_ms": total_us / budget_us,
        "account_after_us": account_us,
    }
    if args.json:
        print(json.dumps(figures))
    else:
        for name, value in figures.items():
            print(f"{name:22}{value:12.4g}")
    return 0 if total_us < 0.01 * budget_us else 1


if __name__ == "__main__":
    sys.exit(main())
