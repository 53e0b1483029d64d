"""The INA3221 power monitors of NVIDIA Jetson boards: three rails each, sampled.

    /sys/class/hwmon/hwmonN/name             ina3221 (JetPack 5 and newer)
                           /in1_label        rail: VDD_IN, VDD_CPU_GPU_CV, VDD_SOC ...
                           /in1_input        millivolts
                           /curr1_input      milliamperes
                           /update_interval  milliseconds per conversion of all channels
    /sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_0 in_power0_input     (JetPack 4: mW)

Power is V x I per rail. One rail is the board's input (VDD_IN, POM_5V_IN): that alone is the
total, as every other rail is fed from it. Boards without one (AGX) have a documented set of module
rails that add up instead; VDDQ_VDD2_1V8AO is fed from VIN_SYS_5V0 and stays out. All of it misses
what is drawn before the shunts: the carrier board, USB devices, the supply's own loss.

Sampled as fast as the chip converts, at most 350 times a second: that rate was needed on a board
where 1 Hz was off by up to 80% (arXiv 2206.10377). Two I2C reads a sample cost about 1 ms of one
core's sleep, under 1% of its time.

Class uncertainty, k=2, type B: 5%. Shunt, gain and offset of the chip give about 1% at full scale
(TI datasheet SBOS576), but V and I come from different conversions and small currents see the
80 uV offset.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from leangen.meters import sysfs
from leangen.meters.meter import Meter, MeterFault, Tick, Unavailable
from leangen.meters.sampled import PowerSampler

INPUTS = ("VDD_IN", "POM_5V_IN")
MODULE_RAILS = (
    frozenset({"VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"}),  # AGX Orin
    frozenset({"GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"}),  # AGX Xavier
)
FASTEST_S = 1 / 350
DEFAULT_INTERVAL_S = 0.01


@dataclass(frozen=True, slots=True)
class _Rail:
    name: str
    files: tuple[Path, ...]
    """Millivolts and milliamperes, or milliwatts."""
    interval_s: float


def open(root: Path = Path("/")) -> list[Meter | Unavailable]:
    """A meter, or why there is none, for every rail under `root`."""
    rails = list(_hwmon_rails(root)) or list(_iio_rails(root))
    if not rails:
        return [Unavailable("ina3221", "no INA3221 power monitor", "", in_total=False)]
    total = _total({rail.name for rail in rails})
    return [_open_rail(root, rail, total) for rail in rails]


def _total(rails: set[str]) -> frozenset[str]:
    for name in INPUTS:
        if name in rails:
            return frozenset({name})
    return next((known for known in MODULE_RAILS if known <= rails), frozenset())


def _hwmon_rails(root: Path) -> Iterator[_Rail]:
    for folder, name in sysfs.hwmon(root):
        if name != "ina3221":
            continue
        interval_ms = sysfs.text(folder / "update_interval") or ""
        interval_s = int(interval_ms) / 1e3 if interval_ms.isdecimal() else DEFAULT_INTERVAL_S
        for channel in (1, 2, 3):
            label = sysfs.text(folder / f"in{channel}_label")
            enabled = sysfs.text(folder / f"in{channel}_enable") != "0"
            if label and label != "NC" and enabled:
                files = (folder / f"in{channel}_input", folder / f"curr{channel}_input")
                yield _Rail(label, files, max(interval_s, FASTEST_S))


def _iio_rails(root: Path) -> Iterator[_Rail]:
    for chip in sysfs.children(root / "sys/bus/i2c/drivers/ina3221x"):
        for device in sysfs.children(chip):
            if not device.name.startswith("iio:device"):
                continue
            for channel in (0, 1, 2):
                label = sysfs.text(device / f"rail_name_{channel}")
                if label and label != "NC":
                    files = (device / f"in_power{channel}_input",)
                    yield _Rail(label, files, DEFAULT_INTERVAL_S)


def _open_rail(root: Path, rail: _Rail, total: frozenset[str]) -> Meter | Unavailable:
    name = f"ina3221:{rail.name}"
    in_total = rail.name in total
    read_power_w = _watts(rail.files)
    try:
        read_power_w()
    except MeterFault as fault:
        reason = f"{rail.files[-1].name}: {fault.detail}"
        return Unavailable(name, reason, sysfs.remedy(fault, rail.files[-1], root), in_total)
    sampler = PowerSampler(read_power_w, rail.interval_s)
    if in_total and len(total) == 1:
        note = "misses what is drawn before it (carrier board, USB)"
    elif in_total:
        note = "one of the module's input rails; misses the carrier board"
    elif total:
        note = f"fed from {' + '.join(sorted(total))}, counted there"
    else:
        note = "which rails add up to this board is not known: choose with --meter"
    return Meter(
        name=name,
        source="integrated",
        scope=rail.name,
        in_total=in_total,
        unit="uJ",
        tick=Tick(rail.interval_s, "the chip's conversion time"),
        u_systematic=0.05,
        max_power_w=300.0,
        wraps_at=None,
        coverage=None,
        read=sampler.read,
        note=note,
        sampler=sampler,
    )


def _watts(files: tuple[Path, ...]) -> Callable[[], float]:
    if len(files) == 1:
        milliwatts = os.fspath(files[0])
        return lambda: sysfs.integer(milliwatts) / 1e3
    millivolts, milliamperes = (os.fspath(file) for file in files)
    return lambda: sysfs.integer(millivolts) * sysfs.integer(milliamperes) / 1e6
