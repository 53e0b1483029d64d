"""Train the zoo's fashion-14 and fashion-upscaler: `python bench/train/fashion_cascade.py -o DIR`

A cascade (Ho et al. 2022): a denoiser of 14 x 14 pixels by class, and one of 28 x 28 that is shown
the small picture, enlarged, and with noise that makes up for what the first does otherwise than
real small pictures. Both predict v on the cosine schedule.
"""

from __future__ import annotations

import numpy as np
import torch
from fashion_diffusion import (
    NOTHING,
    SCHEDULE,
    Clock,
    Pictures,
    UNet,
    arguments,
    dropped,
    finish,
    label_embedding,
    loss,
    normal,
    v_noised,
)
from shared import DEVICE, train
from torch import Tensor, nn
from torch.nn import functional as F

from leangen.samplers import schedules

BATCH, RATE = 64, 1e-3
MOST_NOISE = 300
"""Timestep of the most noise that the small picture is given."""


class Upscaler(nn.Module):
    """A UNet that sees the small picture, noisy at the timestep `augmentation`, as a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNet(Clock(), fold=2, beside=1)

    def forward(
        self, sample: Tensor, timestep: Tensor, small: Tensor, augmentation: Tensor
    ) -> Tensor:
        return self.unet(torch.cat([sample, small], 1), timestep, augmentation)


def small_of(x: Tensor) -> Tensor:
    """Pictures at half the size."""
    return F.avg_pool2d(x, 2)


def main() -> None:
    """Train both, export both."""
    args = arguments(__doc__, small_steps=3300, upscaler_steps=3000)
    pictures = Pictures(args.data)
    small = UNet(label_embedding(), fold=1, wide=32, deep=64).to(DEVICE)

    def small_loss(rng: np.random.Generator) -> Tensor:
        x, label = pictures.batch(rng, BATCH)
        label = dropped(label, NOTHING, rng)
        noisy, timestep, v = v_noised(small_of(x), rng)
        return loss(small, (noisy, timestep, label), v)

    curve, weights = train(
        small,
        small_loss,
        steps=args.small_steps,
        rate=RATE,
        checkpoint=args.output / "small.pt",
    )
    small.load_state_dict(weights)
    numbers = torch.zeros(2, dtype=torch.int64)
    inputs = {"sample": torch.zeros(2, 1, 14, 14), "timestep": numbers, "label": numbers.clone()}
    path = args.output / "fashion-14.onnx"
    finish(small, inputs, "v", path, steps=args.small_steps, batch=BATCH, loss_curve=curve)

    upscaler = Upscaler().to(DEVICE)
    levels = torch.tensor(schedules.trained(SCHEDULE), device=DEVICE, dtype=torch.float32)

    def upscaler_loss(rng: np.random.Generator) -> Tensor:
        x, _ = pictures.batch(rng, BATCH)
        shown = F.interpolate(small_of(x), size=28, mode="bilinear", align_corners=True)
        augmentation = torch.from_numpy(rng.integers(0, MOST_NOISE + 1, BATCH)).to(DEVICE)
        alpha, sigma = (part[:, None, None, None] for part in levels[augmentation].unbind(1))
        shown = alpha * shown + sigma * normal(rng, shown)
        noisy, timestep, v = v_noised(x, rng)
        return loss(upscaler, (noisy, timestep, shown, augmentation), v)

    curve, weights = train(
        upscaler,
        upscaler_loss,
        steps=args.upscaler_steps,
        rate=RATE,
        checkpoint=args.output / "upscaler.pt",
    )
    upscaler.load_state_dict(weights)
    picture = torch.zeros(2, 1, 28, 28)
    inputs = {"sample": picture, "timestep": numbers}
    inputs |= {"small": picture.clone(), "augmentation": numbers.clone()}
    path = args.output / "fashion-upscaler.onnx"
    finish(upscaler, inputs, "v", path, steps=args.upscaler_steps, batch=BATCH, loss_curve=curve)


if __name__ == "__main__":
    main()
