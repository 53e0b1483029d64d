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

from leangen import audio, families
from leangen.bundle import Bundle
from leangen.families import density, diffusion, language, speech
from leangen.records import Output
from leangen.session import Session

Array = np.ndarray[Any, Any]
SEEDS = range(4)
TEXT_TOKENS = 384
DENSITY_ROWS = 4096


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
    return language.logits(session, language.tokenizer(session).encode(text).ids[:TEXT_TOKENS])


def _measure_text(reference: Array, candidate: Array) -> list[Measure]:
    kl, same = kl_and_top1(reference, candidate)
    return [
        _mean("KL divergence", kl, "tokens", "nats"),
        _mean("top-1 agreement", same * 100.0, "tokens", "%"),
    ]


def relative_rmse(reference: Array, candidate: Array) -> float:
    """Root mean square of the difference over that of the reference."""
    return float(np.linalg.norm(reference - candidate) / np.linalg.norm(reference))


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


def _observe_speech(session: Session, reference: Any) -> list[Output]:
    """One utterance per seed, spoken in the reference's rhythm."""
    said = speech.EXAMPLE["phonemes"]
    return [
        _finish(
            speech.run(
                session,
                speech.Request(
                    phonemes=said,
                    seed=seed,
                    durations=None if reference is None else reference[seed].extra["durations"],
                ),
            )
        )
        for seed in SEEDS
    ]


def _measure_speech(reference: list[Output], candidate: list[Output]) -> list[Measure]:
    distances = [
        audio.log_mel_distance(a.array, b.array, int(a.sample_rate_hz or 0))
        for a, b in zip(reference, candidate, strict=True)
    ]
    return [_mean("log-mel distance", distances, "seeds", "dB")]


def _observe_density(session: Session, reference: Any) -> tuple[Array, Array]:
    """The reference's own samples (rows), and their log-densities."""
    rows = (
        _finish(density.run(session, density.Request(count=DENSITY_ROWS))).array
        if reference is None
        else reference[0]
    )
    return rows, _finish(density.run(session, density.Request(data=rows))).array


def _measure_density(
    reference: tuple[Array, Array], candidate: tuple[Array, Array]
) -> list[Measure]:
    return [_mean("log-density change", candidate[1] - reference[1], "rows", "nats")]


_FAMILIES: dict[str, tuple[Callable[..., Any], Callable[..., list[Measure]]]] = {
    "language": (_observe_text, _measure_text),
    "diffusion": (_observe_images, _measure_images),
    "flow/speech": (_observe_speech, _measure_speech),
    "flow/density": (_observe_density, _measure_density),
}


def observe(session: Session, reference: Any = None) -> Any:
    """What a model does on fixed inputs; `reference` is the observation of its reference."""
    return _FAMILIES[families.key(session.bundle)][0](session, reference)


def measure(bundle: Bundle, reference: Any, candidate: Any) -> list[Measure]:
    """The measures of the bundle's family between two observations."""
    return _FAMILIES[families.key(bundle)][1](reference, candidate)
