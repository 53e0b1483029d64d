"""Quality of what draws pixels or samples: the reference's own, scored by both models.

The reference draws an image or a sound from each seed; both models then predict it, each pixel or
sample from those before it. The measures are those of a language model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from leangen import families
from leangen.quality import language
from leangen.quality.language import Scored
from leangen.quality.measures import Measure, Task
from leangen.session import Session


@dataclass(frozen=True, slots=True)
class Drawn:
    """What the reference drew, and how a model scores it."""

    scored: Scored
    drawn: list[list[int]]


def observe(session: Session, task: Task, reference: Drawn | None) -> Drawn:
    """Score what the reference drew from each seed, or what this model draws if it is that."""
    family = cast(Any, families.of(session.bundle))
    seeds = range(task.seeds)
    drawn = [family.draw(session, seed) for seed in seeds] if reference is None else reference.drawn
    pairs = zip(drawn, seeds, strict=True)
    logits = np.concatenate([family.logits(session, tokens, seed) for tokens, seed in pairs])
    return Drawn(Scored(logits, np.concatenate(drawn).astype(np.int64), [], 0), drawn)


def measure(reference: Drawn, candidate: Drawn) -> list[Measure]:
    """KL divergence first; agreement, perplexities and flips."""
    return language.measure(reference.scored, candidate.scored)
