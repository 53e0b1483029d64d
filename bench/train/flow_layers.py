"""Invertible layers of the image flows: `forward(x) -> (z, log_det [n])` and `inverse(z) -> x`.

Scales are bounded, so that draws stay finite in float32. What a layer inverts (1x1 matrices) is
kept with its inverse once `freeze` has been called, so that neither direction solves anything.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from leangen.exporters.torch_splines import unbounded

BOUND = 2.0
"""A coupling scales by exp(-BOUND) to exp(BOUND)."""
BINS, TAIL = 4, 4.0
"""Of the splines: bins inside (-TAIL, TAIL); outside they are the identity."""


class Logit(nn.Module):
    """Values in 0..1 to the logit of ALPHA + (1 - 2 ALPHA) x (Dinh et al. 2017, section 4.1)."""

    alpha = 1e-3

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # 1 - x of a bright pixel is exact: taken from p it would lose digits.
        p, q = (self.alpha + (1 - 2 * self.alpha) * part for part in (x, 1 - x))
        p, q = torch.log(p), torch.log(q)
        log_det = (math.log(1 - 2 * self.alpha) - p - q).flatten(1).sum(1)
        return p - q, log_det

    def inverse(self, z: Tensor) -> Tensor:
        return ((torch.sigmoid(z) - self.alpha) / (1 - 2 * self.alpha)).clamp(0, 1)


class ActNorm(nn.Module):
    """A scale and a shift per entry of `shape`, set by the first batch (Glow, section 3.1)."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(shape))
        self.shift = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        places = x[0].numel() // self.log_scale.numel()
        log_det = (self.log_scale.sum() * places).expand(len(x))
        return (x - self.shift) * torch.exp(self.log_scale), log_det

    def inverse(self, z: Tensor) -> Tensor:
        return z * torch.exp(-self.log_scale) + self.shift

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Take mean and spread of a batch."""
        over = [axis for axis in range(x.dim()) if axis == 0 or self.shift.shape[axis - 1] == 1]
        self.shift.copy_(x.mean(over, keepdim=True)[0])
        self.log_scale.copy_(-torch.log(x.std(over, keepdim=True)[0] + 0.05))


class Mix(nn.Module):
    """An invertible 1x1 convolution in LU form (Glow, section 3.2)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels))[0]
        order, lower, upper = torch.linalg.lu(rotation)
        self.register_buffer("order", order)
        self.register_buffer("sign", upper.diagonal().sign())
        self.log_size = nn.Parameter(upper.diagonal().abs().log())
        self.lower, self.upper = nn.Parameter(lower), nn.Parameter(upper)
        self.register_buffer("matrix", torch.zeros(channels, channels))
        self.register_buffer("back", torch.zeros(channels, channels))
        self.frozen = False

    def _matrix(self) -> Tensor:
        lower = torch.tril(self.lower, -1) + torch.eye(len(self.lower))
        upper = torch.triu(self.upper, 1) + torch.diag(self.sign * torch.exp(self.log_size))
        made: Tensor = self.order @ lower @ upper
        return made

    @torch.no_grad()
    def freeze(self) -> None:
        """Keep the matrix and its inverse."""
        self.matrix.copy_(self._matrix())
        self.back.copy_(torch.linalg.inv(self.matrix.double()))
        self.frozen = True

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        matrix = self.matrix if self.frozen else self._matrix()
        log_det = (self.log_size.sum() * (x[0].numel() // len(matrix))).expand(len(x))
        return F.conv2d(x, matrix[:, :, None, None]), log_det

    def inverse(self, z: Tensor) -> Tensor:
        return F.conv2d(z, self.back[:, :, None, None])


class Select(nn.Module):
    """Channels in another order: what a mask that alternates does (RealNVP, section 3.4)."""

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor(order))
        self.register_buffer("back", torch.argsort(torch.tensor(order)))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, self.order], x.new_zeros(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        return z[:, self.back]


class Convolutions(nn.Sequential):
    """A conditioner: 3x3, `middle` x `middle` and 3x3; what it gives starts at zero."""

    def __init__(self, inner: int, hidden: int, outer: int, middle: int) -> None:
        last = nn.Conv2d(hidden, outer, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        super().__init__(
            nn.Conv2d(inner, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, middle, padding=middle // 2),
            nn.ReLU(),
            last,
        )


class Dense(nn.Module):
    """A conditioner that sees the whole picture: two linear layers."""

    def __init__(self, inner: int, hidden: int, outer: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.first = nn.Linear(inner * size * size, hidden)
        self.last = nn.Linear(hidden, outer * size * size)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.last(F.relu(self.first(x.flatten(1))))
        return made.unflatten(1, (-1, self.size, self.size))


def affine(x: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Shift and scale each value of x [n, c, h, w] by parameters [n, 2 c, h, w]."""
    shift, raw = parameters.chunk(2, 1)
    log_scale = BOUND * torch.tanh(raw / BOUND)
    log_det = log_scale.flatten(1).sum(1)
    if inverse:
        return x * torch.exp(-log_scale) - shift, -log_det
    return (x + shift) * torch.exp(log_scale), log_det


def spline(x: Tensor, parameters: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """A monotone spline of each value of x (Durkan et al. 2019), by its 3 BINS - 1 parameters.

    Two more of them shift and scale, as in an affine coupling.
    """
    shaped = parameters.unflatten(1, (-1, x.shape[1])).movedim(1, -1)
    widths, heights, slopes, shift, raw = shaped.split([BINS, BINS, BINS - 1, 1, 1], -1)
    both = torch.cat([shift[..., 0], raw[..., 0]], 1)
    total = x.new_zeros(len(x))
    if not inverse:
        x, total = affine(x, both, False)
    x, log_slope = unbounded(x, widths, heights, slopes + ONE, inverse, tail_bound=TAIL)
    total = total + log_slope.flatten(1).sum(1)
    if inverse:
        x, log_det = affine(x, both, True)
        total = total + log_det
    return x, total


ONE = math.log(math.expm1(1 - 1e-3))
"""softplus of it and the spline's smallest slope make 1: parameters of zero are the identity."""
FORMS = {"affine": (affine, 2), "spline": (spline, 3 * BINS + 1)}
"""A coupling's functions, and how many parameters each value needs."""


class Coupling(nn.Module):
    """The second half of the channels, transformed as the first half says."""

    def __init__(self, channels: int, net: nn.Module, form: str = "affine") -> None:
        super().__init__()
        self.kept, self.net, self.transform = channels // 2, net, FORMS[form][0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, moved = x[:, : self.kept], x[:, self.kept :]
        moved, log_det = self.transform(moved, self.net(kept), False)
        return torch.cat([kept, moved], 1), log_det

    def inverse(self, z: Tensor) -> Tensor:
        kept, moved = z[:, : self.kept], z[:, self.kept :]
        return torch.cat([kept, self.transform(moved, self.net(kept), True)[0]], 1)


class Chain(nn.ModuleList):
    """Layers one after the other."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for layer in self:
            x, log_det = layer(x)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor) -> Tensor:
        for layer in reversed(self):
            z = layer.inverse(z)
        return z

    @torch.no_grad()
    def start(self, x: Tensor) -> Tensor:
        """Set the ActNorm layers by a batch, each by what reaches it."""
        for layer in self:
            if isinstance(layer, ActNorm | Chain):
                layer.start(x)
            x = layer(x)[0]
        return x


class MultiScale(nn.Module):
    """Squares of four pixels become channels; half of them leave after the first level.

    What leaves is shifted and scaled as the other half says, so that the latent is a standard
    normal (Dinh et al. 2017, section 3.6; the learned prior of Glow).
    """

    def __init__(self, first: Chain, leave: Coupling, second: Chain) -> None:
        super().__init__()
        self.logit, self.first, self.leave, self.second = Logit(), first, leave, second

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, total = self.logit(x)
        x, first = self.first(F.pixel_unshuffle(x, 2))
        x, leave = self.leave(x)
        kept, gone = x.chunk(2, 1)
        kept, second = self.second(F.pixel_unshuffle(kept, 2))
        return torch.cat([kept.flatten(1), gone.flatten(1)], 1), total + first + leave + second

    def inverse(self, z: Tensor) -> Tensor:
        kept, gone = z.chunk(2, 1)
        kept = self.second.inverse(kept.unflatten(1, (8, 7, 7)))
        x = torch.cat([F.pixel_shuffle(kept, 2), gone.unflatten(1, (2, 14, 14))], 1)
        x = self.first.inverse(self.leave.inverse(x))
        made: Tensor = self.logit.inverse(F.pixel_shuffle(x, 2))
        return made

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Set the ActNorm layers by a batch."""
        x = self.first.start(F.pixel_unshuffle(self.logit(x)[0], 2))
        self.second.start(F.pixel_unshuffle(self.leave(x)[0].chunk(2, 1)[0], 2))
