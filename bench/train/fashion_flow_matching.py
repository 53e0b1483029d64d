"""Train the zoo's fashion-fm: `python bench/train/fashion_flow_matching.py -o DIR`

The UNet of fashion_ddpm.py as a velocity on straight lines between noise and pictures: flow
matching (Lipman et al. 2022), rectified flow (Liu et al. 2022). A tenth of the labels are dropped,
for guidance.
"""

from __future__ import annotations

import numpy as np
import torch
from fashion_diffusion import (
    NOTHING,
    Pictures,
    UNet,
    arguments,
    dropped,
    finish,
    flow_noised,
    label_embedding,
    loss,
)
from shared import DEVICE, train
from torch import Tensor

BATCH, RATE = 64, 1e-3


def main() -> None:
    """Train, export."""
    args = arguments(__doc__, steps=2100)
    pictures = Pictures(args.data)
    model = UNet(label_embedding(), fold=2).to(DEVICE)

    def loss_of(rng: np.random.Generator) -> Tensor:
        x, label = pictures.batch(rng, BATCH)
        label = dropped(label, NOTHING, rng)
        noisy, timestep, velocity = flow_noised(x, rng)
        return loss(model, (noisy, timestep, label), velocity)

    curve, weights = train(
        model, loss_of, steps=args.steps, rate=RATE, checkpoint=args.output / "checkpoint.pt"
    )
    model.load_state_dict(weights)
    inputs = {
        "sample": torch.zeros(2, 1, 28, 28),
        "timestep": torch.zeros(2),
        "label": torch.zeros(2, dtype=torch.int64),
    }
    path = args.output / "fashion-fm.onnx"
    finish(model, inputs, "velocity", path, steps=args.steps, batch=BATCH, loss_curve=curve)


if __name__ == "__main__":
    main()
