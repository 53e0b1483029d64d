"""What can disturb a measurement, as far as this machine lets us read it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

CPU = "sys/devices/system/cpu"


def conditions(root: Path = Path("/")) -> dict[str, Any]:
    """Governor, boost, throttling and load; None where the machine does not tell.

    keys: governor (str), boost (bool), throttled (events since boot), load_1min (runnable
    processes), cpu (model name).
    """
    boost = _read(root / CPU / "cpufreq/boost")
    no_turbo = _read(root / CPU / "intel_pstate/no_turbo")
    throttled = [
        _read(path) for path in (root / CPU).glob("cpu[0-9]*/thermal_throttle/*_throttle_count")
    ]
    load = _read(root / "proc/loadavg")
    return {
        "governor": _read(root / CPU / "cpu0/cpufreq/scaling_governor"),
        "boost": boost == "1" if boost else (no_turbo == "0" if no_turbo else None),
        "throttled": sum(int(count) for count in throttled if count) if throttled else None,
        "load_1min": float(load.split()[0]) if load else None,
        "cpu": _cpu_model(root),
        "cpus": os.cpu_count(),
    }


def warnings(state: dict[str, Any]) -> list[str]:
    """What in `conditions` makes timings or joules less repeatable, in words."""
    found = []
    if state["governor"] not in (None, "performance"):
        found.append(f"the CPU governor is {state['governor']!r}: clocks change under load")
    if state["boost"]:
        found.append("boost is on: clocks depend on temperature and on the other cores")
    if state["throttled"]:
        found.append(f"the CPU throttled {state['throttled']} times since boot")
    if state["load_1min"] is not None and state["load_1min"] > 0.5 * (state["cpus"] or 1):
        found.append(f"the machine is busy (load {state['load_1min']:.1f})")
    unknown = [key for key in ("governor", "boost", "throttled") if state[key] is None]
    if unknown:
        found.append(f"this machine does not tell: {', '.join(unknown)}")
    return found


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _cpu_model(root: Path) -> str | None:
    for line in (_read(root / "proc/cpuinfo") or "").splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return None
