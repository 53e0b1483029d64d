"""Does the truth lie within value ± u?

    python bench/coverage.py
    python bench/coverage.py --full --json

For every cell (sensor x power law x length in ticks) many windows are measured in a simulated world
(`power_world.py`), each on a counter with a gain of its own, drawn from what the class uncertainty
states. A cell passes when

- value ± u holds the truth in at least 93.5% of its windows, and
- the mean u is at most 1.5 times the cell's own 95th percentile of |error| for stationary power
  from 10 ticks up, at most 3 times elsewhere: an interval that says nothing would hold as well.

Windows without a figure (`ambiguous` ones of 2 ticks) are counted apart. The laws marked * had no
say in the choice of the formulas. Exits with 1 when a cell fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from statistics import NormalDist
from typing import Any

import numpy as np
import power_world as pw

if __name__ == "coverage":  # Numba and others use that package where they find it
    raise ImportError("bench/coverage.py is a script, not the package `coverage`")

LENGTHS = (2, 3, 5, 10, 30, 100, 300, 1000)
SUBSET = (2, 5, 10, 30, 100)
LEAST_COVERAGE = 0.935
Cell = tuple[str, str, int]


def measure(cell: Cell, windows: int, *, aligned: bool = False) -> dict[str, Any]:
    """One row of the table."""
    sensor_name, law_name, length = cell
    sensor = pw.SENSORS[sensor_name]
    law = (pw.DESIGN | pw.HELD_OUT)[law_name]
    rng = np.random.default_rng(zlib.crc32(repr(cell).encode()))
    # Gains at the quantiles of their distribution, in random order: every sensor once.
    normal = NormalDist()
    gains = [normal.inv_cdf((i + 0.5) / windows) for i in rng.permutation(windows)]
    rows = []
    world = pw.World()
    with ExitStack() as stack:
        meter = pw.probed(world, sensor, stack, rng)
        for gain in gains:
            closed, truth_j = pw.trial(
                world,
                meter,
                sensor,
                law,
                length + rng.uniform(-0.5, 0.5),
                rng,
                1 + meter.u_systematic / 2 * gain,
                aligned=aligned,
            )
            if closed.energy_uj is not None:
                u_j = np.hypot(closed.u_random_j, closed.u_systematic_j)
                rows.append((closed.energy_uj / 1e6 - truth_j, u_j, truth_j))
    error_j, u_j, truth_j = np.array(rows).T
    p95_j = float(np.percentile(np.abs(error_j), 95))
    limit = 1.5 if law_name in pw.STATIONARY and length >= 10 else 3.0
    held = float((np.abs(error_j) <= u_j).mean())
    ratio = float(u_j.mean() / p95_j)
    return {
        "sensor": sensor_name,
        "law": law_name,
        "held_out": law_name in pw.HELD_OUT,
        "ticks": length,
        "windows": windows,
        "no_figure": 1 - len(rows) / windows,
        "coverage": held,
        "u_relative": float((u_j / truth_j).mean()),
        "bias_relative": float(error_j.mean() / truth_j.mean()),
        "ratio": ratio,
        "limit": limit,
        "pass": held >= LEAST_COVERAGE and ratio <= limit,
    }


def run(cells: list[Cell], windows: int, aligned: bool = False) -> list[dict[str, Any]]:
    """All rows, on all CPUs; long cells first."""
    order = sorted(cells, key=lambda cell: -cell[2])
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        jobs = {cell: pool.submit(measure, cell, windows, aligned=aligned) for cell in order}
        return [jobs[cell].result() for cell in cells]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="every cell, 10,000 windows each")
    parser.add_argument("--windows", type=int, help="windows per cell")
    parser.add_argument("--aligned", action="store_true", help="begin on a tick, as benchmarks do")
    parser.add_argument("--sensor", choices=pw.SENSORS, action="append")
    parser.add_argument("--law", choices=pw.DESIGN | pw.HELD_OUT, action="append")
    parser.add_argument("--ticks", type=int, action="append")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    cells = [
        (sensor, law, ticks)
        for sensor in args.sensor or pw.SENSORS
        for law in args.law or pw.DESIGN | pw.HELD_OUT
        for ticks in args.ticks or (LENGTHS if args.full else SUBSET)
    ]
    rows = run(cells, args.windows or (10_000 if args.full else 500), args.aligned)
    failed = [row for row in rows if not row["pass"]]
    if args.json:
        print(json.dumps({"rows": rows, "failed": len(failed)}))
        return 1 if failed else 0
    print(
        f"{'sensor':12}{'law':18}{'ticks':>6}{'none':>7}{'held':>8}"
        f"{'u':>8}{'bias':>8}{'u/p95':>7}{'limit':>6}"
    )
    for row in rows:
        law = row["law"] + ("*" if row["held_out"] else "")
        print(
            f"{row['sensor']:12}{law:18}{row['ticks']:6}{row['no_figure']:7.1%}"
            f"{row['coverage']:8.2%}{row['u_relative']:8.1%}{row['bias_relative']:8.1%}"
            f"{row['ratio']:7.2f}{row['limit']:6.1f}  {'' if row['pass'] else 'FAILED'}"
        )
    for name, held_out in (("design", False), ("held-out", True)):
        part = [row for row in rows if row["held_out"] is held_out]
        if part:
            print(
                f"{name}: {len(part)} cells of {part[0]['windows']} windows, "
                f"{sum(not row['pass'] for row in part)} failed; held at least "
                f"{min(row['coverage'] for row in part):.2%}, mean u at most "
                f"{max(row['ratio'] / row['limit'] for row in part):.2f} of its limit"
            )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
