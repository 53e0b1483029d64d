"""The power management chip of a Raspberry Pi 5, through `vcgencmd pmic_read_adc`.

    VDD_CORE_A current(7)=0.94657990A
    VDD_CORE_V volt(15)=0.72097620V

Power is the sum of V x I over the rails that show both (twelve, VDD_CORE among them). That misses
the converters' own losses and all that hangs on 5 V directly: USB devices, HATs, the fan. EXT5V has
a voltage only. Class uncertainty, k=2, type B: 25%; users who compared with a wall meter found
about 1.15 x the sum + 0.6 W, which is a fit to their boards and not applied here.

Every sample starts a process (about 5 ms of one core), so there are 5 a second: 2.5% of one core.
Under a root other than / no command is run: the tree holds what it printed, in
`usr/bin/vcgencmd.pmic_read_adc`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from leangen.meters import sysfs
from leangen.meters.meter import Meter, MeterFault, Tick, Unavailable
from leangen.meters.sampled import PowerSampler

MODEL = "proc/device-tree/model"
BOARDS = ("Raspberry Pi 5", "Raspberry Pi Compute Module 5")  # "Raspberry Pi 500" is among them
COMMAND = ("vcgencmd", "pmic_read_adc")
PERIOD_S = 0.2
_LINE = re.compile(r"(\w+)_([AV]) (?:current|volt)\(\d+\)=([0-9.]+)[AV]")


def open(
    root: Path = Path("/"), *, run: Callable[[], str] | None = None
) -> list[Meter | Unavailable]:
    """One meter for the sum of the rails, or why there is none.

    `run` gives the command's output and raises MeterFault; None runs it, or reads it from `root`.
    """
    model = sysfs.text(root / MODEL) or ""
    if not model.startswith(BOARDS):
        return [Unavailable("pmic", "this is not a Raspberry Pi 5", "", in_total=False)]
    if run is None:
        run = _run if root == Path("/") else lambda: _recorded(root)
    try:
        rails = _rails(run())
    except MeterFault as fault:
        remedy = (
            "`sudo usermod -aG video $USER` and log in again, if it may not open /dev/vcio; "
            "`sudo apt install raspi-utils` if there is no vcgencmd"
        )
        return [Unavailable("pmic", fault.detail, remedy)]
    sampler = PowerSampler(lambda: sum(_rails(run()).values()), PERIOD_S)
    return [
        Meter(
            name="pmic:rails",
            source="integrated",
            scope="pmic-rails",
            in_total=True,
            unit="uJ",
            tick=Tick(PERIOD_S, "the sampling period"),
            u_systematic=0.25,
            max_power_w=60.0,
            wraps_at=None,
            coverage=None,
            read=sampler.read,
            note=f"sum of {len(rails)} rails; misses converter losses, USB, HATs and fan",
            sampler=sampler,
        )
    ]


def _rails(output: str) -> dict[str, float]:
    """Watts by rail; MeterFault when no rail shows both a voltage and a current."""
    values: dict[str, dict[str, float]] = {}
    for rail, quantity, value in _LINE.findall(output):
        try:
            values.setdefault(rail, {})[quantity] = float(value)
        except ValueError:
            raise MeterFault("garbage", f"{rail}: {value!r} is not a number") from None
    watts = {rail: v["A"] * v["V"] for rail, v in values.items() if len(v) == 2}
    if "VDD_CORE" not in watts:
        raise MeterFault("garbage", f"vcgencmd shows no VDD_CORE: {output.strip()[:80]!r}")
    return watts


def _run() -> str:
    import subprocess  # 3 ms of the start of those who have no Pi

    try:
        done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=1.0, check=False)
    except FileNotFoundError:
        raise MeterFault("vanished", "there is no vcgencmd") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MeterFault("unreadable", f"vcgencmd: {error}") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[:80]
        raise MeterFault("unreadable", f"vcgencmd failed ({done.returncode}): {said}")
    return done.stdout


def _recorded(root: Path) -> str:
    output = sysfs.text(root / "usr/bin/vcgencmd.pmic_read_adc")
    if output is None:
        raise MeterFault("vanished", "there is no vcgencmd")
    return output
