"""Train the zoo's fashion-gan: `python bench/train/fashion_gan.py -o DIR`

A conditional GAN: a projection discriminator (Miyato and Koyama 2018) that is also shown how unlike
each other the pictures of a group are (Karras et al. 2018), the losses of Goodfellow et al. (2014),
a penalty on its slope at real pictures (Mescheder et al. 2018), both networks trained at once, and
the generator's weights averaged (Yaz et al. 2019). The curve is the sum of all losses: it says that
neither has won, not how good the pictures are.

The pictures of a group have one label: beside those of other labels it goes unseen that a label has
nearly one picture. So it had, at a Frechet distance of 200, with mixed groups, a tenth of the
penalty and a rate of 5e-4; and with spectral norm and hinge losses.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from fashion_diffusion import NOTHING, Pictures, arguments, finish
from shared import DEVICE, train
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

BATCH, RATE = 64, 4e-4
LATENT, TOLD = 64, 64
GROUP = 4
"""Pictures of one label that the discriminator sees side by side."""
STEEP, PENALTY = 4, 0.5
"""Groups of real pictures whose slope is taken, and what its square costs."""


class Grow(nn.Module):
    """A convolution, its channels normalized and then scaled and shifted by the embedding."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, 3, padding=1)
        self.norm = nn.GroupNorm(8, outer, affine=False)
        self.modulation = nn.Linear(LATENT + TOLD, 2 * outer)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, 1)
        return F.leaky_relu(self.norm(self.conv(x)) * (1 + scale) + shift, 0.2)


class Generator(nn.Module):
    """Latents [b, LATENT] and labels [b] to pictures [b, 1, 28, 28] in -1..1."""

    def __init__(self) -> None:
        super().__init__()
        self.told = nn.Embedding(NOTHING, TOLD)
        self.stem = nn.Linear(LATENT + TOLD, 96 * 49)
        self.grow7, self.grow14 = Grow(96, 96), nn.ModuleList([Grow(96, 48), Grow(48, 48)])
        self.grow28 = Grow(48, 16)
        self.head = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, latent: Tensor, label: Tensor) -> Tensor:
        embedding = torch.cat([latent, self.told(label)], 1)
        x = self.grow7(self.stem(embedding).reshape(-1, 96, 7, 7), embedding)
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        for grow in self.grow14:
            x = grow(x, embedding)
        x = self.grow28(F.interpolate(x, scale_factor=2.0, mode="nearest"), embedding)
        return torch.tanh(self.head(x))


class Discriminator(nn.Module):
    """Pictures and labels to scores [b]: high for real pictures of that label."""

    def __init__(self) -> None:
        super().__init__()
        shapes = ((1, 32, 4, 2), (32, 32, 3, 1), (32, 64, 4, 2), (64, 128, 3, 1), (129, 128, 3, 2))
        self.body = nn.ModuleList(
            nn.Conv2d(inner, outer, size, stride=stride, padding=1)
            for inner, outer, size, stride in shapes
        )
        self.dense, self.head = nn.Linear(128 * 16, 128), nn.Linear(128, 1)
        self.told = nn.Embedding(NOTHING, 128)
        for layer in (*self.body, self.dense):
            nn.init.kaiming_normal_(layer.weight, 0.2)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        for conv in self.body[:-1]:
            x = F.leaky_relu(conv(x), 0.2)
        x = F.leaky_relu(self.body[-1](beside_spread(x)), 0.2)
        x = F.leaky_relu(self.dense(x.flatten(1)), 0.2)
        return self.head(x)[:, 0] + (self.told(label) * x).sum(1) / math.sqrt(x.shape[1])


def beside_spread(x: Tensor) -> Tensor:
    """Features [b, c, h, w] and one channel more: where pictures of a group differ, how much."""
    groups = x.float().reshape(GROUP, -1, *x.shape[1:])
    spread = groups.var(0, correction=0).add(1e-8).sqrt().mean(1, keepdim=True)
    return torch.cat([x, spread.to(x.dtype).repeat(GROUP, 1, 1, 1)], 1)


def some(x: Tensor) -> Tensor:
    """The first STEEP groups of a batch."""
    return x.reshape(GROUP, -1, *x.shape[1:])[:, :STEEP].flatten(0, 1)


def steepness(discriminator: nn.Module, real: Tensor, label: Tensor) -> Tensor:
    """Mean squared gradient of the score of real pictures by their pixels."""
    real = real.detach().requires_grad_()
    scores = discriminator(real, label)
    (slope,) = torch.autograd.grad(scores.sum(), real, create_graph=True)
    return slope.square().sum((1, 2, 3)).mean()


def main() -> None:
    """Train, export the generator."""
    args = arguments(__doc__, steps=3000)
    pictures = Pictures(args.data)
    rows = pictures.labels.argsort(stable=True).reshape(NOTHING, -1).numpy()  # as many of each
    players = nn.ModuleDict({"generator": Generator(), "discriminator": Discriminator()}).to(DEVICE)
    generator, discriminator = players["generator"], players["discriminator"]

    def loss_of(rng: np.random.Generator) -> Tensor:
        labels = np.tile(rng.integers(0, NOTHING, BATCH // GROUP), GROUP)
        chosen = rows[labels, rng.integers(0, rows.shape[1], BATCH)]
        real, label = pictures.mirrored(rng, chosen)
        noise = rng.standard_normal((BATCH, LATENT), np.float32)
        with torch.autocast(DEVICE, torch.bfloat16):
            fake = generator(torch.from_numpy(noise).to(DEVICE), label)
            right = discriminator(real, label).float()
            wrong = discriminator(fake.detach(), label).float()
            # The generator learns from the discriminator as it stands: its weights are constants.
            fixed = {name: weight.detach() for name, weight in discriminator.named_parameters()}
            fooled = functional_call(discriminator, fixed, (fake, label)).float()
        found = F.softplus(-right).mean() + F.softplus(wrong).mean()
        steep = steepness(discriminator, some(real), some(label))
        return found + F.softplus(-fooled).mean() + PENALTY / 2 * steep

    curve, weights = train(
        players,
        loss_of,
        steps=args.steps,
        rate=RATE,
        checkpoint=args.output / "checkpoint.pt",
        betas=(0.0, 0.99),
    )
    players.load_state_dict(weights)
    inputs = {"latent": torch.zeros(2, LATENT), "label": torch.zeros(2, dtype=torch.int64)}
    path = args.output / "fashion-gan.onnx"
    finish(generator, inputs, "image", path, steps=args.steps, batch=BATCH, loss_curve=curve)


if __name__ == "__main__":
    main()
