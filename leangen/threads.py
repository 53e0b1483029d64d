"""How many threads to use, from what this process may use: affinity, cgroup quota, SMT."""

from __future__ import annotations

import math
import os
from pathlib import Path

MOST = 1024
"""That may be asked for; far more cannot be started, and ONNX Runtime would wait for them."""


def choose(requested: int | None, *, root: Path = Path("/")) -> tuple[int, str]:
    """The number of intra-op threads and the reason for it.

    One thread per physical core that the scheduler lets us use, no more than the cgroup's CPU
    quota: a second hyper-thread adds contention, not multiply-adds.
    """
    if requested is not None:
        return requested, "asked for"
    allowed = sorted(os.sched_getaffinity(0))
    cores = {_physical_core(cpu, root) for cpu in allowed}
    reason = f"{len(cores)} physical cores of {len(allowed)} allowed CPUs"
    quota = cgroup_cpus(root)
    if quota is not None and quota < len(cores):
        return max(1, math.floor(quota)), f"{reason}, limited by a cgroup quota of {quota:g} CPUs"
    return len(cores), reason


def _physical_core(cpu: int, root: Path) -> str:
    siblings = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
    try:
        return siblings.read_text().strip()
    except OSError:
        return str(cpu)


def cgroup_cpus(root: Path) -> float | None:
    """CPUs that the tightest enclosing cgroup grants (v2 `cpu.max`, v1 `cfs_quota`), or None."""
    limits = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers == "":
            folder = root / "sys/fs/cgroup" / name.lstrip("/")
            for level in [folder, *folder.parents]:
                limits.append(_quota(level / "cpu.max"))
                if level == root / "sys/fs/cgroup":
                    break
        elif "cpu" in controllers.split(","):
            folder = root / "sys/fs/cgroup/cpu" / name.lstrip("/")
            limits.append(_quota(folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us"))
    return min((limit for limit in limits if limit is not None), default=None)


def _quota(*files: Path) -> float | None:
    try:
        quota, period = " ".join(file.read_text() for file in files).split()
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError):  # "max": no limit
        return None
