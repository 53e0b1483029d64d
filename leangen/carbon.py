"""From joules to gCO2e: operational emissions, the hardware's share, and SCI per unit of work.

`g` is operational: energy times intensity. The embodied share (making the hardware) is added only
where its total and lifetime are given, and then SCI is formed: (E x I + M) per R, ISO/IEC 21031.
Its u is that of the energy; intensity and embodied total are taken as given.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from leangen import clock
from leangen.errors import RequestError
from leangen.intensity import MOST_G_PER_KWH, OWN_REGION, Grid, Series, find, number, read_series
from leangen.records import Carbon, Embodied

REGION_VARIABLE = "LEANGEN_REGION"
DEFAULT_REGION = "world"
JOULES_PER_KWH = 3.6e6
SECONDS_PER_DAY = 86_400
SECONDS_PER_YEAR = 365.25 * SECONDS_PER_DAY
MOST_EMBODIED = 1_000_000
"""Kilogrammes, or years; the least is its inverse. Beyond are slips, and figures without end."""
BRAIN_KWH_PER_DAY = 0.5
"""The yardstick of reports: a human brain takes about 20 W, and about this much a day."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What turns the energy of a generation into gCO2e; `footprint` makes one."""

    grid: Grid | Series
    embodied: Embodied | None = None

    def at(self, stamp: str) -> Grid:
        """The grid at an ISO 8601 time; RequestError where a time series has no value."""
        return self.grid.at(stamp) if isinstance(self.grid, Series) else self.grid

    def of(
        self,
        energy_j: float | None,
        u_j: float | None = None,
        *,
        started_at: str,
        duration_s: float = 0.0,
        units: float = 0.0,
    ) -> Carbon:
        """The emissions of one generation of `units` units of work that took `duration_s`.

        Where a time series has no value, figures are None and `reason` says why.
        """
        embodied = self.embodied
        embodied_g = None if embodied is None else embodied.g_per_s * duration_s
        try:
            grid = self.at(started_at)
        except RequestError as error:
            assert isinstance(self.grid, Series)
            return Carbon(
                g=None,
                intensity_g_per_kwh=None,
                region=self.grid.region,
                year=None,
                source=self.grid.path.name,
                reason=str(error),
                embodied=embodied,
                embodied_g=embodied_g,
            )
        g_per_j = grid.intensity_g_per_kwh / JOULES_PER_KWH
        g = None if energy_j is None else energy_j * g_per_j
        u_g = None if energy_j is None or u_j is None else u_j * g_per_j
        sci = sci_u = None
        if g is not None and embodied_g is not None and units > 0:
            sci = (g + embodied_g) / units
            sci_u = None if u_g is None else u_g / units
        return Carbon(
            g=g,
            u_g=u_g,
            intensity_g_per_kwh=grid.intensity_g_per_kwh,
            region=grid.region,
            year=grid.year,
            source=grid.source,
            reason="the energy is unavailable" if g is None else None,
            embodied=embodied,
            embodied_g=embodied_g,
            sci_g_per_unit=sci,
            sci_u_g_per_unit=sci_u,
        )


def footprint(
    region: str | None = None,
    *,
    intensity: float | str | Path | None = None,
    embodied: tuple[float, float] | None = None,
) -> Footprint:
    """How gCO2e will be computed; everything given is checked here, before any work.

    region: a code or a name of the table; None means $LEANGEN_REGION, or the world.
    intensity: your own gCO2e/kWh, or the path of a CSV file of them over time (`read_series`). It
        goes before the table's; the region is then only a label, by default `own`.
    embodied: kgCO2e of making the hardware, and the years that it is used for.

    Raises RequestError for an unknown region, a negative intensity, an unreadable file or one that
    has no value for now, and for an embodied total or lifetime that is not above 0.

    >>> footprint("fr").of(3.6e6, started_at="2026-11-21T08:00:00Z").g
    44.0
    """
    hardware = None if embodied is None else _embodied(*embodied)
    if intensity is None:
        wanted = region or os.environ.get(REGION_VARIABLE) or DEFAULT_REGION
        return Footprint(find(wanted), hardware)
    label = region or OWN_REGION
    value = number(intensity)
    if value is None:
        made = Footprint(read_series(Path(intensity), label), hardware)  # type: ignore[arg-type]
        made.at(clock.utc_now())
        return made
    if not 0 <= value <= MOST_G_PER_KWH:
        raise RequestError(
            f"carbon intensity is {intensity}, expected gCO2e/kWh of 0 to {MOST_G_PER_KWH}"
        )
    grid = Grid(label, "", value, int(clock.utc_now()[:4]), "given by the user")
    return Footprint(grid, hardware)


def brains(power_w: float) -> float:
    """Power as a number of human brains, at 0.5 kWh a day each.

    >>> brains(16 * 440) > 300  # 16 GPUs
    True
    """
    return power_w * SECONDS_PER_DAY / JOULES_PER_KWH / BRAIN_KWH_PER_DAY


def _embodied(total_kg: float, lifetime_years: float) -> Embodied:
    for name, value in (("total", total_kg), ("lifetime", lifetime_years)):
        if not 1 / MOST_EMBODIED <= value <= MOST_EMBODIED:
            raise RequestError(
                f"embodied {name} is {value}, expected more than 0, up to {MOST_EMBODIED}: "
                "give kgCO2e of the hardware and the years of its use, such as 250,4"
            )
    g_per_s = total_kg * 1000 / (lifetime_years * SECONDS_PER_YEAR)
    return Embodied(total_kg=total_kg, lifetime_years=lifetime_years, g_per_s=g_per_s)
