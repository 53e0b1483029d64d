"""Train the catalog's fashion-pixelcnn: `python bench/train/fashion_pixelcnn.py -o DIR`

A gated PixelCNN (van den Oord et al. 2016) by label over all 256 greys of Fashion-MNIST at 28 x 28,
dilated as a WaveNet is, whose answer is a mixture of discretized logistics (Salimans et al. 2017).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from pixels import bits_a_pixel, histogram_bits
from shared import DEVICE, export_onnx, fashion, parameters, train, write_card
from torch import Tensor, nn
from torch.nn import functional as F

SIDE, LEVELS, BATCH, RATE = 28, 256, 32, 2e-3
WIDTH, DILATIONS, MIXTURE = 32, (1, 2, 4, 1, 2), 5
HALF = 1 / (LEVELS - 1)  # of a level, in values from -1 to 1
RESERVE = 1e-3
"""The share of probability that all levels have alike: nothing is impossible."""


class Gated(nn.Module):
    """A layer of both stacks: what is above, a row at a time, and what is left of a pixel.

    The upper stack looks at a row and at one `dilation` above it, which the state holds; the left
    one at a pixel, at one `dilation` left of it and at the upper stack's row.
    """

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.above = nn.Conv2d(WIDTH, 2 * WIDTH, (2, 3), dilation=dilation)
        self.left = nn.Conv2d(WIDTH, 2 * WIDTH, (1, 2), dilation=dilation)
        self.across = nn.Conv2d(2 * WIDTH, 2 * WIDTH, 1)
        self.out_above, self.out = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.label = nn.Embedding(10, 4 * WIDTH)

    def forward(
        self, above: Tensor, left: Tensor, state: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        shift = self.label(label)[:, :, None, None]
        seen = torch.cat([state, above], 2)
        upper = self.above(F.pad(seen, (self.dilation, self.dilation)))
        both = self.left(F.pad(left, (self.dilation, 0))) + self.across(upper)
        above = above + self.out_above(gate(upper + shift[:, : 2 * WIDTH]))
        left = left + self.out(gate(both + shift[:, 2 * WIDTH :]))
        return above, left, seen[:, :, -self.dilation :]


def gate(x: Tensor) -> Tensor:
    """Half of the channels, let through by the other half."""
    shaped, let = x.chunk(2, 1)
    return torch.tanh(shaped) * torch.sigmoid(let)


class PixelCNN(nn.Module):
    """Rows of a picture to log-probabilities of the levels at each place, and the next states.

    `rows` int64 [n, r, 28] follow those that the states remember; a place's answer depends on the
    rows above and on what is left of it, so a row may be given unfinished. `state_0` [n, 1, 2, 28]
    are the last two rows, `state_i` [n, 32, dilation, 28] what layer i remembers of the rows above.
    """

    def __init__(self) -> None:
        super().__init__()
        self.above = nn.Conv2d(1, WIDTH, (2, 5))
        self.left = nn.Conv2d(1, WIDTH, (1, 3))
        self.layers = nn.ModuleList(Gated(dilation) for dilation in DILATIONS)
        self.head = nn.Sequential(
            nn.ReLU(), nn.Conv2d(WIDTH, 64, 1), nn.ReLU(), nn.Conv2d(64, 3 * MIXTURE, 1)
        )
        with torch.no_grad():  # logistics over the whole range, each about its share of it
            self.head[-1].weight.mul_(0.1)
            even, means = torch.zeros(MIXTURE), torch.linspace(-1, 1, MIXTURE)
            self.head[-1].bias.copy_(torch.cat([even, means, even - 2]))

    def mixture(
        self, rows: Tensor, label: Tensor, states: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, Tensor, Tensor], list[Tensor]]:
        """Shares that sum to 1, means and log-scales, [n, 5, r, 28] each, and the next states."""
        seen = torch.cat([states[0], scaled(rows)], 2)
        above = self.above(F.pad(seen[:, :, :-1], (2, 2)))
        left = self.left(F.pad(scaled(rows)[..., :-1], (3, 0)))
        kept = [seen[:, :, -2:]]
        for layer, state in zip(self.layers, states[1:], strict=True):
            above, left, state = layer(above, left, state, label)
            kept.append(state)
        shares, means, scales = self.head(left).float().chunk(3, 1)
        return (shares.softmax(1), means, scales.clamp(min=-7)), kept

    def forward(self, rows: Tensor, label: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        (shares, means, scales), kept = self.mixture(rows, label, states)
        edges = torch.arange(1, LEVELS, device=rows.device) * 2 * HALF - 1 - HALF
        below = torch.sigmoid((edges - means[..., None]) * torch.exp(-scales)[..., None])
        below = (shares[..., None] * below).sum(1)
        none = torch.zeros_like(below[..., :1])
        chances = torch.cat([below, none + 1], -1) - torch.cat([none, below], -1)
        return (log_chance(chances), *kept)

    def loss(self, rows: Tensor, label: Tensor) -> Tensor:
        """Mean nats a pixel of whole pictures: of the mixture the level's own share alone."""
        (shares, means, scales), _ = self.mixture(rows, label, blank(len(rows), rows.device))
        x, inverse = scaled(rows), torch.exp(-scales)
        upper = torch.sigmoid((x + HALF - means) * inverse).where(x < 1, 1.0)
        lower = torch.sigmoid((x - HALF - means) * inverse).where(x > -1, 0.0)
        return -log_chance((shares * (upper - lower)).sum(1)).mean()


def scaled(rows: Tensor) -> Tensor:
    """Levels [n, r, 28] as values in -1..1, [n, 1, r, 28]."""
    return rows[:, None].float() * 2 * HALF - 1


def log_chance(chances: Tensor) -> Tensor:
    """Logarithms, after all levels got their reserve."""
    return torch.log(torch.relu(chances) * (1 - RESERVE) + RESERVE / LEVELS)


def blank(count: int, device: torch.device | str) -> list[Tensor]:
    """The states above the first row: nothing, which is not black."""
    sizes = [(1, 2), *((WIDTH, dilation) for dilation in DILATIONS)]
    return [torch.zeros(count, *size, SIDE, device=device) for size in sizes]


def main() -> None:
    """Train, export, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="DIR", help="Fashion-MNIST's four files")
    parser.add_argument("--steps", type=int, default=900)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    images, labels = fashion("train", args.data)
    pixels, labels = torch.from_numpy(images.astype(np.int64)), torch.from_numpy(labels)
    torch.manual_seed(0)
    model = PixelCNN().to(DEVICE)

    def loss_of(rng: np.random.Generator) -> Tensor:
        rows = torch.from_numpy(rng.integers(0, len(pixels), BATCH))
        with torch.autocast(DEVICE, torch.bfloat16):
            return model.loss(pixels[rows].to(DEVICE), labels[rows].to(DEVICE))

    checkpoint = args.output / "checkpoint.pt"
    curve, weights = train(
        model, loss_of, steps=args.steps, rate=RATE, checkpoint=checkpoint, average=0.99
    )
    model.load_state_dict(weights)
    model.cpu()
    states = {f"state_{i}": state for i, state in enumerate(blank(2, "cpu"))}
    inputs = {"rows": torch.zeros(2, 1, SIDE, dtype=torch.int64)}
    inputs |= {"label": torch.zeros(2, dtype=torch.int64)} | states
    outputs = ["logits", *(f"next_{name}" for name in states)]
    path = args.output / "fashion-pixelcnn.onnx"
    export_onnx(model, inputs, outputs, path, also_open={"rows": "r", "logits": "r"})
    test, said = fashion("t10k", args.data)
    test = test.reshape(len(test), -1).astype(np.int64)

    def logits_of(x: Tensor, label: Tensor) -> Tensor:
        return model(x.reshape(-1, SIDE, SIDE), label, *blank(len(x), "cpu"))[0]

    bits = bits_a_pixel(logits_of, test, said, LEVELS)
    flat = images.reshape(len(images), -1).astype(np.int64)
    card = {
        "name": "fashion-pixelcnn",
        "parameters": parameters(model),
        "steps": args.steps,
        "batch": BATCH,
        "bits_per_dimension": bits,
        "histogram_bits_per_dimension": histogram_bits(flat, test, LEVELS),
        "loss_curve": curve,
    }
    write_card(args.output / "card.json", card)


if __name__ == "__main__":
    main()
