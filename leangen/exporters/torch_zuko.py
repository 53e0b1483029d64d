"""Flows built with zuko (github.com/probabilists/zuko): a `zuko.lazy.Flow` over a normal base.

Its splines are computed in float64: what a knot is rounded to is amplified by steep slopes, and far
in the tails that alone moves a log-density by more than 1e-5 of itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from leangen.errors import UnsupportedError
from leangen.exporters.torch_flow import Flow, needs_normal
from leangen.exporters.torch_sequential import Masked, sequential
from leangen.exporters.torch_splines import replaced


def open_flow(module: nn.Module) -> Flow:
    """The directions of a flow; UnsupportedError for one that needs a context or another base."""
    base: Any = module.base(None)
    normal = getattr(base, "base_dist", base)
    if not isinstance(normal, torch.distributions.Normal):
        raise needs_normal(normal)

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        flow = module(None)
        z, log_det = flow.transform.call_and_ladj(x)
        if flow.reinterpreted:
            log_det = log_det.flatten(1).sum(1)
        normal = getattr(flow.base, "base_dist", flow.base)
        return (z - normal.loc) / normal.scale, flow.base.log_prob(z) + log_det

    def decode(u: Tensor) -> Tensor:
        flow = module(None)
        normal = getattr(flow.base, "base_dist", flow.base)
        made: Tensor = flow.transform.inv(u * normal.scale + normal.loc)
        return made

    def log_density(x: Tensor) -> Tensor:
        made: Tensor = module(None).log_prob(x)
        return made

    return Flow(encode, decode, log_density, tuple(normal.loc.shape), traceable)


def traceable() -> AbstractContextManager[None]:
    """While it is open, layers of the library can be traced."""
    from zuko.transforms import (
        AutoregressiveTransform,
        FreeFormJacobianTransform,
        MonotonicRQSTransform,
        MonotonicTransform,
        UnconstrainedMonotonicTransform,
    )

    return replaced(
        (AutoregressiveTransform, "_inverse", _inverse),
        (MonotonicRQSTransform, "__init__", _knots_in_float64(MonotonicRQSTransform.__init__)),
        *(
            (MonotonicRQSTransform, name, _in_float64(getattr(MonotonicRQSTransform, name)))
            for name in ("_call", "call_and_ladj", "_inverse")
        ),
        *(
            (kind, name, _refuse)
            for kind in (
                MonotonicTransform,
                UnconstrainedMonotonicTransform,
                FreeFormJacobianTransform,
            )
            for name in ("_call", "call_and_ladj", "_inverse")
        ),
    )


def _inverse(transform: Any, y: Tensor) -> Tensor:
    layer, context = transform.meta.func.__self__, transform.meta.args[0]
    if context is not None:
        raise UnsupportedError("the flow has a context: give a module that fixes it")

    def invert(y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        from zuko.utils import unpack

        phi = unpack(parameters.unflatten(-1, (-1, layer.total)), layer.shapes)
        univariate = layer.univariate(*phi)
        x = univariate.inv(y)
        return x, -univariate.log_abs_det_jacobian(x, y).sum(-1)

    return sequential(y, Masked(layer, layer.hyper, layer.total, invert))[0]


def _knots_in_float64(init: Callable[..., None]) -> Callable[..., None]:
    def initialized(spline: Any, *parameters: Tensor, **options: Any) -> None:
        init(spline, *(parameter.double() for parameter in parameters), **options)

    return initialized


def _in_float64(method: Callable[..., Any]) -> Callable[..., Any]:
    def computed(spline: Any, x: Tensor) -> Any:
        made = method(spline, x.double())
        if isinstance(made, Tensor):
            return made.to(x.dtype)
        return tuple(part.to(x.dtype) for part in made)

    return computed


def _refuse(transform: Any, *_: Tensor) -> Any:
    raise UnsupportedError(
        f"{type(transform).__name__} is inverted by bisection or integrated, with derivatives: not "
        "exported; use an affine or a rational-quadratic spline flow (MAF, NSF, NICE, RealNVP)"
    )
