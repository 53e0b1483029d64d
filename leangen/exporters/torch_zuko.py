"""Flows built with zuko (github.com/probabilists/zuko): a `zuko.lazy.Flow` over a normal base."""

from __future__ import annotations

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
    from zuko.transforms import AutoregressiveTransform, MonotonicTransform

    return replaced(
        (AutoregressiveTransform, "_inverse", _inverse),
        (MonotonicTransform, "_call", _refuse),
        (MonotonicTransform, "call_and_ladj", _refuse),
        (MonotonicTransform, "_inverse", _refuse),
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


def _refuse(transform: Any, *_: Tensor) -> Any:
    raise UnsupportedError(
        f"{type(transform).__name__} is inverted by bisection and needs derivatives: not exported; "
        "use an affine or a rational-quadratic spline flow (MAF, NSF, NICE, RealNVP)"
    )
