"""Operational emissions: energy times the yearly carbon intensity of a grid, offline.

The table `assets/carbon.csv` holds one row per region with its year and source: life-cycle
gCO2e per kWh of electricity from Ember, as Our World in Data publishes it ("Carbon intensity of
electricity generation"). Vintages of one region differ by several percent, so a figure without its
year means little. Embodied emissions are not included.
"""

from __future__ import annotations

import csv
import math
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from leangen import clock
from leangen.errors import RequestError
from leangen.records import Carbon

TABLE = Path(__file__).parent / "assets" / "carbon.csv"
REGION_VARIABLE = "LEANGEN_REGION"
DEFAULT_REGION = "world"
JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True, slots=True)
class Grid:
    """One row of the table."""

    region: str
    """ISO 3166 alpha-2 code in lower case, `eu` or `world`."""
    name: str
    intensity_g_per_kwh: float
    year: int
    source: str


@lru_cache(maxsize=1)
def grids() -> dict[str, Grid]:
    """All rows by region."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return {
            row["region"]: Grid(
                row["region"],
                row["name"],
                float(row["intensity_g_per_kwh"]),
                int(row["year"]),
                row["source"],
            )
            for row in csv.DictReader(file)
        }


def carbon_for(
    energy_j: float | None, region: str | None = None, *, intensity: float | None = None
) -> Carbon:
    """The emissions of `energy_j` joules; `g` is None where the energy is.

    `region` is a code or a name of the table; None means $LEANGEN_REGION, or the world. Your own
    `intensity` in gCO2e/kWh goes before the table's. Raises RequestError for an unknown region or a
    negative intensity.

    >>> carbon_for(3.6e6, "fr").g
    44.0
    """
    if intensity is not None:
        if not (math.isfinite(intensity) and intensity >= 0):
            raise RequestError(f"carbon intensity is {intensity}, expected gCO2e/kWh of 0 or more")
        grid = Grid(
            region or "own", "", float(intensity), int(clock.utc_now()[:4]), "given by the user"
        )
    else:
        grid = _find(region or os.environ.get(REGION_VARIABLE) or DEFAULT_REGION)
    g = None if energy_j is None else energy_j / JOULES_PER_KWH * grid.intensity_g_per_kwh
    return Carbon(
        g=g,
        intensity_g_per_kwh=grid.intensity_g_per_kwh,
        region=grid.region,
        year=grid.year,
        source=grid.source,
    )


def _find(region: str) -> Grid:
    wanted = region.strip().lower()
    for grid in grids().values():
        if wanted in (grid.region, grid.name.lower()):
            return grid
    raise RequestError(
        f"region {region!r} is not in the carbon table: expected one of {', '.join(grids())}, "
        "or give your own intensity in gCO2e/kWh"
    )
