"""Run in a process of its own with NUMBA_ENABLE_CUDASIM=1: every kernel against its twin."""

from __future__ import annotations

import sys
import time

import numpy as np
from cuda_cases import CASES, Simulator


def main() -> int:
    """Runs the cases whose names begin with an argument; prints one line each."""
    machine = Simulator()
    failed = 0
    for name, case in CASES.items():
        if len(sys.argv) > 1 and not any(name.startswith(wanted) for wanted in sys.argv[1:]):
            continue
        begin = time.process_time()
        problem = case(machine, np.random.default_rng())
        print(f"{name}: {problem or 'ok'} ({time.process_time() - begin:.1f} s)", flush=True)
        failed += problem is not None
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
