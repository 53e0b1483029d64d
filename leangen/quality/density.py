"""Quality of a density flow against its reference: log-densities, inversion, samples.

On rows drawn from the reference, the mean of log p - log q is the KL divergence from the reference
to the candidate. The energy distance (Székely & Rizzo, 2013) compares samples alone:
2 E|X - Y| - E|X - X'| - E|Y - Y'| on columns scaled to unit spread, unbiased, so that it scatters
around 0 for equal distributions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from leangen.errors import RequestError
from leangen.families import density, finished
from leangen.quality.measures import Array, Measure, Task, mean
from leangen.session import Session

BLOCKS = 8
"""Disjoint parts of the samples that have an energy distance each: their scatter is its spread."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What one flow makes of the rows and of fixed latents."""

    rows: Array
    given: bool
    """The rows are the user's; else the reference drew them."""
    log_density: Array
    drawn: Array
    """Rows from the same latents in both models."""
    apart: Array
    """Per drawn row: how far the latent is from where inversion takes it back to, RMS."""
    level_bits: float = 0.0
    """Bits per dimension of a density of 1: of pictures, those of their levels."""


def observe(session: Session, task: Task, reference: Scored | None) -> Scored:
    """Score the rows given, or the reference's own draws; draw, and invert the draws."""
    config = session.bundle.config
    drawn = _run(session, density.Request(count=task.rows))
    if reference is not None:
        rows = reference.rows
    elif task.data is not None:
        rows = density.rows_of(task.data, config)
    else:
        rows = drawn
    latents = np.concatenate(list(density.latents(session, task.rows, 0)))
    back = np.concatenate(
        [
            session.run("log_prob", {"x": part}, ["latent"])[0]
            for part in density.batches_of(drawn, config)
        ]
    )
    return Scored(
        rows,
        task.data is not None,
        _run(session, density.Request(data=rows)),
        drawn,
        np.sqrt(np.mean((back - latents) ** 2, axis=1)),
        float(density.bits_per_dimension(np.zeros(1), config)[0]) if "image" in config else 0.0,
    )


def measure(reference: Scored, candidate: Scored) -> list[Measure]:
    """The KL divergence (or the loss on given rows) first; bits per dimension, inversion, samples.

    Raises RequestError when no row has a finite density in both models.
    """
    inside = np.isfinite(reference.log_density) & np.isfinite(candidate.log_density)
    if not inside.any():
        raise RequestError("no row has a finite log-density in both models: give other --data")
    p, q = reference.log_density[inside], candidate.log_density[inside]
    per_dim = 1 / (candidate.rows.shape[1] * math.log(2))
    outside = np.isfinite(reference.log_density) & ~np.isfinite(candidate.log_density)
    return [
        mean("loss on the data" if reference.given else "KL divergence", p - q, "rows", "nats"),
        mean("bits per dimension", candidate.level_bits - q * per_dim, "rows", "bits"),
        mean("rows lost from the support", outside * 100.0, "rows", "%"),
        mean("inversion error", candidate.apart, "rows"),
        mean("reference inversion error", reference.apart, "rows"),
        energy_distance(reference.drawn, candidate.drawn),
    ]


def energy_distance(x: Array, y: Array) -> Measure:
    """Between samples [n, d] that may share their latents: of x's first half and y's second.

    n is stated per side; the spread is that of `BLOCKS` disjoint parts.
    """
    half = min(len(x), len(y)) // 2
    center, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    a, b = (x[:half] - center) / scale, (y[half : 2 * half] - center) / scale
    size = half // BLOCKS
    parts = [
        2 * _between(a[rows], b[rows]) - _within(a[rows]) - _within(b[rows])
        for rows in (slice(k * size, (k + 1) * size) for k in range(BLOCKS))
        if size > 1
    ]
    if not parts:
        raise RequestError(
            f"the energy distance needs {4 * BLOCKS} samples or more, got {len(x)} and {len(y)}"
        )
    spread = mean("energy distance", parts, "samples a side")
    return Measure(spread.name, spread.value, spread.u, size * BLOCKS, spread.of)


def _distances(a: Array, b: Array) -> Array:
    squares = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1)[None] - 2 * a @ b.T
    return np.asarray(np.sqrt(np.maximum(squares, 0)))


def _between(a: Array, b: Array) -> float:
    return float(_distances(a, b).mean())


def _within(a: Array) -> float:
    distances = _distances(a, a)
    np.fill_diagonal(distances, 0.0)
    return float(distances.sum() / (len(a) * (len(a) - 1)))


def _run(session: Session, request: density.Request) -> Array:
    made = density.as_rows(finished(density.run(session, request)).array)
    return made if request.count is not None or made.ndim == 1 else made[:, 0]
