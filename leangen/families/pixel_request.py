"""What is asked of the models that draw pixel by pixel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from leangen.families import imaging
from leangen.families.sampling import Sampling, check, is_real


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Images to draw, or to complete."""

    count: int = 1
    seed: int = 0
    """Image i has the seed `seed` + i."""
    conditions: Mapping[str, Any] = field(default_factory=dict)
    """The model's conditions by name, such as a label; its defaults for those left out."""
    temperature: float = 1.0
    top_k: int = 0
    """Draw from this many likeliest colours; 0: from all."""
    top_p: float = 1.0
    image: Any = None
    """A picture of the model's size, or an array [h, w, c] of its values, whose top is kept."""
    strength: float = 0.5
    """The share of an image's rows that is drawn anew."""

    def __post_init__(self) -> None:
        imaging.check_common(self)
        self.sampling(0)
        share = is_real(self.strength) and 0 <= self.strength <= 1
        check(self, strength=(share, "a share, 0 to 1"))

    def sampling(self, index: int) -> Sampling:
        """How the colours of one image are chosen."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed + index,
        )

    def rows_kept(self, height: int) -> int:
        """How many rows of its image, of that height, stay as they are."""
        return 0 if self.image is None else round(height * (1 - self.strength))

    def describe(self) -> dict[str, Any]:
        """The options as plain JSON types; of an image only that there is one."""
        return {
            "count": self.count,
            "seed": self.seed,
            "conditions": dict(self.conditions),
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "image": self.image is not None,
            "strength": self.strength,
        }


def judged(config: Mapping[str, Any], seed: int) -> Request:
    """What measures of quality draw from a seed: ten of them go through a condition's range."""
    return Request(seed=seed, conditions=imaging.spread_conditions(config, seed % 10 / 9))
