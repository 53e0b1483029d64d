"""The meters: what can be read of energy on this machine, and what may form a total.

A sensor is one module with

    open(root=Path("/")) -> list[Meter | Unavailable]    root: a tree that stands in for /

one entry per domain that it knows of, never empty; it never raises. Its docstring states the class
uncertainty and where that comes from. Using meters takes four calls:

    selection = select()
    window = begin(selection)
    ...                             keep_up(window) now and then
    windows = end(window)           to leangen.energy.account

What forms the total: disjoint domains of one source, and the first of these that can be read:

1. the meter that was asked for (`--meter`), alone: who plugs one in knows what it covers;
2. package counters: RAPL by powercap, else by perf events, Apple's, amd_energy's. They count
   continuously, so nothing between two looks is missed;
3. sampled board or socket power: INA3221, the Pi 5's PMIC, an AMD APU. Wider, with sampling error;
4. a discharging battery: the whole machine and its screen, renewed every few seconds;
5. the estimate.

A model on a GPU adds the GPU's meters to 2 where both are counters; where they are of different
sources, or there is no 2, the GPU alone is the total, except on boards whose input rail (3) feeds
the GPU too. psys, batteries, PSUs and wall meters are wider than packages and hold them: they are
never summed with them.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any, cast

from leangen.errors import RequestError
from leangen.meters.baseline import least_seconds, measure_baseline
from leangen.meters.meter import Meter, MeterFault, Sampling, Selection, Tick, Unavailable
from leangen.meters.probing import probe, probed
from leangen.meters.uncertainty import edges_relative_u, plan_repeats
from leangen.meters.window import OpenWindow, begin, end, keep_up

__all__ = [
    "SENSORS",
    "Meter",
    "MeterFault",
    "OpenWindow",
    "Sampling",
    "Selection",
    "Tick",
    "Unavailable",
    "begin",
    "choose",
    "describe",
    "edges_relative_u",
    "end",
    "is_external",
    "keep_up",
    "least_seconds",
    "measure_baseline",
    "open_sensor",
    "plan_repeats",
    "probe",
    "probed",
    "select",
]

SENSORS = {
    "rapl": "leangen.meters.rapl",
    "perf_event": "leangen.meters.perf_event",
    "apple": "leangen.meters.apple",
    "nvml": "leangen.meters.nvml",
    "amdgpu": "leangen.meters.amdgpu",
    "ina3221": "leangen.meters.ina3221",
    "pmic": "leangen.meters.pmic",
    "hwmon": "leangen.meters.hwmon",
    "battery": "leangen.meters.battery",
    "estimate": "leangen.meters.estimate",
}
"""Modules by name, imported on use: a run on the CPU never loads NVML."""

PACKAGES = ("rapl", "perf_event", "apple", "hwmon")
BOARDS = ("ina3221", "pmic", "amdgpu")
GPUS = {"cpu": None, "cuda": "nvml", "rocm": "amdgpu"}
"""The sensor of the GPU, by the device that a model runs on."""

Found = list[Meter | Unavailable]
_external: dict[str, Meter] = {}
"""External meters of this process: two models share one, as one serial port can be read once."""


def open_sensor(name: str, root: Path = Path("/")) -> Found:
    """What the sensor `name` of `SENSORS` finds under `root`."""
    return cast(Found, import_module(SENSORS[name]).open(root))


def select(root: Path = Path("/"), *, device: str = "cpu", meter: str | None = None) -> Selection:
    """The meters of the total for a model that runs on `device` (`cpu`, `cuda` or `rocm`).

    `meter` overrides the rule: `exec:COMMAND`, `file:PATH`, or a name that `leangen meters` shows.
    Sensors are opened in the order of the rule until one can be read: a few milliseconds.

    Raises RequestError for another device, and for a `meter` that cannot be read.
    """
    if meter is not None:
        return Selection(meters=(_asked_for(meter, root),), reason=f"--meter {meter}")
    return choose(device, root, {})


def is_external(spec: str) -> bool:
    """Whether `spec` names a meter outside the machine."""
    return spec.startswith(("exec:", "file:"))


def _asked_for(spec: str, root: Path) -> Meter:
    if is_external(spec):
        from leangen.meters.external import open_external

        known = _external.get(spec)
        try:
            if known is not None:
                known.read()
        except MeterFault:
            known = None
        _external[spec] = known or open_external(spec)
        return _external[spec]
    sensor = spec.partition(":")[0]
    if sensor not in SENSORS:
        raise RequestError(
            f"--meter {spec!r}: expected exec:COMMAND, file:PATH or a name that "
            "`leangen meters` shows"
        )
    entries = open_sensor(sensor, root)
    for entry in entries:
        if isinstance(entry, Meter) and entry.name == spec:
            return entry
        if isinstance(entry, Unavailable) and entry.sensor in (spec, sensor):
            raise RequestError(f"--meter {spec}: {entry.reason}. {entry.remedy}".rstrip(". "))
    names = ", ".join(entry.name for entry in entries if isinstance(entry, Meter))
    raise RequestError(f"--meter {spec}: there is no such meter; {sensor} has {names or 'none'}")


def choose(device: str, root: Path, found: dict[str, Found]) -> Selection:
    """`select` by the rule, over sensors that are `found` already; others are opened and added."""
    if device not in GPUS:
        raise RequestError(f"device is {device!r}, expected one of {', '.join(GPUS)}")
    asked: list[str] = []

    def of(sensor: str, *, gpu: bool = False) -> list[Meter]:
        if sensor not in found:
            found[sensor] = open_sensor(sensor, root)
        if sensor not in asked:
            asked.append(sensor)
        return [
            entry
            for entry in found[sensor]
            if isinstance(entry, Meter) and entry.in_total and is_gpu(entry) == gpu
        ]

    gpu_sensor = GPUS[device]
    packages = next((meters for sensor in PACKAGES if (meters := of(sensor))), [])
    gpus = of(gpu_sensor, gpu=True) if gpu_sensor else []
    left_out: list[str] = []
    if gpus:
        kept = [meter for meter in gpus if meter.source == gpus[0].source]
        left_out += [f"{m.name}: it is {m.source}" for m in gpus if m not in kept]
        if packages and packages[0].source != gpus[0].source:
            left_out += [f"{m.name}: it is {m.source}" for m in packages]
            packages = []
        chosen = packages + kept
    else:
        chosen = packages
        for sensor in (*BOARDS, "battery"):
            chosen = chosen or of(sensor)

    missing = tuple(
        entry for sensor in asked for entry in found[sensor] if isinstance(entry, Unavailable)
    )
    if not chosen:
        why = "; ".join(f"{entry.sensor}: {entry.reason}" for entry in missing if entry.in_total)
        estimate = [entry for entry in open_sensor("estimate", root) if isinstance(entry, Meter)]
        model = "; ".join(meter.note for meter in estimate)
        return Selection(
            meters=tuple(estimate),
            reason=f"estimated, not measured: {model}; no counter can be read ({why})",
            unavailable=missing,
        )
    used = {meter.name.partition(":")[0] for meter in chosen}
    if gpu_sensor:
        used.add(gpu_sensor)
    left_out += [
        f"{entry.sensor}: {entry.reason}"
        for entry in missing
        if entry.in_total and entry.sensor.partition(":")[0] in used
    ]
    reasons = [f"sampled, not counted: {m.name}: {m.note}" for m in chosen if m.sampler is not None]
    if left_out:
        reasons.append(f"not covered: {'; '.join(left_out)}")
    return Selection(meters=tuple(chosen), reason="; ".join(reasons) or None, unavailable=missing)


def is_gpu(meter: Meter) -> bool:
    """Whether it covers a graphics card."""
    return meter.scope.startswith("gpu-")


def describe(
    root: Path = Path("/"), *, device: str = "cpu", meter: str | None = None
) -> list[dict[str, Any]]:
    """What `leangen meters` shows of every sensor: `leangen.meters.listing.describe`."""
    from leangen.meters import listing

    return listing.describe(root, device=device, meter=meter)
