"""Train the catalog's fashion-ddpm: `python bench/train/fashion_ddpm.py -o DIR`

A UNet that denoises Fashion-MNIST by class (Ho et al. 2020), with v prediction (Salimans and Ho
2022) on the cosine schedule (Nichol and Dhariwal 2021), and classifier-free guidance (Ho and
Salimans 2022): a tenth of the labels are dropped.
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
    label_embedding,
    loss,
    v_noised,
)
from shared import DEVICE, train
from torch import Tensor

BATCH, RATE = 128, 1e-3


def main() -> None:
    """Train, export."""
    args = arguments(__doc__, steps=7500)
    pictures = Pictures(args.data)
    model = UNet(label_embedding(), fold=2).to(DEVICE)

    def loss_of(rng: np.random.Generator) -> Tensor:
        x, label = pictures.batch(rng, BATCH)
        label = dropped(label, NOTHING, rng)
        noisy, timestep, v = v_noised(x, rng)
        return loss(model, (noisy, timestep, label), v)

    curve, weights = train(
        model, loss_of, steps=args.steps, rate=RATE, checkpoint=args.output / "checkpoint.pt"
    )
    model.load_state_dict(weights)
    inputs = {
        "sample": torch.zeros(2, 1, 28, 28),
        "timestep": torch.zeros(2, dtype=torch.int64),
        "label": torch.zeros(2, dtype=torch.int64),
    }
    path = args.output / "fashion-ddpm.onnx"
    finish(model, inputs, "v", path, steps=args.steps, batch=BATCH, loss_curve=curve)


if __name__ == "__main__":
    main()
