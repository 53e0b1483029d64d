"""Train the catalog's fashion-ddpm: `python bench/train/fashion_ddpm.py -o DIR`

A UNet that denoises Fashion-MNIST by class (Ho et al. 2020), with v prediction (Salimans and Ho
2022) on the cosine schedule (Nichol and Dhariwal 2021), and classifier-free guidance (Ho and
Salimans 2022): a tenth of the labels are dropped.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from shared import DEVICE, export_onnx, fashion, parameters, train, write_card
from torch import Tensor, nn
from torch.nn import functional as F

from leangen.samplers import schedules

TIMESTEPS, BATCH, RATE, DROPPED = 1000, 128, 1e-3, 0.1
NOTHING = 10
"""The label that tells nothing."""
WIDE, DEEP, EMBEDDING = 32, 80, 128
"""Channels at half the size and at a quarter of it, and of what timestep and label become."""
SCHEDULE = {"kind": "cosine", "timesteps": TIMESTEPS}


class Block(nn.Module):
    """Two convolutions with a residual, shifted by the embedding of timestep and label."""

    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inner), nn.GroupNorm(8, outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.shift = nn.Linear(EMBEDDING, outer)
        self.skip = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.shift(embedding)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Every pixel looks at every other, in 2 heads, with a residual."""

    heads = 2

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        n, channels, height, width = x.shape
        split = (n, 3, self.heads, channels // self.heads, height * width)
        q, k, v = self.qkv(self.norm(x)).reshape(split).transpose(-1, -2).unbind(1)
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
        mixed = (weights @ v).transpose(-1, -2).reshape(n, channels, height, width)
        return x + self.out(mixed)


class UNet(nn.Module):
    """Images [b, 1, 28, 28] in -1..1, timesteps [b] and labels [b] to v [b, 1, 28, 28].

    It works on squares of four pixels, at 14 x 14 and at 7 x 7.
    """

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(
            nn.Linear(64, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING)
        )
        self.label = nn.Embedding(NOTHING + 1, EMBEDDING)
        self.stem = nn.Conv2d(4, WIDE, 3, padding=1)
        self.down1, self.down2 = Block(WIDE, WIDE), Block(WIDE, WIDE)
        self.shrink = nn.Conv2d(WIDE, DEEP, 3, stride=2, padding=1)
        self.middle1, self.attention, self.middle2 = (
            Block(DEEP, DEEP),
            Attention(DEEP),
            Block(DEEP, DEEP),
        )
        self.grow = nn.Conv2d(DEEP, WIDE, 3, padding=1)
        self.up1, self.up2 = Block(2 * WIDE, WIDE), Block(2 * WIDE, WIDE)
        self.norm = nn.GroupNorm(8, WIDE)
        self.head = nn.Conv2d(WIDE, 4, 3, padding=1)
        frequencies = torch.exp(-math.log(10_000) * torch.arange(32) / 32)
        self.register_buffer("frequencies", frequencies)

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        angles = timestep.float()[:, None] * self.frequencies[None]
        embedding = self.time(torch.cat([angles.sin(), angles.cos()], 1)) + self.label(label)
        embedding = F.silu(embedding)
        first = self.down1(self.stem(F.pixel_unshuffle(sample, 2)), embedding)
        second = self.down2(first, embedding)
        h = self.middle1(self.shrink(second), embedding)
        h = self.middle2(self.attention(h), embedding)
        h = self.grow(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        h = self.up1(torch.cat([h, second], 1), embedding)
        h = self.up2(torch.cat([h, first], 1), embedding)
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), 2)


def main() -> None:
    """Train, export, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="DIR", help="Fashion-MNIST's four files")
    parser.add_argument("--steps", type=int, default=7500)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    images, labels = fashion("train", args.data)
    pixels = torch.from_numpy(images.astype(np.float32) / 127.5 - 1)[:, None]
    labels = torch.from_numpy(labels)
    levels = torch.tensor(schedules.trained(SCHEDULE), device=DEVICE, dtype=torch.float32)
    torch.manual_seed(0)
    model = UNet().to(DEVICE)

    def loss_of(rng: np.random.Generator) -> Tensor:
        rows = torch.from_numpy(rng.integers(0, len(pixels), BATCH))
        x, label = pixels[rows].to(DEVICE), labels[rows].to(DEVICE)
        flipped = torch.from_numpy(rng.random(BATCH) < 0.5).to(DEVICE)
        x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
        dropped = torch.from_numpy(rng.random(BATCH) < DROPPED).to(DEVICE)
        label = torch.where(dropped, NOTHING, label)
        # One timestep of each stratum: the loss of a batch then varies less.
        strata = (np.arange(BATCH) + rng.random(BATCH)) / BATCH * TIMESTEPS
        timestep = torch.from_numpy(strata.astype(np.int64)).to(DEVICE)
        alpha, sigma = (part[:, None, None, None] for part in levels[timestep].unbind(1))
        noise = torch.from_numpy(rng.standard_normal(x.shape, np.float32)).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            answer = model(alpha * x + sigma * noise, timestep, label)
        return F.mse_loss(answer.float(), alpha * noise - sigma * x)

    curve, weights = train(
        model, loss_of, steps=args.steps, rate=RATE, checkpoint=args.output / "checkpoint.pt"
    )
    model.load_state_dict(weights)
    inputs = {
        "sample": torch.zeros(2, 1, 28, 28),
        "timestep": torch.zeros(2, dtype=torch.int64),
        "label": torch.zeros(2, dtype=torch.int64),
    }
    export_onnx(model.cpu(), inputs, ["v"], args.output / "fashion-ddpm.onnx")
    card = {
        "name": "fashion-ddpm",
        "data": "Fashion-MNIST (Xiao et al. 2017), MIT: 60,000 pictures, mirrored at random",
        "licence": "MIT",
        "parameters": parameters(model),
        "steps": args.steps,
        "batch": BATCH,
        "loss_curve": curve,
    }
    write_card(args.output / "card.json", card)


if __name__ == "__main__":
    main()
