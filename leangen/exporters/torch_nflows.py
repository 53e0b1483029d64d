"""Flows built with nflows (github.com/bayesiains/nflows): a `Flow` over a diagonal normal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from leangen.errors import UnsupportedError
from leangen.exporters.torch_flow import Flow, needs_normal
from leangen.exporters.torch_sequential import Masked, sequential
from leangen.exporters.torch_splines import in_place_of, replaced


def open_flow(module: nn.Module) -> Flow:
    """The directions of a flow; UnsupportedError for another base than a diagonal normal."""
    flow: Any = module
    base, shape = flow._distribution, tuple(flow._distribution._shape)
    if type(base).__name__ not in ("StandardNormal", "DiagonalNormal"):
        raise needs_normal(base)
    loc, spread = torch.zeros(shape), torch.ones(shape)
    if type(base).__name__ == "DiagonalNormal":
        loc, spread = base.mean_.reshape(shape), base.log_std_.reshape(shape).exp()

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = flow._transform(x)
        return (z - loc) / spread, base.log_prob(z) + log_det

    def decode(u: Tensor) -> Tensor:
        made: Tensor = flow._transform.inverse(u * spread + loc)[0]
        return made

    return Flow(encode, decode, flow.log_prob, shape, traceable)


@contextmanager
def traceable() -> Iterator[None]:
    """While it is open, layers of the library can be traced."""
    from nflows.transforms import autoregressive, splines
    from nflows.transforms.splines import rational_quadratic

    with (
        in_place_of(splines, rational_quadratic, autoregressive),
        replaced((autoregressive.AutoregressiveTransform, "inverse", inverse)),
    ):
        yield


def inverse(layer: Any, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """In place of an autoregressive transform's `inverse`, in nflows and in normflows."""
    if context is not None:
        raise UnsupportedError("the flow has a context: give a module that fixes it")

    def invert(y: Tensor, parameters: Tensor) -> tuple[Tensor, Tensor]:
        with replaced((layer, "features", y.shape[1])):
            made: tuple[Tensor, Tensor] = layer._elementwise_inverse(y, parameters)
        return made

    per_feature = layer._output_dim_multiplier()
    return sequential(inputs, Masked(layer, layer.autoregressive_net, per_feature, invert))
