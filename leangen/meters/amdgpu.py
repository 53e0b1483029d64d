"""AMD GPUs, through the hwmon files of the amdgpu driver.

    /sys/class/hwmon/hwmonN/name             amdgpu
                           /energy1_input    microjoules, on the few cards that have it
                           /power1_input     microwatts now (kernel 6.6 and newer, APUs first)
                           /power1_average   microwatts, averaged by the firmware
                           /in1_label        `vddnb` on an APU, which a card does not have

Most devices have one of the two power files (kernel docs, "GPU Power/Thermal Controls"). Power is
sampled 50 times a second while a window is open. A card's figure covers its chip and memory as the
firmware sees them (PPT), on many cards not the board's own losses. An APU's covers the whole
socket, CPU cores included: it overlaps the RAPL package and stands in for it, never beside it.

Tick: the firmware averages over something under a second; 0.1 s is taken for `power1_input` and
1 s for `power1_average`. Class uncertainty, k=2, type B: 10%, judged; no calibration is published.
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

PERIOD_S = 0.02
POWERS = {
    "power1_input": Tick(0.1, "assumed: the firmware's instantaneous power"),
    "power1_average": Tick(1.0, "assumed: the firmware averages over up to 1 s"),
}


def open(root: Path = Path("/")) -> list[Meter | Unavailable]:
    """A meter, or why there is none, for every AMD GPU under `root`."""
    folders = [folder for folder, name in sysfs.hwmon(root) if name == "amdgpu"]
    if not folders:
        return [Unavailable("amdgpu", "no amdgpu device", "", in_total=False)]
    return [_open_gpu(root, folder, index) for index, folder in enumerate(folders)]


def _open_gpu(root: Path, folder: Path, index: int) -> Meter | Unavailable:
    name = f"amdgpu:{index}"
    apu = sysfs.text(folder / "in1_label") == "vddnb"
    scope = f"socket-{index}" if apu else f"gpu-{index}"
    note = "the whole socket, CPU cores too: overlaps the package" if apu else ""
    refused = ""
    hint = ""
    for file in ("energy1_input", *POWERS):
        path = folder / file
        try:
            sysfs.count(os.fspath(path))
        except MeterFault as fault:
            if fault.fault != "vanished":
                refused = f"{file}: {fault.detail}"
                hint = sysfs.remedy(fault, path, root)
            continue
        if file == "energy1_input":
            return _meter(name, scope, note, Tick(0.1, "assumed"), counter=path)
        return _meter(name, scope, f"{file} {note}".strip(), POWERS[file], power=path)
    return Unavailable(name, refused or "this GPU shows no power or energy", hint)


def _meter(
    name: str,
    scope: str,
    note: str,
    tick: Tick,
    *,
    counter: Path | None = None,
    power: Path | None = None,
) -> Meter:
    sampler = PowerSampler(_watts(power), PERIOD_S) if power is not None else None
    return Meter(
        name=name,
        source="integrated" if sampler else "measured",
        scope=scope,
        in_total=True,
        unit="uJ",
        tick=tick,
        u_systematic=0.10,
        max_power_w=3000.0,
        wraps_at=None,
        coverage=None,
        read=sampler.read if sampler else _count(counter or Path()),
        note=note,
        sampler=sampler,
    )


def _watts(path: Path) -> Callable[[], float]:
    file = os.fspath(path)
    return lambda: sysfs.count(file) / 1e6


def _count(path: Path) -> Callable[[], Reading]:
    file = os.fspath(path)
    return lambda: Reading(sysfs.count(file), "uJ", clock.monotonic_ns())
