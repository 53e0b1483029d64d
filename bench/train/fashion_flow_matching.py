"""Train the zoo's fashion-fm: `python bench/train/fashion_flow_matching.py -o DIR`

The UNet of fashion_ddpm.py as a velocity on straight lines between noise and pictures: flow
matching (Lipman et al. 2022), rectified flow (Liu et al. 2022). A tenth of the labels are dropped,
for guidance.
"""

from __future__ import annotations

import torch
from fashion_diffusion import (
    UNet,
    arguments,
    flow_noised,
    label_embedding,
    train_by_label,
)
from shared import DEVICE

BATCH, RATE = 64, 1e-3


def main() -> None:
    """Train, export."""
    args = arguments(__doc__, steps=2100)
    train_by_label(
        UNet(label_embedding(), fold=2).to(DEVICE),
        flow_noised,
        args.output / "fashion-fm.onnx",
        args,
        output="velocity",
        batch=BATCH,
        rate=RATE,
        timestep=torch.float32,
    )


if __name__ == "__main__":
    main()
