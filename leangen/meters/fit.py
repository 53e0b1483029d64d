"""The stored fit of the estimate: idle power and power per busy core, of this very machine.

    $LEANGEN_HOME/calibration.json
        {"schema": "leangen.calibration/1", "hosts": {HOST ID: {the fields of `Fit`}}}

`leangen meters calibrate` writes it; the estimate uses it on the same host with the same CPUs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from leangen import host
from leangen.errors import StorageError
from leangen.files import default_home, write_atomic

SCHEMA = "leangen.calibration/1"
OTHER_LOADS = 0.15
"""k=2, type B, judged: other work than the calibration's draws differently per CPU second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """E = idle_w x wall seconds + core_w x CPU seconds."""

    idle_w: float
    core_w: float
    residual: float
    """RMS of the windows about the fit, as a fraction of their mean energy."""
    reference: tuple[str, ...]
    """The meters that it was fitted to: the estimate then covers what they cover."""
    reference_u: float
    """Their class uncertainty, k=2, as a fraction."""
    cpus: float
    """CPUs that the process could use, by affinity and cgroup."""
    windows: int
    date: str

    @property
    def u_systematic(self) -> float:
        """k=2: the reference's own, the residual, and other loads than the calibration's."""
        return min(0.99, math.hypot(self.reference_u, 2 * self.residual, OTHER_LOADS))


def solve(rows: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Least squares of E = idle_w x wall + core_w x CPU over rows of (wall s, CPU s, joules).

    Returns idle_w, core_w and the RMS residual as a fraction of the mean energy. Raises ValueError
    when the rows do not tell the two apart.

    >>> solve([(10, 0, 20.0), (10, 10, 50.0), (10, 20, 80.0)])
    (2.0, 3.0, 0.0)
    """
    if len(rows) < 3:
        raise ValueError(f"{len(rows)} windows cannot be fitted, expected 3 at least")
    ww, wc, cc, we, ce = (
        math.fsum(a * b for a, b in pairs)
        for pairs in (
            [(w, w) for w, _, _ in rows],
            [(w, c) for w, c, _ in rows],
            [(c, c) for _, c, _ in rows],
            [(w, e) for w, _, e in rows],
            [(c, e) for _, c, e in rows],
        )
    )
    determinant = ww * cc - wc * wc
    if determinant <= 1e-6 * ww * cc or ww * cc == 0:
        raise ValueError("all windows were equally busy: idle and busy power cannot be told apart")
    idle_w = (we * cc - ce * wc) / determinant
    core_w = (ce * ww - we * wc) / determinant
    squares = math.fsum((e - idle_w * w - core_w * c) ** 2 for w, c, e in rows)
    mean_j = math.fsum(e for _, _, e in rows) / len(rows)
    # Two parameters are spent on the fit.
    residual = math.sqrt(squares / (len(rows) - 2)) / mean_j if mean_j > 0 else math.inf
    return idle_w, core_w, residual


def load(root: Path = Path("/"), home: Path | None = None) -> Fit | None:
    """The fit of the machine whose tree `root` is; None when there is none that can be read."""
    folder = home or default_home()
    try:
        document = json.loads((folder / "calibration.json").read_text(encoding="utf-8"))
        row = document["hosts"][host.host(root=root, home=folder).id]
        if document["schema"] != SCHEMA:
            return None
        row["reference"] = tuple(map(str, row["reference"]))
        fit = Fit(**{field.name: row[field.name] for field in fields(Fit)})
        numbers = (fit.idle_w, fit.core_w, fit.residual, fit.reference_u, fit.cpus)
        good = all(math.isfinite(number) and number >= 0 for number in numbers)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return fit if good and isinstance(fit.date, str) else None


def save(fit: Fit, root: Path = Path("/"), home: Path | None = None) -> Path:
    """Keep the fit beside those of other hosts (a home may be shared). Raises StorageError."""
    folder = home or default_home()
    path = folder / "calibration.json"
    try:
        hosts = json.loads(path.read_text(encoding="utf-8"))["hosts"]
    except (OSError, ValueError, KeyError, TypeError):
        hosts = {}
    if not isinstance(hosts, dict):
        raise StorageError(f"{path} is not a calibration file: move it away and try again")
    hosts[host.host(root=root, home=folder).id] = asdict(fit)
    document = {"schema": SCHEMA, "hosts": hosts}
    write_atomic(path, (json.dumps(document, indent=1) + "\n").encode())
    return path
