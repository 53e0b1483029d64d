"""Flows built with normflows (github.com/VincentStimper/normalizing-flows).

`NormalizingFlow` and `MultiscaleFlow` (Glow) over diagonal Gaussians. Their `forward` goes from
the latent to the data. The latents of a multi-scale flow stand side by side in one row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from leangen.errors import UnsupportedError
from leangen.exporters.torch_flow import Flow, needs_normal
from leangen.exporters.torch_nflows import inverse
from leangen.exporters.torch_splines import in_place_of, replaced


def open_flow(module: nn.Module) -> Flow:
    """The directions of a flow; UnsupportedError for classes as a condition and other bases."""
    flow: Any = module
    multiscale = isinstance(flow.q0, nn.ModuleList)
    bases: list[Any] = list(flow.q0) if multiscale else [flow.q0]
    for base in bases:
        if type(base).__name__ not in ("DiagGaussian", "GlowBase"):
            raise needs_normal(base)
        if getattr(base, "class_cond", False):
            raise UnsupportedError("the flow's base depends on a class: give one without classes")
    sizes = [math.prod(base.shape) for base in bases]

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        zs, log_density = flow.inverse_and_log_det(x)
        zs = zs if multiscale else [zs]
        rows = []
        for base, z in zip(bases, zs, strict=True):
            loc, log_scale = _gaussian(base)
            rows.append(((z - loc) * torch.exp(-log_scale)).flatten(1))
            log_density = log_density + base.log_prob(z)
        return torch.cat(rows, 1) if multiscale else rows[0], log_density

    def decode(u: Tensor) -> Tensor:
        zs = []
        for base, row in zip(bases, u.split(sizes, 1) if multiscale else [u], strict=True):
            loc, log_scale = _gaussian(base)
            zs.append(row.unflatten(1, tuple(base.shape)) * torch.exp(log_scale) + loc)
        made: Tensor = flow.forward_and_log_det(zs if multiscale else zs[0])[0]
        return made

    def log_density(x: Tensor) -> Tensor:
        made: Tensor = flow.log_prob(x, None) if multiscale else flow.log_prob(x)
        return made

    return Flow(encode, decode, log_density, (sum(sizes),), traceable)


def _gaussian(base: Any) -> tuple[Tensor, Tensor]:
    """Mean and log of the standard deviation."""
    if type(base).__name__ == "DiagGaussian":
        return base.loc, base.log_scale
    factor = base.logscale_factor
    loc = base.loc * torch.exp(base.loc_logs * factor)
    return loc, base.log_scale * torch.exp(base.log_scale_logs * factor)


@contextmanager
def traceable() -> Iterator[None]:
    """While it is open, layers of the library can be traced."""
    from normflows.flows.affine.autoregressive import Autoregressive
    from normflows.flows.reshape import Split
    from normflows.utils import splines

    with (
        in_place_of(splines),
        replaced(
            (Autoregressive, "inverse", inverse),
            (Split, "forward", _split),
            (Split, "inverse", _merge),
        ),
    ):
        yield


def _split(split: Any, z: Tensor) -> tuple[list[Tensor], int]:
    """As normflows' own, with places of a checkerboard that do not depend on the batch."""
    if not split.mode.startswith("checkerboard"):
        parts = list(z.chunk(2, dim=1))
        return (parts[::-1] if split.mode == "channel_inv" else parts), 0
    ones, zeros = _checkerboard(z.shape[1:], split.mode)
    shape = (*z.shape[:-1], -1)
    return [z.flatten(1)[:, ones].reshape(shape), z.flatten(1)[:, zeros].reshape(shape)], 0


def _merge(split: Any, parts: Sequence[Tensor]) -> tuple[Tensor, int]:
    one, two = parts
    if not split.mode.startswith("checkerboard"):
        return torch.cat([two, one] if split.mode == "channel_inv" else [one, two], 1), 0
    shape = (*one.shape[1:-1], 2 * one.shape[-1])
    order = torch.argsort(torch.cat(_checkerboard(shape, split.mode)))
    return torch.cat([one.flatten(1), two.flatten(1)], 1)[:, order].unflatten(1, shape), 0


def _checkerboard(shape: Sequence[int], mode: str) -> tuple[Tensor, Tensor]:
    """Where a flattened sample has ones, and where zeros; the first place has 0, inverted 1."""
    parity = sum(torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij"))
    board = (torch.as_tensor(parity) + mode.endswith("inv")).flatten() % 2
    return board.nonzero()[:, 0], (1 - board).nonzero()[:, 0]
