"""How far a low-precision model is from its reference: the measures of each family.

A family's module has two functions. `observe(session, task, reference)` runs a model on fixed
inputs (same text, same noise; `reference` is the reference's own observation), `measure` compares
two observations: the first figure is the family's loss, 0 for the reference itself and larger the
worse. Differences are against the reference given, usually the fp32 bundle.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from leangen import families
from leangen.bundle import Bundle
from leangen.console import Progress
from leangen.errors import RequestError
from leangen.quality.measures import Measure, Task
from leangen.session import Session

FAMILIES = {
    "language": "leangen.quality.language",
    "embedding": "leangen.quality.embedding",
    "seq2seq/text": "leangen.quality.seq2seq",
    "seq2seq/transcription": "leangen.quality.seq2seq",
    "flow/density": "leangen.quality.density",
    "flow/speech": "leangen.quality.speech",
    "autoregressive/image": "leangen.quality.autoregressive",
    "autoregressive/rows": "leangen.quality.autoregressive",
    "autoregressive/audio": "leangen.quality.autoregressive",
    "diffusion": "leangen.quality.imaging",
    "oneshot": "leangen.quality.imaging",
}
"""Modules by the key of `families.FAMILIES`."""

__all__ = ["Measure", "Task", "evaluate", "measure", "observe"]


def observe(session: Session, reference: Any = None, task: Task | None = None) -> Any:
    """What a model does on fixed inputs; `reference` is the observation of its reference."""
    return _module(session.bundle).observe(session, task or Task(), reference)


def measure(bundle: Bundle, reference: Any, candidate: Any) -> list[Measure]:
    """The measures of the bundle's family between two observations, the loss first."""
    found: list[Measure] = _module(bundle).measure(reference, candidate)
    return found


def evaluate(
    candidates: list[Session], reference: Session, task: Task, progress: Progress
) -> list[list[Measure]]:
    """The measures of each candidate against one reference, which is observed once.

    Raises RequestError for bundles of different families.
    """
    for candidate in candidates:
        if families.key(candidate.bundle) != families.key(reference.bundle):
            raise RequestError(
                f"{candidate.bundle.name} is {families.key(candidate.bundle)}, its reference "
                f"{reference.bundle.name} {families.key(reference.bundle)}: expected one family"
            )
    total = len(candidates) + 1
    progress(0, total, f"{reference.bundle.name}:{reference.bundle.scheme}")
    observed = observe(reference, None, task)
    found = []
    for done, candidate in enumerate(candidates, start=1):
        bundle = candidate.bundle
        progress(done, total, f"{bundle.name}:{bundle.scheme}")
        found.append(measure(bundle, observed, observe(candidate, observed, task)))
    progress(total, total, "done")
    return found


def _module(bundle: Bundle) -> ModuleType:
    families.of(bundle)  # BundleError for a family that there is not
    return import_module(FAMILIES[families.key(bundle)])
