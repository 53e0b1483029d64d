"""What the denoisers of clothes share: data, noise, a UNet, the loss of a step, the end.

`fashion_ddpm.py`, `fashion_flow_matching.py`, `fashion_cascade.py`, `fashion_latent.py` and
`fashion_dit.py` train them. Timesteps rise with the noise, up to TIMESTEPS.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shared import DEVICE, export_onnx, fashion, parameters, train, write_card
from torch import Tensor, nn
from torch.nn import functional as F

from leangen.samplers import schedules

TIMESTEPS, DROPPED = 1000, 0.1
NOTHING = 10
"""The label that tells nothing."""
EMBEDDING = 128
"""Numbers that timestep and condition become."""
SCHEDULE = {"kind": "cosine", "timesteps": TIMESTEPS}
DATA = "Fashion-MNIST (Xiao et al. 2017), MIT: 60,000 pictures, mirrored at random"


class Block(nn.Module):
    """Two convolutions with a residual, shifted by an embedding if there is one."""

    def __init__(self, inner: int, outer: int, embedding: int = EMBEDDING) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inner), nn.GroupNorm(8, outer)
        self.conv1 = nn.Conv2d(inner, outer, 3, padding=1)
        self.conv2 = nn.Conv2d(outer, outer, 3, padding=1)
        self.shift = nn.Linear(embedding, outer) if embedding else None
        self.skip = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        if self.shift is not None:
            h = h + self.shift(embedding)[:, :, None, None]
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


class Clock(nn.Module):
    """Timesteps [b] as sines and cosines, then as embeddings [b, EMBEDDING]."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Sequential(
            nn.Linear(64, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING)
        )
        frequencies = torch.exp(-math.log(10_000) * torch.arange(32) / 32)
        self.register_buffer("frequencies", frequencies)

    def forward(self, timestep: Tensor) -> Tensor:
        angles = timestep.float()[:, None] * self.frequencies[None]
        return self.dense(torch.cat([angles.sin(), angles.cos()], 1))


def label_embedding() -> nn.Module:
    """Of the ten labels and of NOTHING."""
    return nn.Embedding(NOTHING + 1, EMBEDDING)


class UNet(nn.Module):
    """Samples [b, c, h, w], timesteps [b] and a condition to answers [b, `answers`, h, w].

    It works on squares of `fold` x `fold` pixels, at that size and at half of it; `wide` and
    `deep` are the channels there. `told` makes an embedding of the condition; `beside` channels
    are given beside the sample.
    """

    def __init__(
        self, told: nn.Module, *, fold: int, wide: int = 32, deep: int = 80, beside: int = 0
    ) -> None:
        super().__init__()
        self.fold = fold
        self.time, self.told = Clock(), told
        self.stem = nn.Conv2d((1 + beside) * fold**2, wide, 3, padding=1)
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
        self.head = nn.Conv2d(wide, fold**2, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        embedding = F.silu(self.time(timestep) + self.told(condition))
        folded = F.pixel_unshuffle(sample, self.fold) if self.fold > 1 else sample
        first = self.down1(self.stem(folded), embedding)
        second = self.down2(first, embedding)
        h = self.middle1(self.shrink(second), embedding)
        h = self.middle2(self.attention(h), embedding)
        h = self.grow(F.interpolate(h, scale_factor=2.0, mode="nearest"))
        h = self.up1(torch.cat([h, second], 1), embedding)
        h = self.up2(torch.cat([h, first], 1), embedding)
        answer = self.head(F.silu(self.norm(h)))
        return F.pixel_shuffle(answer, self.fold) if self.fold > 1 else answer


class Pictures:
    """Fashion-MNIST's training pictures in -1..1, [n, 1, 28, 28], and their labels."""

    def __init__(self, folder: Path | None) -> None:
        images, labels = fashion("train", folder)
        self.pixels = torch.from_numpy(images.astype(np.float32) / 127.5 - 1)[:, None]
        self.labels = torch.from_numpy(labels)

    def batch(self, rng: np.random.Generator, size: int) -> tuple[Tensor, Tensor]:
        """Some of them, half of them mirrored, and their labels."""
        return self.mirrored(rng, rng.integers(0, len(self.pixels), size))

    def mirrored(
        self, rng: np.random.Generator, chosen: np.ndarray[Any, Any]
    ) -> tuple[Tensor, Tensor]:
        """Those of the rows `chosen`, half of them mirrored, and their labels."""
        rows = torch.from_numpy(chosen)
        x, label = self.pixels[rows].to(DEVICE), self.labels[rows].to(DEVICE)
        flipped = torch.from_numpy(rng.random(len(rows)) < 0.5).to(DEVICE)
        return torch.where(flipped[:, None, None, None], x.flip(-1), x), label


def dropped(condition: Tensor, nothing: float, rng: np.random.Generator) -> Tensor:
    """A tenth of the conditions replaced by what tells nothing, for guidance."""
    lost = torch.from_numpy(rng.random(len(condition)) < DROPPED).to(DEVICE)
    return torch.where(lost.reshape(-1, *[1] * (condition.ndim - 1)), nothing, condition)


def strata(rng: np.random.Generator, size: int) -> Tensor:
    """One number of each stratum of 0..1, float64: the loss of a batch then varies less."""
    return torch.from_numpy((np.arange(size) + rng.random(size)) / size).to(DEVICE)


def normal(rng: np.random.Generator, like: Tensor) -> Tensor:
    """Noise in the shape of a batch."""
    return torch.from_numpy(rng.standard_normal(like.shape, np.float32)).to(DEVICE)


_LEVELS = torch.tensor(schedules.trained(SCHEDULE), device=DEVICE, dtype=torch.float32)


def v_noised(x: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy samples, their timesteps, and v (Salimans and Ho 2022) on the cosine schedule."""
    timestep = (strata(rng, len(x)) * TIMESTEPS).long()
    alpha, sigma = (part[:, None, None, None] for part in _LEVELS[timestep].unbind(1))
    noise = normal(rng, x)
    return alpha * x + sigma * noise, timestep, alpha * noise - sigma * x


def flow_noised(x: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy samples (1 - t) x + t noise, their timesteps, and noise - x (Liu et al. 2022)."""
    t = strata(rng, len(x)).float()
    noise = normal(rng, x)
    part = t[:, None, None, None]
    return (1 - part) * x + part * noise, t * TIMESTEPS, noise - x


def loss(model: nn.Module, inputs: Sequence[Tensor], target: Tensor) -> Tensor:
    """Mean squared error of a model's answer."""
    with torch.autocast(DEVICE, torch.bfloat16):
        answer = model(*inputs)
    return F.mse_loss(answer.float(), target)


def arguments(doc: str | None, **steps: int) -> argparse.Namespace:
    """`-o`, `--data`, and an option for the number of steps of each training."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="DIR", help="Fashion-MNIST's four files")
    for name, count in steps.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=count)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    return args


def finish(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    output: str,
    path: Path,
    **card: Any,
) -> None:
    """`path`, an ONNX file of the model, and its card beside it."""
    export_onnx(model.cpu(), inputs, [output], path)
    name = path.stem
    card = {"name": name, "data": DATA, "licence": "MIT", "parameters": parameters(model)} | card
    write_card(path.with_name(f"{name}.json"), card)


def train_by_label(
    model: nn.Module,
    noised: Callable[[Tensor, np.random.Generator], tuple[Tensor, Tensor, Tensor]],
    path: Path,
    args: argparse.Namespace,
    *,
    output: str,
    batch: int,
    rate: float,
    timestep: torch.dtype = torch.int64,
) -> None:
    """Train a denoiser told the label on what `noised` makes of pictures, and write it to `path`.

    `output` names what it predicts, `timestep` is the type in which it takes times.
    """
    pictures = Pictures(args.data)

    def loss_of(rng: np.random.Generator) -> Tensor:
        x, label = pictures.batch(rng, batch)
        label = dropped(label, NOTHING, rng)
        noisy, times, target = noised(x, rng)
        return loss(model, (noisy, times, label), target)

    checkpoint = args.output / "checkpoint.pt"
    curve, weights = train(model, loss_of, steps=args.steps, rate=rate, checkpoint=checkpoint)
    model.load_state_dict(weights)
    inputs = {
        "sample": torch.zeros(2, 1, 28, 28),
        "timestep": torch.zeros(2, dtype=timestep),
        "label": torch.zeros(2, dtype=torch.int64),
    }
    finish(model, inputs, output, path, steps=args.steps, batch=batch, loss_curve=curve)
