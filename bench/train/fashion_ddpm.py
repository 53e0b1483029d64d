"""Train the catalog's fashion-ddpm: `python bench/train/fashion_ddpm.py -o DIR`

A UNet that denoises Fashion-MNIST by class (Ho et al. 2020), with v prediction (Salimans and Ho
2022) on the cosine schedule (Nichol and Dhariwal 2021), and classifier-free guidance (Ho and
Salimans 2022): a tenth of the labels are dropped.
"""

from __future__ import annotations

from fashion_diffusion import (
    UNet,
    arguments,
    label_embedding,
    train_by_label,
    v_noised,
)
from shared import DEVICE

BATCH, RATE = 128, 1e-3


def main() -> None:
    """Train, export."""
    args = arguments(__doc__, steps=7500)
    train_by_label(
        UNet(label_embedding(), fold=2).to(DEVICE),
        v_noised,
        args.output / "fashion-ddpm.onnx",
        args,
        output="v",
        batch=BATCH,
        rate=RATE,
    )


if __name__ == "__main__":
    main()
