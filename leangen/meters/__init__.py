"""The meters: what can be read of energy on this machine, and what may form a total.

A sensor is one module with

    open(root=Path("/")) -> list[Meter | Unavailable]    root: a tree that stands in for /

one entry per domain that it knows of, never empty. Its docstring states the class uncertainty and
where that comes from. Using meters takes four calls:

    selection = select()
    window = begin(selection)
    ...                             keep_up(window) now and then
    windows = end(window)           to leangen.energy.account
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from leangen.errors import RequestError
from leangen.meters.baseline import least_seconds, measure_baseline
from leangen.meters.meter import Meter, MeterFault, Selection, Tick, Unavailable
from leangen.meters.probing import probe, probed
from leangen.meters.window import OpenWindow, begin, end, keep_up

__all__ = [
    "SENSORS",
    "Meter",
    "MeterFault",
    "OpenWindow",
    "Selection",
    "Tick",
    "Unavailable",
    "begin",
    "describe",
    "end",
    "keep_up",
    "least_seconds",
    "measure_baseline",
    "open_sensor",
    "probe",
    "probed",
    "select",
]

SENSORS = {
    "rapl": "leangen.meters.rapl",
    "nvml": "leangen.meters.nvml",
    "estimate": "leangen.meters.estimate",
}
"""Modules by name, imported on use: a run on the CPU never loads NVML."""

TOTALS = {"cpu": ("rapl",), "cuda": ("rapl", "nvml")}
"""The sensors whose domains form the total, by the device that a model runs on."""


def open_sensor(name: str, root: Path = Path("/")) -> list[Meter | Unavailable]:
    """What the sensor `name` of `SENSORS` finds under `root`."""
    return cast("list[Meter | Unavailable]", import_module(SENSORS[name]).open(root))


def select(root: Path = Path("/"), *, device: str = "cpu") -> Selection:
    """The meters of the total for a model that runs on `device` (`cpu` or `cuda`).

    Counters if there are any, otherwise the estimate: never both. Takes a millisecond on a CPU.
    Raises RequestError for another device.
    """
    return _choose({name: open_sensor(name, root) for name in _sensors_of(device)}, root)


def _sensors_of(device: str) -> Sequence[str]:
    if device not in TOTALS:
        raise RequestError(f"device is {device!r}, expected one of {', '.join(TOTALS)}")
    return TOTALS[device]


def _choose(found: dict[str, list[Meter | Unavailable]], root: Path) -> Selection:
    entries = [entry for entries in found.values() for entry in entries]
    missing = tuple(entry for entry in entries if isinstance(entry, Unavailable))
    chosen = tuple(entry for entry in entries if isinstance(entry, Meter) and entry.in_total)
    why = "; ".join(f"{entry.sensor}: {entry.reason}" for entry in missing if entry.in_total)
    if chosen:
        reason = f"not covered: {why}" if why else None
        return Selection(meters=chosen, reason=reason, unavailable=missing)
    estimate = [entry for entry in open_sensor("estimate", root) if isinstance(entry, Meter)]
    model = "; ".join(meter.note for meter in estimate)
    return Selection(
        meters=tuple(estimate),
        reason=f"estimated, not measured: {model}; no counter can be read ({why})",
        unavailable=missing,
    )


def describe(root: Path = Path("/"), *, device: str = "cpu") -> list[dict[str, Any]]:
    """What `leangen meters` shows: every sensor, probed, or why not and what would enable it.

    One dict per domain with `sensor`, `status` (`in total`, `available`, `unavailable`), `source`,
    `scope`, `tick_s`, `tick_how`, `u_systematic` (k=2, a fraction), `coverage`, `reason` and
    `remedy`; None where one does not apply. Probing ticks takes 10 ms a RAPL domain, 1 s a GPU.
    """
    found = {name: open_sensor(name, root) for name in SENSORS}
    selection = _choose({name: found[name] for name in _sensors_of(device)}, root)
    chosen = {meter.name for meter in selection.meters}
    return [
        _describe(entry, in_total=isinstance(entry, Meter) and entry.name in chosen)
        for entries in found.values()
        for entry in entries
    ]


def _describe(entry: Meter | Unavailable, *, in_total: bool) -> dict[str, Any]:
    if isinstance(entry, Unavailable):
        return {
            "sensor": entry.sensor,
            "status": "unavailable",
            "source": "unavailable",
            "scope": None,
            "tick_s": None,
            "tick_how": None,
            "u_systematic": None,
            "coverage": None,
            "reason": entry.reason,
            "remedy": entry.remedy or None,
        }
    meter = probe(entry)
    reason = meter.note
    if not in_total and meter.source == "estimated":
        reason = f"not used, as there is a counter: {reason}"
    elif not in_total and meter.in_total:
        reason = f"joins the total when a model runs on it: {reason}"
    return {
        "sensor": meter.name,
        "status": "in total" if in_total else "available",
        "source": meter.source,
        "scope": meter.scope,
        "tick_s": meter.tick.seconds,
        "tick_how": meter.tick.how,
        "u_systematic": meter.u_systematic,
        "coverage": meter.coverage,
        "reason": reason or None,
        "remedy": None,
    }
