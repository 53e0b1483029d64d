"""Train the class-conditional image diffusion models: `python bench/train/fashion_ddpm.py -o DIR`

A UNet that denoises Fashion-MNIST by class (Ho et al. 2020), with v prediction (Salimans and Ho
2022) on the cosine schedule (Nichol and Dhariwal 2021), and classifier-free guidance (Ho and
Salimans 2022): a tenth of the labels are dropped. `--size 28` is the catalog's fashion-ddpm,
`--size 14` fashion-ddpm-14, which begins a cascade.
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
EMBEDDING = 128
WIDTHS = {28: (32, 80), 14: (24, 56)}
"""Channels at half the size and at a quarter of it, by size."""
STEPS = {28: 7500, 14: 6000}
"""That the catalog's models saw."""
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
    """Images [b, 1, s, s] in -1..1, timesteps [b] and labels [b] to v [b, 1, s, s].

    It works on squares of four pixels, at half the size and a quarter of it.
    """

    def __init__(self, wide: int, deep: int) -> None:
        super().__init__()
        self.time = nn.Sequential(
            nn.Linear(64, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING)
        )
        self.label = nn.Embedding(NOTHING + 1, EMBEDDING)
        self.stem = nn.Conv2d(4, wide, 3, padding=1)
        self.down1, self.down2 = Block(wide, wide), Block(wide, wide)
        self.shrink = nn.Conv2d(wide, deep, 3, stride=2, padding=1)
        self.middle1, self.attention, self.middle2 = (
            Block(deep, deep),
            Attention(deep),
            Block(deep, deep),
        )
        self.grow = nn.Conv2d(deep, wide, 3, padding=1)
        self.up1, self.up2 = Block(2 * wide, wide), Block(2 * wide, wide)
        self.norm = nn.GroupNorm(8, wide)
        self.head = nn.Conv2d(wide, 4, 3, padding=1)
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
        h = self.grow(F.interpolate(h, second.shape[-2:], mode="nearest"))
        h = self.up1(torch.cat([h, second], 1), embedding)
        h = self.up2(torch.cat([h, first], 1), embedding)
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), 2)


def main() -> None:
    """Train, export, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="DIR", help="Fashion-MNIST's four files")
    parser.add_argument("--size", type=int, choices=(14, 28), default=28)
    parser.add_argument("--steps", type=int, help="default: as many as the catalog's model saw")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    steps = args.steps or STEPS[args.size]
    pixels, labels = (torch.from_numpy(part) for part in read("train", args.size, args.data))
    levels = torch.tensor(schedules.trained(SCHEDULE), device=DEVICE, dtype=torch.float32)
    torch.manual_seed(0)
    model = UNet(*WIDTHS[args.size]).to(DEVICE)

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
        model, loss_of, steps=steps, rate=RATE, checkpoint=args.output / "checkpoint.pt"
    )
    model.load_state_dict(weights)
    name = "fashion-ddpm" if args.size == 28 else f"fashion-ddpm-{args.size}"
    inputs = {
        "sample": torch.zeros(2, 1, args.size, args.size),
        "timestep": torch.zeros(2, dtype=torch.int64),
        "label": torch.zeros(2, dtype=torch.int64),
    }
    export_onnx(model.cpu(), inputs, ["v"], args.output / f"{name}.onnx")
    card = {
        "name": name,
        "data": "Fashion-MNIST (Xiao et al. 2017), MIT: 60,000 pictures, mirrored at random",
        "licence": "MIT",
        "parameters": parameters(model),
        "steps": steps,
        "batch": BATCH,
        "loss_curve": curve,
    }
    write_card(args.output / "card.json", card)


def read(part: str, size: int, folder: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Pictures float32 [n, 1, size, size] in -1..1, the mean of each square, and labels [n]."""
    images, labels = fashion(part, folder)
    scale = 28 // size
    squares = images.reshape(-1, size, scale, size, scale).mean(axis=(2, 4), dtype=np.float32)
    return squares[:, None] / np.float32(127.5) - 1, labels


if __name__ == "__main__":
    main()
