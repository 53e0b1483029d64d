"""How far a low-precision model is from its reference: the measures of each family.

Each family has two functions: `observe` runs a model on fixed inputs (same text, same noise, and
for speech the reference's phoneme durations, so that the waveforms line up), `measure` compares
two observations. Differences are against the reference given, usually the fp32 bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import Any

import numpy as np

from leangen import audio
from leangen.families import diffusion, flow, language
from leangen.session import Session

Array = np.ndarray[Any, Any]
SEEDS = range(4)
TEXT_TOKENS = 384


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure of quality with its spread."""

    name: str
    value: float
    u: float | None
    """Two standard errors over `n`; None for a single observation."""
    n: int
    of: str
    """What was observed `n` times: tokens, seeds, rows."""
    unit: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def _mean(name: str, values: Sequence[float] | Array, of: str, unit: str = "") -> Measure:
    array = np.asarray(values, dtype=np.float64)
    u = 2 * array.std(ddof=1) / np.sqrt(array.size) if array.size > 1 else None
    return Measure(name, float(array.mean()), None if u is None else float(u), array.size, of, unit)


def log_softmax(logits: Array) -> Array:
    """Log-probabilities along the last axis in float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def kl_and_top1(reference: Array, candidate: Array) -> tuple[Array, Array]:
    """Per position of logits [n, vocab]: KL(reference || candidate) in nats, and same argmax."""
    kl = np.empty(len(reference))
    for start in range(0, len(reference), 64):  # 64 rows of a 49k vocabulary in float64: 25 MB
        rows = slice(start, start + 64)
        p, q = log_softmax(reference[rows]), log_softmax(candidate[rows])
        kl[rows] = (np.exp(p) * (p - q)).sum(axis=-1)
    return kl, reference.argmax(axis=-1) == candidate.argmax(axis=-1)


def _observe_text(session: Session, reference: Any) -> Array:
    text = files("leangen").joinpath("assets/quality.txt").read_text(encoding="utf-8")
    return language.logits(session, language.encode(session, text)[:TEXT_TOKENS])


def _measure_text(reference: Array, candidate: Array) -> list[Measure]:
    kl, same = kl_and_top1(reference, candidate)
    return [
        _mean("KL divergence", kl, "tokens", "nats"),
        _mean("top-1 agreement", same * 100.0, "tokens", "%"),
    ]


def relative_rmse(reference: Array, candidate: Array) -> float:
    """Root mean square difference over the reference's standard deviation."""
    return float(np.sqrt(np.mean((reference - candidate) ** 2)) / reference.std())


def psnr_db(reference: Array, candidate: Array) -> float:
    """Peak signal-to-noise ratio; the peak is the reference's own range."""
    mse = float(np.mean((reference - candidate) ** 2))
    peak = float(reference.max() - reference.min())
    return float(20 * np.log10(peak) - 10 * np.log10(max(mse, np.finfo(np.float64).tiny)))


def _finish(steps: Any) -> Any:
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def _observe_images(session: Session, reference: Any) -> list[Array]:
    requests = [diffusion.Request(seed=seed) for seed in SEEDS]
    return [_finish(diffusion.run(session, request)).array for request in requests]


def _measure_images(reference: list[Array], candidate: list[Array]) -> list[Measure]:
    pairs = list(zip(reference, candidate, strict=True))
    return [
        _mean("relative RMSE", [relative_rmse(a, b) for a, b in pairs], "seeds"),
        _mean("PSNR", [psnr_db(a, b) for a, b in pairs], "seeds", "dB"),
    ]


def _observe_flow(session: Session, reference: Any) -> list[Any]:
    """Speech: one output per seed, spoken with the reference's durations. Density: one array."""
    return flow.observe(session, reference, SEEDS)


def _measure_flow(reference: list[Any], candidate: list[Any]) -> list[Measure]:
    if reference[0].media == "audio":
        distances = [
            audio.log_mel_distance(a.array, b.array, a.sample_rate_hz)
            for a, b in zip(reference, candidate, strict=True)
        ]
        return [_mean("log-mel distance", distances, "seeds", "dB")]
    shift = candidate[0].array - reference[0].array
    return [_mean("log-density change", shift, "rows", "nats")]


_FAMILIES: dict[str, tuple[Callable[..., Any], Callable[..., list[Measure]]]] = {
    "language": (_observe_text, _measure_text),
    "diffusion": (_observe_images, _measure_images),
    "flow": (_observe_flow, _measure_flow),
}


def observe(session: Session, reference: Any = None) -> Any:
    """What a model does on fixed inputs; `reference` is the observation of its reference."""
    return _FAMILIES[session.bundle.family][0](session, reference)


def measure(family: str, reference: Any, candidate: Any) -> list[Measure]:
    """The family's measures between two observations."""
    return _FAMILIES[family][1](reference, candidate)
