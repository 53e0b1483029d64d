"""Train the judge of the Fashion-MNIST models: `python bench/train/fashion_judge.py -o DIR`

A small classifier of pictures [n, 1, 28, 28] in -1..1, written as judge.onnx with two outputs:
`logits` [n, 10] for the accuracy of conditional samples, `features` [n, 64] for a Fréchet distance
(`bench/pictures.py`, `leangen eval --features`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from shared import DEVICE, batches, export_onnx, fashion, parameters, train, write_card
from torch import Tensor, nn
from torch.nn import functional as F

BATCH, RATE = 128, 2e-3


class Judge(nn.Module):
    """Three strided convolutions, a dense layer of 64 features, a head."""

    def __init__(self) -> None:
        super().__init__()
        widths = (1, 24, 48, 96)
        self.body = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(inner, outer, 3, stride=2, padding=1),
                    nn.GroupNorm(8, outer),
                    nn.SiLU(),
                    nn.Conv2d(outer, outer, 3, padding=1),
                    nn.SiLU(),
                )
                for inner, outer in zip(widths, widths[1:], strict=False)
            )
        )
        self.features = nn.Linear(96 * 16, 64)
        self.head = nn.Linear(64, 10)

    def forward(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        features = F.silu(self.features(self.body(sample).flatten(1)))
        return self.head(F.dropout(features, 0.2, self.training)), features


@torch.no_grad()
def accuracy(model: Judge, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of pictures that get their own label."""
    right = 0
    for part in batches(len(images), 1000):
        pixels = torch.from_numpy(images[part].astype(np.float32) / 127.5 - 1)[:, None]
        answer = model(pixels.to(DEVICE))[0].argmax(1).cpu().numpy()
        right += int((answer == labels[part]).sum())
    return right / len(images)


def main() -> None:
    """Train, test, export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="DIR", help="Fashion-MNIST's four files")
    parser.add_argument("--steps", type=int, default=2400)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    images, labels = fashion("train", args.data)
    pixels = torch.from_numpy(images.astype(np.float32) / 127.5 - 1)[:, None]
    torch.manual_seed(0)
    model = Judge().to(DEVICE)

    def loss_of(rng: np.random.Generator) -> Tensor:
        rows = rng.integers(0, len(pixels), BATCH)
        x = pixels[rows].to(DEVICE)
        flipped = torch.from_numpy(rng.random(BATCH) < 0.5).to(DEVICE)
        x = torch.where(flipped[:, None, None, None], x.flip(-1), x)
        label = torch.from_numpy(labels[rows]).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = model(x)[0]
        return F.cross_entropy(logits.float(), label)

    curve, weights = train(
        model, loss_of, steps=args.steps, rate=RATE, checkpoint=args.output / "checkpoint.pt"
    )
    model.load_state_dict(weights)
    model.eval()
    export_onnx(
        model,
        {"sample": torch.zeros(2, 1, 28, 28, device=DEVICE)},
        ["logits", "features"],
        args.output / "judge.onnx",
    )
    card = {
        "parameters": parameters(model),
        "steps": args.steps,
        "test_accuracy": accuracy(model, *fashion("t10k", args.data)),
        "loss_curve": curve,
    }
    write_card(args.output / "card.json", card)


if __name__ == "__main__":
    main()
