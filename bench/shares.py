"""Shares of a sample with their 95% intervals (Wilson 1927)."""

from __future__ import annotations

import math


def interval(successes: int, trials: int) -> tuple[float, float, float]:
    """The share and its interval."""
    if not trials:
        return math.nan, 0.0, 1.0
    z, share = 1.96, successes / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2))
    half /= 1 + z * z / trials
    return share, middle - half, middle + half


def percent(share: tuple[float, float, float]) -> str:
    """`83.0% (79.0-86.4)`"""
    middle, low, high = (100 * value for value in share)
    return f"{middle:.1f}% ({low:.1f}-{high:.1f})"
