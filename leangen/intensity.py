"""The carbon intensity of electricity: an offline table, or a time series of your own.

`assets/carbon.csv` holds one row per region with its year and source: life-cycle gCO2e per kWh of
electricity from Ember, as Our World in Data publishes it ("Carbon intensity of electricity
generation"). Vintages of one region differ by several percent, so a figure without its year means
little.
"""

from __future__ import annotations

import bisect
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

from leangen.errors import RequestError

TABLE = Path(__file__).parent / "assets" / "carbon.csv"
OWN_REGION = "own"
"""Named in receipts whose intensity was given without a region."""
MOST_G_PER_KWH = 1_000_000
"""A kilowatt-hour of the dirtiest coal is some 1,500; beyond are slips, and figures without end."""


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


def find(region: str) -> Grid:
    """The table's row of a code or a name. Raises RequestError for another."""
    wanted = region.strip().lower()
    for grid in grids().values():
        if wanted in (grid.region, grid.name.lower()):
            return grid
    raise RequestError(
        f"region {region!r} is not in the carbon table: expected one of {', '.join(grids())}, "
        "or give your own intensity in gCO2e/kWh"
    )


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
    value = number(row[1]) if len(row) == 2 else None
    if start is None or value is None or not 0 <= value <= MOST_G_PER_KWH:
        raise RequestError(
            f"{where}: {','.join(row)!r} is not a time and gCO2e/kWh of 0 to {MOST_G_PER_KWH}; "
            "expected for example 2026-11-21T08:00Z,350"
        )
    if start.tzinfo is None:
        raise RequestError(f"{where}: {row[0]} has no time zone; write UTC, as 2026-11-21T08:00Z")
    return start.astimezone(UTC), value


def _is_header(row: list[str]) -> bool:
    return _time(row[0]) is None and not (len(row) > 1 and number(row[1]) is not None)


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text.strip())
    except ValueError:
        return None


def _text(moment: datetime) -> str:
    return moment.isoformat(timespec="minutes").replace("+00:00", "Z")


def number(value: float | str | Path) -> float | None:
    """The number that a value or a text is, else None."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
