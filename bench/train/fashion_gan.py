"""Train the zoo's fashion-gan: `python bench/train/fashion_gan.py -o DIR`

A conditional GAN: a projection discriminator (Miyato and Koyama 2018) with spectral norm (Miyato et
al. 2018), hinge losses (Lim and Ye 2017), both networks trained at once, and the generator's
weights averaged (Yaz et al. 2019). The curve is the sum of both losses: it says that neither has
won, not how good the pictures are.
"""

from __future__ import annotations

import numpy as np
import torch
from fashion_diffusion import NOTHING, Pictures, arguments, finish
from shared import DEVICE, train
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

BATCH, RATE = 64, 5e-4
LATENT, TOLD = 64, 64


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
        shapes = ((1, 32, 4, 2), (32, 32, 3, 1), (32, 64, 4, 2), (64, 128, 3, 1), (128, 128, 3, 2))
        self.body = nn.ModuleList(
            spectral_norm(nn.Conv2d(inner, outer, size, stride=stride, padding=1))
            for inner, outer, size, stride in shapes
        )
        self.head = spectral_norm(nn.Linear(128, 1))
        self.told = spectral_norm(nn.Embedding(NOTHING, 128))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        for conv in self.body:
            x = F.leaky_relu(conv(x), 0.2)
        x = x.sum((2, 3))
        return self.head(x)[:, 0] + (self.told(label) * x).sum(1)


def main() -> None:
    """Train, export the generator."""
    args = arguments(__doc__, steps=1500)
    pictures = Pictures(args.data)
    players = nn.ModuleDict({"generator": Generator(), "discriminator": Discriminator()}).to(DEVICE)
    generator, discriminator = players["generator"], players["discriminator"]

    def loss_of(rng: np.random.Generator) -> Tensor:
        real, label = pictures.batch(rng, BATCH)
        noise = rng.standard_normal((BATCH, LATENT), np.float32)
        with torch.autocast(DEVICE, torch.bfloat16):
            fake = generator(torch.from_numpy(noise).to(DEVICE), label)
            both = torch.cat([real, fake.detach().float()])
            scores = discriminator(both, torch.cat([label, label])).float()
            # The generator learns from the discriminator as it stands: its weights are constants.
            fixed = {name: weight.detach() for name, weight in discriminator.named_parameters()}
            fooled = functional_call(discriminator, fixed, (fake, label)).float()
        found = F.relu(1 - scores[:BATCH]).mean() + F.relu(1 + scores[BATCH:]).mean()
        return found - fooled.mean()

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
