"""Energy and power of any other hwmon driver: amd_energy, PSUs, INA2xx, server power meters.

    /sys/class/hwmon/hwmonN/name             corsairpsu, ina226, power_meter, zenpower ...
                           /energy1_input    microjoules
                           /power1_input     microwatts now
                           /power1_average   microwatts, averaged by the device
                           /power1_label     what it is of, where the driver knows

(kernel docs, "Naming and data format standards for sysfs files"). Only the driver's author knows
what a sensor covers, so none of these joins a total by itself but one: `Esocket` of amd_energy is
the package, by the register that RAPL reads too. The others are shown and can be chosen:
`--meter hwmon:corsairpsu/power1`.

Class uncertainty, k=2, type B: 15% for amd_energy, as AMD's RAPL; 10% for others, judged. Tick:
0.1 s assumed for drivers that state no `update_interval`; power is sampled at twice that rate.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from leangen import clock
from leangen.meters import sysfs
from leangen.meters.meter import Meter, MeterFault, Tick, Unavailable
from leangen.meters.sampled import PowerSampler
from leangen.records import Reading

OTHERS = ("amdgpu", "ina3221")
"""Drivers that have a sensor module of their own."""
_FILE = re.compile(r"(energy|power)([0-9]+)_(input|average)")


def open(root: Path = Path("/")) -> list[Meter | Unavailable]:
    """A meter, or why there is none, for every energy and power channel under `root`."""
    supplies = {path.name for path in sysfs.children(root / "sys/class/power_supply")}
    found: list[Meter | Unavailable] = []
    seen: set[str] = set()
    for folder, driver in sysfs.hwmon(root):
        if driver in OTHERS or driver in supplies:
            continue
        device = f"{driver}@{folder.name}" if driver in seen else driver
        seen.add(driver)
        found += [_open_channel(root, driver, device, file) for file in _channels(folder)]
    if not found:
        return [Unavailable("hwmon", "no other energy or power sensor", "", in_total=False)]
    return found


def _channels(folder: Path) -> Iterator[Path]:
    """One file per channel; `power1_input` in place of `power1_average` where there are both."""
    files = {path.name: path for path in sysfs.children(folder) if _FILE.fullmatch(path.name)}
    for name, path in files.items():
        if not (name.endswith("_average") and name.replace("_average", "_input") in files):
            yield path


def _open_channel(root: Path, driver: str, device: str, file: Path) -> Meter | Unavailable:
    channel = file.name.rpartition("_")[0]
    label = sysfs.text(file.with_name(f"{channel}_label")) or channel
    name = f"hwmon:{device}/{label.replace(' ', '-')}"
    path = os.fspath(file)
    socket = driver == "amd_energy" and label.startswith("Esocket")
    try:
        sysfs.count(path)
    except MeterFault as fault:
        hint = sysfs.remedy(fault, file, root)
        return Unavailable(name, f"{file.name}: {fault.detail}", hint, in_total=socket)
    interval_ms = sysfs.text(file.with_name("update_interval")) or ""
    stated = interval_ms.isdecimal() and int(interval_ms) > 0
    tick = (
        Tick(int(interval_ms) / 1e3, "the driver's update_interval")
        if stated
        else Tick(0.1, "assumed")
    )
    counter = channel.startswith("energy")
    sampler = None
    if not counter:
        sampler = PowerSampler(lambda: sysfs.count(path) / 1e6, max(0.01, tick.seconds / 2))
    return Meter(
        name=name,
        source="measured" if counter else "integrated",
        scope=label.replace("Esocket", "package-") if socket else f"{device}/{label}",
        in_total=socket,
        unit="uJ",
        tick=Tick(1e-3, "as RAPL") if driver == "amd_energy" else tick,
        u_systematic=0.15 if driver == "amd_energy" else 0.10,
        max_power_w=3000.0,
        wraps_at=None,
        coverage=None,
        read=sampler.read
        if sampler
        else lambda: Reading(sysfs.count(path), "uJ", clock.monotonic_ns()),
        note=_note(driver, label, socket=socket),
        sampler=sampler,
    )


def _note(driver: str, label: str, *, socket: bool) -> str:
    if socket:
        return ""
    if driver == "amd_energy":
        return "inside its socket, counted there"
    if driver == "power_meter" or (driver == "corsairpsu" and label == "power total"):
        return "the whole machine: choose it with --meter"
    return "what it covers depends on the board: choose it with --meter"
