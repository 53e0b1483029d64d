"""`steps="auto"`: sampler and steps from a curve of quality against joules, measured on the model.

Pictures of few steps are compared with those that the same noise ends in after many (the solution
of the model's ODE), by relative RMSE; joules are those of the receipts. Each sampler is given more
steps until its pictures are near enough, or cost more than those of another that are. The curve is
measured once for a bundle on a machine's kernels, and kept under `$LEANGEN_HOME/steps`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from leangen.bundle import Bundle
from leangen.errors import RequestError
from leangen.files import default_home, write_atomic
from leangen.session import Session

AUTO = "auto"
SAMPLERS = ("dpmpp_2m", "unipc", "ddim")
"""Deterministic ones: they draw the same picture, the sooner the better."""
STEPS = (3, 4, 5, 6, 8, 10, 12, 15, 20, 25, 30, 40, 50)
TOLERANCE = 0.1
"""Relative RMSE of a picture that counts as the same: about 30 dB PSNR."""
SEEDS = (0, 1)
_REFERENCE = {"sampler": "heun", "steps": 40}
_DISTILLED = ("consistency", "lcm")

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Point:
    """One sampler at one number of steps."""

    sampler: str
    steps: int
    error: float
    """Mean relative RMSE against the reference, over the seeds."""
    joules: float | None
    """Mean of a picture; None where nothing measures it."""
    seconds: float


class Draws(Protocol):
    """The engine, as far as it is needed here."""

    session: Session

    def generate(self, prompt: Any = None, /, **options: Any) -> Any:
        """A result with its receipt."""


def settle(engine: Draws, options: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> Any:
    """The options with a sampler and a number of steps, where `steps` is `auto`.

    `trials` are options of requests to measure with, one for each seed. The session's reasons say
    what was chosen and why. Raises RequestError for a model that was distilled to few steps.
    """
    reasons = engine.session.reasons
    reasons.pop("steps", None)
    if options.get("steps") != AUTO:
        return options
    bundle = engine.session.bundle
    if bundle.config["sampler"] in _DISTILLED or bundle.config["steps"] == 1:
        raise RequestError(
            f"steps is 'auto', but {bundle.name} was distilled to few steps, of which more do not "
            f"come nearer to one picture: leave it out ({bundle.config['steps']} are its own)"
        )
    asked = options.get("sampler")
    curve = measured(engine, trials, SAMPLERS if asked is None else (asked,))
    point = best(curve)
    cost = f"{point.joules:.3g} J" if point.joules is not None else f"{point.seconds:.3g} s"
    near = "cheapest" if point.error <= TOLERANCE else "most exact, none being"
    reasons["steps"] = (
        f"{point.steps} of {point.sampler} by auto: the {near} within {TOLERANCE:.0%} (relative "
        f"RMSE) of what many steps draw, {point.error:.1%} at {cost} a picture, of {len(curve)} "
        "that were measured"
    )
    return {**options, "steps": point.steps, "sampler": point.sampler}


def best(curve: Sequence[Point]) -> Point:
    """The cheapest that is near enough, else the nearest."""
    near = [point for point in curve if point.error <= TOLERANCE]
    return min(near, key=_cost) if near else min(curve, key=lambda point: point.error)


def measured(
    engine: Draws, trials: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[Point]:
    """The points of these samplers, those kept from before and those that had to be measured."""
    path = _file(engine.session, trials)
    curve = _read(path)
    missing = [name for name in names if all(point.sampler != name for point in curve)]
    if missing:
        references = [engine.generate(**trial, **_REFERENCE).array for trial in trials]
        for name in missing:
            curve += _sampler(engine, trials, references, name, curve)
        document = [asdict(point) for point in curve]
        write_atomic(path, (json.dumps(document, indent=1) + "\n").encode())
    return [point for point in curve if point.sampler in names]


def _sampler(
    engine: Draws,
    trials: Sequence[Mapping[str, Any]],
    references: Sequence[Array],
    name: str,
    known: Sequence[Point],
) -> list[Point]:
    """The points of one sampler, from few steps until it is near enough or dearer than another."""
    near = [_cost(point) for point in known if point.error <= TOLERANCE]
    found: list[Point] = []
    for steps in STEPS:
        results = [engine.generate(**trial, sampler=name, steps=steps) for trial in trials]
        pairs = zip(references, results, strict=True)
        joules = [result.receipt.energy.gross_j for result in results]
        found.append(
            Point(
                name,
                steps,
                float(np.mean([_relative_rmse(wanted, made.array) for wanted, made in pairs])),
                None if None in joules else float(np.mean(joules)),
                float(np.mean([result.receipt.latency.total_s for result in results])),
            )
        )
        if found[-1].error <= TOLERANCE or (near and _cost(found[-1]) > min(near)):
            break
    return found


def _cost(point: Point) -> float:
    return point.seconds if point.joules is None else point.joules


def _relative_rmse(reference: Array, other: Array) -> float:
    return float(np.linalg.norm(other - reference) / max(float(np.linalg.norm(reference)), 1e-12))


def _file(session: Session, trials: Sequence[Mapping[str, Any]]) -> Path:
    """Where the curve of a bundle is kept, by what else it depends on."""
    bundle: Bundle = session.bundle
    digest = bundle.digest.removeprefix("sha256:")[:16]
    name = f"{digest}-{session.kernels}-{session.threads}-{len(trials)}.json"
    return default_home() / "steps" / name


def _read(path: Path) -> list[Point]:
    """The points in a file; none for one that is missing or damaged: they are measured again."""
    try:
        return [Point(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        return []
