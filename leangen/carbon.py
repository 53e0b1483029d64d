"""From joules to gCO2e: operational emissions, the hardware's share, and SCI per unit of work.

The table `assets/carbon.csv` holds one row per region with its year and source: life-cycle
gCO2e per kWh of electricity from Ember, as Our World in Data publishes it ("Carbon intensity of
electricity generation"). Vintages of one region differ by several percent, so a figure without its
year means little. A number or a time series of your own goes before it.

`g` is operational: energy times intensity. The embodied share (making the hardware) is added only
where its total and lifetime are given, and then SCI is formed: (E x I + M) per R, ISO/IEC 21031.
Its u is that of the energy; intensity and embodied total are taken as given.
"""

from __future__ import annotations

import bisect
import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from leangen import clock
from leangen.errors import RequestError
from leangen.records import Carbon, Embodied

TABLE = Path(__file__).parent / "assets" / "carbon.csv"
REGION_VARIABLE = "LEANGEN_REGION"
DEFAULT_REGION = "world"
OWN_REGION = "own"
"""Named in receipts whose intensity was given without a region."""
JOULES_PER_KWH = 3.6e6
SECONDS_PER_DAY = 86_400
SECONDS_PER_YEAR = 365.25 * SECONDS_PER_DAY
BRAIN_KWH_PER_DAY = 0.5
"""The yardstick of reports: a human brain takes about 20 W, and about this much a day."""


@dataclass(frozen=True, slots=True)
class Grid:
    """The carbon intensity of electricity somewhere, at some time."""

    region: str
    """ISO 3166 alpha-2 code in lower case, `eu`, `world` or `own`."""
    name: str
    intensity_g_per_kwh: float
    year: int
    source: str


@dataclass(frozen=True, slots=True)
class Series:
    """Carbon intensity over time: each value holds from its time stamp for one step."""

    region: str
    path: Path
    starts: Sequence[datetime]
    """In UTC, ascending."""
    intensities_g_per_kwh: Sequence[float]
    step: timedelta
    """The smallest distance of two stamps (an hour when there is one); beyond it is a gap."""

    def at(self, stamp: str) -> Grid:
        """The value that holds at an ISO 8601 time. Raises RequestError before, in and after gaps.

        A value is never carried across a gap: electricity of another hour is another mix.
        """
        moment = datetime.fromisoformat(stamp).astimezone(UTC)
        index = bisect.bisect_right(self.starts, moment) - 1
        if index < 0 or moment >= self.starts[index] + self.step:
            end = self.starts[-1] + self.step
            inside = 0 <= index < len(self.starts) - 1
            raise RequestError(
                f"{self.path} has no carbon intensity for {_text(moment)}: "
                + (
                    f"there is a gap from {_text(self.starts[index] + self.step)} "
                    f"to {_text(self.starts[index + 1])}"
                    if inside
                    else f"it covers {_text(self.starts[0])} to {_text(end)}"
                )
                + "; add the missing rows, or give one number in gCO2e/kWh"
            )
        return Grid(
            self.region, "", self.intensities_g_per_kwh[index], moment.year, str(self.path.name)
        )


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
        rated = g is not None and embodied_g is not None and units > 0
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
            sci_g_per_unit=((g or 0.0) + (embodied_g or 0.0)) / units if rated else None,
            sci_u_g_per_unit=u_g / units if rated and u_g is not None else None,
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
        return Footprint(_find(wanted), hardware)
    label = region or OWN_REGION
    number = _number(intensity)
    if number is None:
        made = Footprint(read_series(Path(intensity), label), hardware)  # type: ignore[arg-type]
        made.at(clock.utc_now())
        return made
    if not (math.isfinite(number) and number >= 0):
        raise RequestError(f"carbon intensity is {intensity}, expected gCO2e/kWh of 0 or more")
    grid = Grid(label, "", number, int(clock.utc_now()[:4]), "given by the user")
    return Footprint(grid, hardware)


def carbon_for(
    energy_j: float | None, region: str | None = None, *, intensity: float | None = None
) -> Carbon:
    """The operational emissions of `energy_j` joules now; as `footprint` with `of`.

    >>> carbon_for(3.6e6, "fr").g
    44.0
    """
    return footprint(region, intensity=intensity).of(energy_j, started_at=clock.utc_now())


def brains(power_w: float) -> float:
    """Power as a number of human brains, at 0.5 kWh a day each.

    >>> brains(16 * 440) > 300  # 16 GPUs
    True
    """
    return power_w * SECONDS_PER_DAY / JOULES_PER_KWH / BRAIN_KWH_PER_DAY


@lru_cache(maxsize=1)
def grids() -> dict[str, Grid]:
    """All rows of the table by region."""
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


def read_series(path: Path, region: str = OWN_REGION) -> Series:
    """Read a CSV file of two columns: ISO 8601 time with its zone, gCO2e/kWh; a header is skipped.

    Rows stand in ascending order. Raises RequestError with the line that is wrong.
    """
    starts: list[datetime] = []
    values: list[float] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for line, row in enumerate(csv.reader(file), 1):
                if not row or (line == 1 and _is_header(row)):
                    continue
                start, value = _row(row, f"{path}, line {line}")
                if starts and start <= starts[-1]:
                    raise RequestError(
                        f"{path}, line {line}: {row[0]} does not come after the line before; "
                        "expected ascending times, each once"
                    )
                starts.append(start)
                values.append(value)
    except OSError as error:
        raise RequestError(
            f"cannot read the carbon intensity file {path}: {error.strerror}; "
            "expected gCO2e/kWh as one number, or a CSV file"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise RequestError(
            f"{path} is not a CSV file in UTF-8 ({error}): expected lines such as "
            "2026-11-21T08:00Z,350"
        ) from error
    if not starts:
        raise RequestError(
            f"{path} holds no carbon intensity: expected lines such as 2026-11-21T08:00Z,350"
        )
    step = min((b - a for a, b in pairwise(starts)), default=timedelta(hours=1))
    return Series(region, path, starts, values, step)


def _row(row: list[str], where: str) -> tuple[datetime, float]:
    start = _time(row[0])
    value = _number(row[1]) if len(row) == 2 else None
    if start is None or value is None or not (math.isfinite(value) and value >= 0):
        raise RequestError(
            f"{where}: {','.join(row)!r} is not a time and gCO2e/kWh of 0 or more; "
            "expected for example 2026-11-21T08:00Z,350"
        )
    if start.tzinfo is None:
        raise RequestError(f"{where}: {row[0]} has no time zone; write UTC, as 2026-11-21T08:00Z")
    return start.astimezone(UTC), value


def _is_header(row: list[str]) -> bool:
    return _time(row[0]) is None and not (len(row) > 1 and _number(row[1]) is not None)


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text.strip())
    except ValueError:
        return None


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="minutes").replace("+00:00", "Z")


def _number(value: float | str | Path) -> float | None:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None


def _embodied(total_kg: float, lifetime_years: float) -> Embodied:
    for name, value in (("total", total_kg), ("lifetime", lifetime_years)):
        if not (math.isfinite(value) and value > 0):
            raise RequestError(
                f"embodied {name} is {value}, expected more than 0: "
                "give kgCO2e of the hardware and the years of its use, such as 250,4"
            )
    g_per_s = total_kg * 1000 / (lifetime_years * SECONDS_PER_YEAR)
    return Embodied(total_kg=total_kg, lifetime_years=lifetime_years, g_per_s=g_per_s)


def _find(region: str) -> Grid:
    wanted = region.strip().lower()
    for grid in grids().values():
        if wanted in (grid.region, grid.name.lower()):
            return grid
    raise RequestError(
        f"region {region!r} is not in the carbon table: expected one of {', '.join(grids())}, "
        "or give your own intensity in gCO2e/kWh"
    )
