"""Lines of an external meter, TIME VALUE [UNIT], added up to an energy: see `external`."""

from __future__ import annotations

import re
import statistics
from collections import deque

from leangen.errors import RequestError
from leangen.meters.meter import MeterFault, Sampling

POWERS_W = {"W": 1.0, "mW": 1e-3, "uW": 1e-6}
ENERGIES_J = {"J": 1.0, "mJ": 1e-3, "uJ": 1e-6, "kJ": 1e3, "Wh": 3600.0, "kWh": 3.6e6}
GAP = 5
"""A gap of more of the meter's own intervals than this is not covered."""
_HEADER = re.compile(r"(unit|u|scope)=([^\s,]+)")


class Series:
    """Lines in, cumulative energy out."""

    def __init__(self) -> None:
        self.unit: str | None = None
        self.u: float | None = None
        self.scope = "external"
        self.energy_j = 0.0
        self.sampling = Sampling(0.0, 0, 0)
        self.samples = 0
        self.nonsense = 0
        self.example: str | None = None
        self._partial = ""
        self._last: tuple[float, float] | None = None
        self._gaps_s: deque[float] = deque(maxlen=32)

    @property
    def interval_s(self) -> float:
        """The median time between the latest lines."""
        return statistics.median(self._gaps_s) if self._gaps_s else 1.0

    def complaint(self) -> str:
        """What was expected and what came, for an error."""
        came = f"; the last nonsense was {self.example!r}" if self.example else ""
        return (
            f"expected lines `TIME VALUE UNIT` with a unit such as W or J, no power below 0{came}"
        )

    def header(self, line: str) -> None:
        """Take what a comment line, or the end of SPEC, says of the meter."""
        for key, value in _HEADER.findall(line):
            if key == "unit":
                self.unit = value
            elif key == "scope":
                self.scope = value
            else:
                self.u = _fraction(value)
        if self.unit is not None and self.unit not in POWERS_W | ENERGIES_J:
            raise RequestError(
                f"--meter: unit {self.unit!r}, expected one of "
                f"{', '.join([*POWERS_W, *ENERGIES_J])}"
            )

    def add(self, text: str) -> None:
        """Take what has come; the last line waits until its end has come too."""
        *lines, self._partial = (self._partial + text).split("\n")
        for line in lines:
            if line.lstrip().startswith("#"):
                self.header(line)
            elif line.strip() and not self._add(line):
                self.nonsense += 1
                self.example = line.strip()[:60]

    def _add(self, line: str) -> bool:
        words = line.replace(",", " ").replace(";", " ").split()
        try:
            time_s, value = float(words[0]), float(words[1])
        except (IndexError, ValueError):
            return False
        unit = words[2] if len(words) > 2 else self.unit
        if self.unit is None and unit in POWERS_W | ENERGIES_J:
            self.unit = unit
        if unit is None or unit != self.unit or not abs(value) < 1e15 or not abs(time_s) < 1e15:
            return False
        if self._last is not None and time_s <= self._last[0]:
            return False  # its clock did not go forward
        if unit in POWERS_W and value < 0:
            return False  # wired the wrong way round, or no power that is used here
        scaled = value * (POWERS_W | ENERGIES_J)[unit]
        if self._last is not None:
            self._advance(time_s - self._last[0], self._last[1], scaled)
        self._last = time_s, scaled
        self.samples += 1
        return True

    def _advance(self, elapsed_s: float, before: float, after: float) -> None:
        interval_s = self.interval_s if self._gaps_s else elapsed_s
        self._gaps_s.append(elapsed_s)
        if self.unit in ENERGIES_J:
            if after < before:
                raise MeterFault("reset", f"its counter fell from {before:g} to {after:g} J")
            self.energy_j += after - before
            return
        self.energy_j += (before + after) / 2 * elapsed_s
        covered_ns = int(elapsed_s * 1e9) if elapsed_s <= GAP * interval_s else None
        self.sampling = self.sampling.extended(elapsed_s, before, after, covered_ns=covered_ns)


def _fraction(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise RequestError(f"--meter: u={text}, expected a fraction such as 0.02")
    return value
