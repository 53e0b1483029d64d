"""Train the catalog's image flows: `python bench/train/fashion_flows.py --kind glow -o DIR`

Densities of Fashion-MNIST, dequantized with uniform noise: RealNVP (Dinh et al. 2017), Glow (Kingma
and Dhariwal 2018), a neural spline flow (Durkan et al. 2019) and a masked autoregressive flow
(Papamakarios et al. 2017), each of about a million weights or less.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from flow_export import export, frozen, mean_and_error
from flow_layers import (
    FORMS,
    ActNorm,
    Chain,
    Convolutions,
    Coupling,
    Dense,
    Logit,
    Mix,
    MultiScale,
    Select,
)
from shared import DEVICE, batches, fashion, parameters, train, write_card
from torch import Tensor, nn

RATE = 1e-3
PIXELS = 28 * 28
STEPS = {"realnvp": 4100, "glow": 3100, "nsf": 3000, "maf": 9000}
BATCHES = {"realnvp": 64, "glow": 64, "nsf": 32, "maf": 64}


class Masked(nn.Module):
    """Two masked autoregressive layers, along the rows of pixels and back, scales bounded."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        from zuko.flows.autoregressive import MaskedAutoregressiveTransform
        from zuko.transforms import MonotonicAffineTransform

        self.logit, self.scale = Logit(), ActNorm(PIXELS)
        forwards = torch.arange(PIXELS)
        self.layers = nn.ModuleList(
            MaskedAutoregressiveTransform(
                PIXELS,
                order=order,
                univariate=partial(MonotonicAffineTransform, slope=0.05),
                hidden_features=(hidden,),
            )
            for order in (forwards, forwards.flip(0))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, total = self.logit(x.flatten(1))
        x, scaled = self.scale(x)
        total = total + scaled
        for layer in self.layers:
            x, log_det = layer(None).call_and_ladj(x)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            z = layer(None).inv(z)
        made: Tensor = self.logit.inverse(self.scale.inverse(z)).unflatten(1, (1, 28, 28))
        return made

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Set the scale of each pixel by a batch."""
        self.scale.start(self.logit(x.flatten(1))[0])


def coupling_flow(
    form: str, mixed: bool, wide: int, deep: int, levels: tuple[int, ...]
) -> nn.Module:
    """Couplings at 14 x 14 and at 7 x 7, those of the end with dense conditioners."""
    each = FORMS[form][1]

    def step(channels: int, number: int, net: nn.Module, form: str) -> list[nn.Module]:
        if mixed:
            mixing: nn.Module = Mix(channels)
        elif channels == 4:  # a checkerboard of pixels and its opposite, then rows and theirs
            mixing = Select(*((0, 3, 1, 2), (2, 3, 0, 1), (2, 1, 0, 3), (2, 3, 0, 1))[number % 4])
        else:
            half = channels // 2
            turn = (half + torch.arange(half)).tolist()
            even = list(range(0, half, 2)) + list(range(1, half, 2))
            mixing = Select(*turn, *even)
        return [ActNorm(channels, 1, 1), mixing, Coupling(channels, net, form)]

    first, second = [], []
    for number in range(levels[0]):
        first += step(4, number, Convolutions(2, wide, 2 * each, 1), form)
    for number in range(levels[1]):
        second += step(8, number, Convolutions(4, deep, 4 * each, 3), form)
    for number in range(levels[2]):
        second += step(8, number, Dense(4, 256, 8, 7), "affine")
    leave = Coupling(4, Convolutions(2, wide, 4, 1))
    return MultiScale(Chain(first), leave, Chain([*second, ActNorm(8, 7, 7)]))


def make(kind: str) -> nn.Module:
    """The flow of a kind, untrained."""
    if kind == "maf":
        return Masked(256)
    if kind == "nsf":
        return coupling_flow("spline", True, 32, 48, (3, 3, 4))
    return coupling_flow(
        "affine", kind == "glow", 32, 48, (6, 5, 4) if kind == "glow" else (5, 3, 4)
    )


def bits_per_dimension(model: nn.Module, x: Tensor) -> Tensor:
    """Of each picture of dequantized values in 0..1, [n]."""
    z, log_det = model(x)
    normal = -0.5 * (z * z).sum(1) - 0.5 * PIXELS * math.log(2 * math.pi)
    made: Tensor = 8 - (normal + log_det) / (PIXELS * math.log(2))
    return made


def main() -> None:
    """Train, judge, export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=sorted(STEPS), required=True)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="DIR", help="Fashion-MNIST's four files")
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    steps = args.steps or STEPS[args.kind]
    pixels = torch.from_numpy(fashion("train", args.data)[0].astype(np.float32))[:, None]
    torch.manual_seed(0)
    model = make(args.kind).to(DEVICE, memory_format=torch.channels_last)

    def dequantized(rows: Tensor, rng: np.random.Generator) -> Tensor:
        x = rows + torch.from_numpy(rng.random(rows.shape, np.float32))
        return (x / 256).to(DEVICE)

    def loss_of(rng: np.random.Generator) -> Tensor:
        rows = torch.from_numpy(rng.integers(0, len(pixels), BATCHES[args.kind]))
        return bits_per_dimension(model, dequantized(pixels[rows], rng)).mean()

    model.start(dequantized(pixels[:512], np.random.default_rng(0)))
    curve, weights = train(
        model, loss_of, steps=steps, rate=RATE, checkpoint=args.output / "checkpoint.pt"
    )
    model.load_state_dict(weights)
    frozen(model)
    rng = np.random.default_rng(1)

    def judged(rows: Tensor) -> dict[str, float]:
        with torch.no_grad():
            parts = [
                bits_per_dimension(model, dequantized(rows[part], rng))
                for part in batches(len(rows), 500)
            ]
        return mean_and_error(torch.cat(parts).cpu())

    test = torch.from_numpy(fashion("t10k", args.data)[0].astype(np.float32))[:, None]
    bits = {"test": judged(test), "first_2000_of_training": judged(pixels[:2000])}
    name = f"fashion-{args.kind}"
    options = {"range": (0.0, 1.0), "levels": 256}
    packed = export(model, dequantized(pixels[:2], rng), args.output, name, options)
    card = {
        "name": name,
        "data": "Fashion-MNIST (Xiao et al. 2017), MIT: 60,000 pictures, dequantized; "
        "judged on the 10,000 of its test set",
        "licence": "MIT",
        "parameters": parameters(model),
        "steps": steps,
        "batch": BATCHES[args.kind],
        "bits_per_dimension": bits,
        **packed,
        "loss_curve": curve,
    }
    write_card(args.output / "card.json", card)


if __name__ == "__main__":
    main()
