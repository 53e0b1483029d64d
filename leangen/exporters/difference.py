"""How far what a bundle computes is from what torch computes, both in fp32."""

from __future__ import annotations

from dataclasses import dataclass

TOLERANCE = 1e-4
"""Largest difference that passes, times the largest value where that is above 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One result of the bundle against torch's; what it is, its kind of check says."""

    largest: float
    """Of the absolute differences."""
    scale: float
    """The largest absolute value of torch."""

    @property
    def passed(self) -> bool:
        """Whether it is within `TOLERANCE`."""
        return self.largest <= TOLERANCE * max(1.0, self.scale)
