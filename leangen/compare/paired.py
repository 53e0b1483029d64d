"""Two models measured side by side in the same rounds: is one cheaper, and by how much?

Costs of the same round are divided, so that what drifts from round to round, and the meter's gain,
cancel. The mean of the logarithms of these ratios has a Student interval at 95%; what a window's
edges leave open (the receipts' random part) adds in quadrature. Each pair is judged by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

_T = (math.inf, 12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060)
_Z = 1.959964


def student_95(freedom: int) -> float:
    """Student's t at 97.5% for 1 degree of freedom or more.

    >>> round(student_95(4), 3), round(student_95(30), 3)
    (2.776, 2.042)
    """
    if freedom < len(_T):
        return _T[freedom]
    # Fisher's expansion about the normal quantile (Abramowitz & Stegun 26.7.5)
    n, z = freedom, _Z
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times the cost of `base` the cost of `other` is."""

    other: str
    base: str
    value: float
    """Geometric mean over the rounds."""
    low: float
    high: float
    """The interval at 95%."""
    rounds: int

    @property
    def significant(self) -> bool:
        """Whether the interval leaves out 1: equal cost."""
        return self.low > 1 or self.high < 1

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self) | {"significant": self.significant}


def ratio(
    other: str,
    base: str,
    other_costs: Sequence[float],
    base_costs: Sequence[float],
    *,
    own_relative_u: float = 0.0,
) -> Ratio:
    """The ratio of two models' costs over paired rounds, two or more.

    `own_relative_u` is what one round's ratio is uncertain by beyond what shows as scatter (k = 2).
    """
    logs = np.log(np.asarray(other_costs)) - np.log(np.asarray(base_costs))
    n = len(logs)
    scatter = student_95(n - 1) * float(logs.std(ddof=1)) / math.sqrt(n)
    half = math.hypot(scatter, own_relative_u / math.sqrt(n))
    middle = float(logs.mean())
    low, high = math.exp(middle - half), math.exp(middle + half)
    return Ratio(other, base, math.exp(middle), low, high, n)


def told(found: Ratio, cost: str, *, lower_precision: bool) -> str:
    """The ratio as a sentence; `cost` is such as `energy per token`.

    >>> told(Ratio("int4", "fp32", 0.5, 0.4, 0.6, 9), "time per token", lower_precision=True)
    'int4 takes 50% less time per token than fp32 (40% to 60% less)'
    """
    span = f"{_signed(found.low)} to {_signed(found.high)}"
    if not found.significant:
        return (
            f"{found.other} and {found.base}: no significant difference in {cost} "
            f"({span}, {found.rounds} rounds)"
        )
    if found.value < 1:
        return (
            f"{found.other} takes {1 - found.value:.0%} less {cost} than {found.base} "
            f"({1 - found.high:.0%} to {1 - found.low:.0%} less)"
        )
    remark = ", though its precision is lower" if lower_precision else ""
    return (
        f"{found.other} takes {found.value - 1:.0%} MORE {cost} than {found.base}{remark} "
        f"({found.low - 1:.0%} to {found.high - 1:.0%} more)"
    )


def _signed(factor: float) -> str:
    return f"{factor - 1:+.1%}"


def front(costs: Sequence[float], losses: Sequence[float]) -> list[bool]:
    """Which points no other one beats in both figures (Pareto); equal points all stay.

    >>> front([1, 2, 3], [2, 1, 2])
    [True, True, False]
    """
    points = list(zip(costs, losses, strict=True))
    return [
        not any(c <= cost and q <= loss and (c < cost or q < loss) for c, q in points)
        for cost, loss in points
    ]
