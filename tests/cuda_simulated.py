"""Run in a process of its own with NUMBA_ENABLE_CUDASIM=1: every kernel against its twin."""

from __future__ import annotations

import sys
import time
from typing import Any

import draws
import numpy as np
from cuda_cases import CASES, Simulator
from leangen_kernels.cuda.instructions import across
from numba import cuda, float32


def _race(machine: Simulator) -> str | None:
    """A kernel that lacks a barrier."""

    def kernel(y: Any) -> None:
        shared = cuda.shared.array(64, float32)
        lane = cuda.threadIdx.x
        shared[lane] = lane
        y[lane] = shared[63 - lane]

    y = np.zeros(64, np.float32)
    cuda.jit(kernel)[1, 64](y)
    return "a missing barrier does not show" if np.array_equal(y, np.arange(64)[::-1]) else None


def _absence(machine: Simulator) -> str | None:
    """A warp of which a lane stays away from a shuffle."""

    def kernel(y: Any) -> None:
        if cuda.threadIdx.x != 5:
            y[cuda.threadIdx.x] = across(float32(1), 1)

    try:
        cuda.jit(kernel)[1, 32](np.zeros(32, np.float32))
    except RuntimeError as error:
        return None if "31 threads of block" in str(error) else str(error)
    return "a lane that stays away is not missed"


def _unused(machine: Simulator) -> str | None:
    """Once all cases have run: kernels that none launched."""
    left = sorted(set(machine.kernels) - set(machine.made))
    return f"no case launches {', '.join(left)}" if left else None


LAST = {"races show": _race, "absent lanes show": _absence, "all kernels ran": _unused}


def main() -> int:
    """Runs the cases whose names begin with an argument; prints one line each."""
    machine = Simulator()
    failed = 0
    for name, case in CASES.items():
        if len(sys.argv) > 1 and not any(name.startswith(wanted) for wanted in sys.argv[1:]):
            continue
        begin = time.process_time()
        problem = case(machine, draws.rng())
        print(f"{name}: {problem or 'ok'} ({time.process_time() - begin:.1f} s)", flush=True)
        failed += problem is not None
    for name, check in () if len(sys.argv) > 1 else LAST.items():
        problem = check(machine)
        print(f"{name}: {problem or 'ok'}")
        failed += problem is not None
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
