"""A battery that feeds the machine: what it gives while it discharges.

    /sys/class/power_supply/BAT0/type         Battery
                                /scope        `Device` for a mouse: not ours
                                /status       Discharging, Charging, Full ...
                                /power_now    microwatts, or
                                /current_now  microamperes, with
                                /voltage_now  microvolts
                                /energy_now   microwatt-hours left, or
                                /charge_now   microampere-hours left

(kernel docs, "Linux power supply class"). It covers the whole machine with its screen, so it is a
total of its own and never summed with the processor. On mains it sees nothing of the load.

Power is sampled once a second: the firmware renews it every 1 to 30 s, which the tick of 5 s
assumes in the middle. What is left (`battery:BAT0/left`) is a counter in steps of about 36 J
(10 mWh): for runs of many minutes, to be chosen with --meter. Class uncertainty, k=2, type B: 10%
for power, 15% for what is left, which is a model of the cells; judged, not published.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from leangen import clock
from leangen.meters import sysfs
from leangen.meters.meter import Meter, MeterFault, Tick, Unavailable
from leangen.meters.sampled import PowerSampler
from leangen.records import Reading

SUPPLIES = "sys/class/power_supply"
PERIOD_S = 1.0
UJ_PER_UWH = 3600


def open(root: Path = Path("/")) -> list[Meter | Unavailable]:
    """The meters of every battery that is discharging, or why it cannot be used."""
    batteries = [
        folder
        for folder in sysfs.children(root / SUPPLIES)
        if sysfs.text(folder / "type") == "Battery" and sysfs.text(folder / "scope") != "Device"
    ]
    if not batteries:
        return [Unavailable("battery", "no battery feeds this machine", "", in_total=False)]
    found: list[Meter | Unavailable] = []
    for folder in batteries:
        found += _open_battery(root, folder)
    return found


def _open_battery(root: Path, folder: Path) -> list[Meter | Unavailable]:
    name = f"battery:{folder.name}"
    status = sysfs.text(folder / "status") or "unknown"
    if status != "Discharging":
        reason = f"its status is {status}: it sees the load only while discharging"
        return [Unavailable(name, reason, "unplug the charger", in_total=False)]
    found: list[Meter | Unavailable] = []
    watts = _watts(folder)
    try:
        watts()
    except MeterFault as fault:
        file = next((f for f in ("power_now", "current_now") if (folder / f).exists()), "power_now")
        hint = sysfs.remedy(fault, folder / file, root)
        found.append(Unavailable(name, f"{file}: {fault.detail}", hint))
    else:
        sampler = PowerSampler(watts, PERIOD_S)
        found.append(
            Meter(
                name=name,
                source="integrated",
                scope=folder.name,
                in_total=True,
                unit="uJ",
                tick=Tick(5.0, "assumed: firmware renews its figures every 1 to 30 s"),
                u_systematic=0.10,
                max_power_w=500.0,
                wraps_at=None,
                coverage=None,
                read=sampler.read,
                note="the whole machine, screen included",
                sampler=sampler,
            )
        )
    left = _left_uj(folder)
    try:
        full_uj = left()
    except MeterFault:
        return found
    return [
        *found,
        Meter(
            name=f"{name}/left",
            source="measured",
            scope=folder.name,
            in_total=False,
            unit="uJ",
            tick=Tick(30.0, "assumed: steps of 10 mWh"),
            u_systematic=0.15,
            max_power_w=500.0,
            wraps_at=None,
            coverage=1.0,
            read=lambda: Reading(full_uj - left(), "uJ", clock.monotonic_ns()),
            note="slow and coarse: for runs of many minutes, choose it with --meter",
        ),
    ]


def _watts(folder: Path) -> Callable[[], float]:
    power, current, voltage = (
        os.fspath(folder / file) for file in ("power_now", "current_now", "voltage_now")
    )
    has_power = os.path.exists(power)

    def read() -> float:
        _require_discharging(folder)
        # Some drivers give the current of a discharge a minus sign.
        if has_power:
            return abs(sysfs.integer(power)) / 1e6
        return abs(sysfs.integer(current)) * sysfs.count(voltage) / 1e12

    return read


def _left_uj(folder: Path) -> Callable[[], int]:
    energy, charge, voltage = (
        os.fspath(folder / file) for file in ("energy_now", "charge_now", "voltage_now")
    )
    has_energy = os.path.exists(energy)
    nominal_uv = 0 if has_energy else _number(folder / "voltage_min_design", voltage)

    def read() -> int:
        _require_discharging(folder)
        if has_energy:
            return sysfs.count(energy) * UJ_PER_UWH
        # One fixed voltage: the present one falls with the load, which would look like energy.
        return sysfs.count(charge) * nominal_uv * UJ_PER_UWH // 1_000_000

    return read


def _number(*files: Path | str) -> int:
    for file in files:
        try:
            return sysfs.count(os.fspath(file))
        except MeterFault:
            continue
    return 0


def _require_discharging(folder: Path) -> None:
    status = sysfs.text(folder / "status")
    if status != "Discharging":
        raise MeterFault("unreadable", f"the battery's status is now {status or 'unknown'}")
