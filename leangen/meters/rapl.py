"""RAPL energy counters of Intel and AMD processors, through the powercap files of Linux.

    /sys/class/powercap/intel-rapl:0/name                   package-0
    /sys/class/powercap/intel-rapl:0/energy_uj              cumulative microjoules
    /sys/class/powercap/intel-rapl:0/max_energy_range_uj    where it wraps
    /sys/class/powercap/intel-rapl:0:0/name                 core, uncore or dram, of package-0
    /sys/class/powercap/intel-rapl:1/name                   psys: the whole platform
    /sys/class/powercap/intel-rapl-mmio:0/name              package-0 again, by another register

The total is packages + dram, which are disjoint. core and uncore lie inside their package, psys
around everything; what psys covers depends on the board, so it is shown and not used.

Tick: the registers update about every 1 ms (Intel SDM vol. 3B, 16.10, "RAPL Interfaces").

Class uncertainty, k=2, type B (judged from the literature, not measured on this machine):

- 5% for Intel packages: since Haswell the energy is measured at the voltage regulators and
  follows an external reference closely (Hackenberg et al., IPDPSW 2015; Khan et al., "RAPL in
  action", ACM TOMPECS 2018), but no part is calibrated;
- 15% for other vendors: AMD's figures come from a model that misses data-dependent power (Schöne
  et al., "Energy efficiency aspects of the AMD Zen 2 architecture", arXiv 2108.00808);
- 20% for dram: a constant offset that varies between systems, worst when idle (Desrochers et al.,
  "A validation of DRAM RAPL power measurements", MEMSYS 2016).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from leangen import clock
from leangen.meters import sysfs
from leangen.meters.meter import Meter, MeterFault, Tick, Unavailable
from leangen.records import Reading

POWERCAP = "sys/class/powercap"
TICK = Tick(1e-3, "documented: RAPL updates about every 1 ms")
MAX_POWER_W = {"package": 1000.0, "dram": 300.0, "psys": 3000.0, "core": 1000.0, "uncore": 500.0}
OVERLAPS = {
    "core": "inside its package, counted there",
    "uncore": "inside its package, counted there",
    "psys": "covers the packages as well; what else depends on the board",
}
REMEDY = (
    "readable by root alone since CVE-2020-8694: `sudo chmod a+r /sys/class/powercap/*/energy_uj` "
    "until the next boot, or a udev rule for a group: "
    'SUBSYSTEM=="powercap", ACTION=="add", RUN+="/bin/sh -c \'chgrp power /sys%p/energy_uj; '
    "chmod g+r /sys%p/energy_uj'\""
)


def open(root: Path = Path("/")) -> list[Meter | Unavailable]:
    """A meter, or why there is none, for every RAPL domain under `root`; each domain once."""
    folder = root / POWERCAP
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        if (root / "proc/device-tree").is_dir():
            reason = f"there is no /{POWERCAP}: not an x86 machine"
            return [Unavailable("rapl", reason, "", in_total=False)]
        return [_no_zones(f"there is no /{POWERCAP}")]
    except OSError as error:
        return [_no_zones(f"cannot list /{POWERCAP} ({error.strerror})")]
    # Sorted so that an MSR zone (`intel-rapl:0`) comes before its double (`intel-rapl-mmio:0`).
    zones = sorted(n.split(":") for n in names if n.startswith("intel-rapl") and ":" in n)
    if not zones:
        return [_no_zones(f"/{POWERCAP} has no intel-rapl zone")]

    intel = is_intel(root)
    found: dict[str, tuple[str, Meter | Unavailable]] = {}
    for interface, *indices in zones:
        zone = ":".join([interface, *indices])
        kind, scope = _domain(folder, zone)
        if scope in found:
            first, known = found[scope]
            if first == interface:  # psys of a second socket
                scope = f"{scope}-{indices[-1]}"
            elif isinstance(known, Meter):
                continue
        found[scope] = interface, _open_zone(folder / zone, kind, scope, intel)
    meters = [meter for _, meter in found.values()]
    if any(isinstance(m, Meter) and m.scope.startswith("package") for m in meters):
        return meters
    alone = "memory alone is no total: no package can be read"
    return [
        replace(m, in_total=False, note=alone) if isinstance(m, Meter) and m.in_total else m
        for m in meters
    ]


def u_systematic(kind: str, *, intel: bool) -> float:
    """The class uncertainty (k=2, a fraction) of a RAPL domain, however it is read."""
    return 0.20 if kind == "dram" else 0.05 if intel else 0.15


def _no_zones(reason: str) -> Unavailable:
    return Unavailable(
        "rapl",
        reason,
        "on bare metal: `sudo modprobe intel_rapl_msr` (AMD: Linux 5.8 or newer); virtual machines "
        "and containers usually hide it",
    )


def _domain(folder: Path, zone: str) -> tuple[str, str]:
    """The kind of a zone (`dram`) and its scope (`dram-1`, after its package's name)."""
    name = sysfs.text(folder / zone / "name") or zone
    parent = zone.rpartition(":")[0]
    if ":" not in parent:
        return name.split("-")[0], name
    package = sysfs.text(folder / parent / "name") or parent
    return name, name + package.removeprefix("package")


def _open_zone(zone: Path, kind: str, scope: str, intel: bool) -> Meter | Unavailable:
    name = f"rapl:{scope}"
    in_total = kind in ("package", "dram")
    read = _reader(zone / "energy_uj")
    try:
        first = read()
    except MeterFault as fault:
        remedy = REMEDY if fault.fault == "permission" else ""
        return Unavailable(name, f"energy_uj: {fault.detail}", remedy, in_total)
    if first.count == 0:
        reason = "its counter stands at 0: this domain does not count"
        return Unavailable(name, reason, "", in_total)
    limit = sysfs.text(zone / "max_energy_range_uj")
    return Meter(
        name=name,
        source="measured",
        scope=scope,
        in_total=in_total,
        unit="uJ",
        tick=TICK,
        u_systematic=u_systematic(kind, intel=intel),
        max_power_w=MAX_POWER_W.get(kind, 1000.0),
        wraps_at=int(limit) if limit and limit.isdecimal() and int(limit) > 0 else None,
        coverage=1.0,
        read=read,
        note=OVERLAPS.get(kind, ""),
    )


def _reader(path: Path) -> Callable[[], Reading]:
    file = os.fspath(path)

    def read() -> Reading:
        return Reading(sysfs.count(file), "uJ", clock.monotonic_ns())

    return read


def is_intel(root: Path) -> bool:
    """Whether /proc/cpuinfo names Intel; False where it cannot be read."""
    try:
        with (root / "proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            return any("GenuineIntel" in line for line, _ in zip(file, range(40), strict=False))
    except OSError:
        return False
