"""Rational-quadratic splines without branches, for tracing.

nflows and normflows cut out the values inside the tail bound by a boolean mask and compute those
alone: a graph cannot follow, as their number depends on the data. Here every value goes through
the spline, clipped into its bounds, and `torch.where` picks. Durkan et al., Neural Spline Flows,
arXiv:1906.04032, appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

MINIMUM = 1e-3
"""Default of both libraries for the smallest bin width, bin height and slope."""


def bounded(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    left: Any = 0.0,
    right: Any = 1.0,
    bottom: Any = 0.0,
    top: Any = 1.0,
    min_bin_width: float = MINIMUM,
    min_bin_height: float = MINIMUM,
    min_derivative: float = MINIMUM,
) -> tuple[Tensor, Tensor]:
    """The spline of values in [left, right], and the log of its slope; like both libraries'."""
    xs = _knots(unnormalized_widths, left, right, min_bin_width)
    ys = _knots(unnormalized_heights, bottom, top, min_bin_height)
    slopes = min_derivative + functional.softplus(unnormalized_derivatives)

    edges = ys if inverse else xs
    # Inner knots alone are counted, so that both ends belong to a bin.
    here = (inputs[..., None] >= edges[..., 1:-1]).sum(-1, keepdim=True)

    def pick(values: Tensor) -> Tensor:
        return values.gather(-1, here)[..., 0]

    x0, y0, d0, d1 = pick(xs), pick(ys), pick(slopes), pick(slopes[..., 1:])
    width, height = pick(xs[..., 1:]) - x0, pick(ys[..., 1:]) - y0
    slope = height / width
    bend = d0 + d1 - 2 * slope
    if inverse:
        rise = inputs - y0
        a = height * (slope - d0) + rise * bend
        b = height * d0 - rise * bend
        c = -slope * rise
        t = 2 * c / (-b - torch.sqrt(torch.clamp(b * b - 4 * a * c, min=0.0)))
        outputs = t * width + x0
    else:
        t = (inputs - x0) / width
    cross = t * (1 - t)
    below = slope + bend * cross
    if not inverse:
        outputs = y0 + height * (slope * t * t + d0 * cross) / below
    above = slope * slope * (d1 * t * t + 2 * slope * cross + d0 * (1 - t) * (1 - t))
    log_slope = torch.log(above) - 2 * torch.log(below)
    return outputs, -log_slope if inverse else log_slope


def unbounded(
    inputs: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    inverse: bool = False,
    tails: str | Sequence[str] = "linear",
    tail_bound: Any = 1.0,
    **minima: float,
) -> tuple[Tensor, Tensor]:
    """The same inside (-tail_bound, tail_bound), and the identity outside (0 by list of tails)."""
    derivatives = unnormalized_derivatives
    if isinstance(tails, str):
        derivatives = functional.pad(derivatives, (1, 1) if tails == "linear" else (0, 1))
        linear = [tails == "linear"] * inputs.shape[-1]
    else:
        linear = [tail == "linear" for tail in tails]
    # softplus of it and the minimum make slope 1, that of the identity outside
    one = math.log(math.exp(1 - minima.get("min_derivative", MINIMUM)) - 1)
    identity = torch.tensor(linear)[..., None]
    first = torch.where(identity, one, derivatives[..., :1])
    last = torch.where(identity, one, derivatives[..., :1])  # a circle ends as it began
    derivatives = torch.cat([first, derivatives[..., 1:-1], last], -1)

    clipped = torch.minimum(torch.maximum(inputs, -_bound(tail_bound)), _bound(tail_bound))
    outputs, log_slope = bounded(
        clipped,
        unnormalized_widths,
        unnormalized_heights,
        derivatives,
        inverse,
        left=-tail_bound,
        right=tail_bound,
        bottom=-tail_bound,
        top=tail_bound,
        **minima,
    )
    inside = (inputs >= -tail_bound) & (inputs <= tail_bound)
    beyond = inputs if isinstance(tails, str) else torch.zeros_like(inputs)  # as normflows has it
    return torch.where(inside, outputs, beyond), torch.where(inside, log_slope, 0.0)


def _bound(tail_bound: Any) -> Tensor:
    return torch.as_tensor(tail_bound, dtype=torch.float32)


def _knots(logits: Tensor, low: Any, high: Any, minimum: float) -> Tensor:
    """Positions of the knots [..., bins + 1], the outermost exactly at the ends."""
    bins = logits.shape[-1]
    sizes = minimum + (1 - minimum * bins) * functional.softmax(logits, -1)
    low, high = (torch.as_tensor(end, dtype=logits.dtype)[..., None] for end in (low, high))
    inner = (high - low) * torch.cumsum(sizes, -1)[..., :-1] + low
    ends = torch.zeros_like(logits[..., :1])
    return torch.cat([ends + low, inner, ends + high], -1)


@contextmanager
def in_place_of(*modules: ModuleType) -> Iterator[None]:
    """Let these modules use the functions above under their own names for them."""
    ours = {
        "rational_quadratic_spline": bounded,
        "unconstrained_rational_quadratic_spline": unbounded,
    }
    with replaced(*((module, name, new) for module in modules for name, new in ours.items())):
        yield


@contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Set attributes (owner, name, value) that exist, and set them back afterwards."""
    done = []
    try:
        for owner, name, value in changes:
            if hasattr(owner, name):
                done.append((owner, name, getattr(owner, name)))
                setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(done):
            setattr(owner, name, value)
