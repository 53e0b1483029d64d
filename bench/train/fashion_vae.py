"""Train the one-shot image model: `python bench/train/fashion_vae.py -o DIR`

A conditional variational autoencoder (Kingma and Welling 2014; Sohn et al. 2015) on Fashion-MNIST;
what is kept is its decoder: a latent of 16 numbers and a label to a picture, in one step.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from shared import DEVICE, export_onnx, fashion, parameters, train, write_card
from torch import Tensor, nn
from torch.nn import functional as F

BATCH, RATE, LATENT, STEPS = 128, 1e-3, 16, 4000


class Decoder(nn.Module):
    """Latents [b, 16] and labels [b] to pictures [b, 1, 28, 28] in -1..1."""

    def __init__(self) -> None:
        super().__init__()
        self.label = nn.Embedding(10, 16)
        self.dense = nn.Linear(LATENT + 16, 64 * 49)
        self.body = nn.Sequential(
            nn.SiLU(),
            nn.Upsample(scale_factor=2.0),
            nn.Conv2d(64, 48, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(48, 48, 3, padding=1),
            nn.SiLU(),
            nn.Upsample(scale_factor=2.0),
            nn.Conv2d(48, 24, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(24, 1, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, latent: Tensor, label: Tensor) -> Tensor:
        h = self.dense(torch.cat([latent, self.label(label)], 1))
        return self.body(h.unflatten(1, (64, 7, 7)))


class Encoder(nn.Module):
    """Pictures and labels to the mean and log variance of their latents, [b, 16] each."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
        )
        self.label = nn.Embedding(10, 16)
        self.head = nn.Sequential(
            nn.Linear(48 * 49 + 16, 128), nn.SiLU(), nn.Linear(128, 2 * LATENT)
        )

    def forward(self, sample: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.cat([self.body(sample), self.label(label)], 1)
        mean, log_variance = self.head(h).chunk(2, 1)
        return mean, log_variance.clamp(-10, 10)


def main() -> None:
    """Train, export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="DIR", help="Fashion-MNIST's four files")
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    images, labels = fashion("train", args.data)
    pixels = torch.from_numpy(images.astype(np.float32) / 127.5 - 1)[:, None]
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": Encoder(), "decoder": Decoder()}).to(DEVICE)

    def loss_of(rng: np.random.Generator) -> Tensor:
        rows = rng.integers(0, len(pixels), BATCH)
        x, label = pixels[rows].to(DEVICE), torch.from_numpy(labels[rows]).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            mean, log_variance = model["encoder"](x, label)
            mean, log_variance = mean.float(), log_variance.float()
            latent = mean + torch.randn_like(mean) * (log_variance / 2).exp()
            drawn = model["decoder"](latent, label)
        # Minus the evidence lower bound, in nats a picture, for pixels of a Laplace scale of 0.2:
        # absolute errors leave edges sharper than squared ones do.
        missed = F.l1_loss(drawn.float(), x, reduction="none").sum((1, 2, 3)) / 0.2
        divergence = (mean**2 + log_variance.exp() - 1 - log_variance).sum(1) / 2
        return (missed + divergence).mean()

    curve, weights = train(
        model, loss_of, steps=args.steps, rate=RATE, checkpoint=args.output / "checkpoint.pt"
    )
    model.load_state_dict(weights)
    decoder = model["decoder"].cpu()
    inputs = {"latent": torch.zeros(2, LATENT), "label": torch.zeros(2, dtype=torch.int64)}
    export_onnx(decoder, inputs, ["image"], args.output / "fashion-vae.onnx")
    card = {
        "name": "fashion-vae",
        "data": "Fashion-MNIST (Xiao et al. 2017), MIT: 60,000 pictures",
        "licence": "MIT",
        "parameters": parameters(decoder),
        "steps": args.steps,
        "batch": BATCH,
        "loss_curve": curve,
    }
    write_card(args.output / "card.json", card)


if __name__ == "__main__":
    main()
