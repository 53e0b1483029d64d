"""Train the zoo's fashion-dit: `python bench/train/fashion_dit.py -o DIR`

A diffusion transformer (Peebles and Xie 2023) over 49 squares of 4 x 4 pixels: timestep and label
scale, shift and gate each layer (adaLN-Zero). It predicts v on the cosine schedule; a tenth of the
labels are dropped, for guidance.
"""

from __future__ import annotations

import math

import torch
from fashion_diffusion import (
    EMBEDDING,
    Clock,
    arguments,
    label_embedding,
    train_by_label,
    v_noised,
)
from shared import DEVICE
from torch import Tensor, nn
from torch.nn import functional as F

BATCH, RATE = 64, 1e-3
PATCH, SIDE, WIDTH, LAYERS, HEADS = 4, 7, 128, 6, 4


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens [b, n, d], normalized, scaled and shifted."""
    return F.layer_norm(x, (WIDTH,)) * (1 + scale[:, None]) + shift[:, None]


class Layer(nn.Module):
    """Attention and a dense network, each between modulation and a gate that begins shut."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(EMBEDDING, 6 * WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dense = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(embedding).chunk(6, 1)
        x = x + gate1[:, None] * self.attention(modulated(x, shift1, scale1))
        return x + gate2[:, None] * self.dense(modulated(x, shift2, scale2))

    def attention(self, x: Tensor) -> Tensor:
        """Every token looks at every other."""
        n, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(WIDTH // HEADS), -1)
        return self.out((weights @ v).transpose(1, 2).reshape(n, tokens, WIDTH))


class DiT(nn.Module):
    """Images [b, 1, 28, 28] in -1..1, timesteps [b] and labels [b] to v [b, 1, 28, 28]."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.label = Clock(), label_embedding()
        self.stem = nn.Conv2d(1, WIDTH, PATCH, stride=PATCH)
        self.place = nn.Parameter(0.02 * torch.randn(1, SIDE**2, WIDTH))
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.modulation = nn.Linear(EMBEDDING, 2 * WIDTH)
        self.head = nn.Linear(WIDTH, PATCH**2)
        for part in (self.modulation, self.head):
            nn.init.zeros_(part.weight)
            nn.init.zeros_(part.bias)

    def forward(self, sample: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
        embedding = F.silu(self.time(timestep) + self.label(label))
        x = self.stem(sample).flatten(2).transpose(1, 2) + self.place
        for layer in self.layers:
            x = layer(x, embedding)
        x = self.head(modulated(x, *self.modulation(embedding).chunk(2, 1)))
        return F.pixel_shuffle(x.transpose(1, 2).reshape(-1, PATCH**2, SIDE, SIDE), PATCH)


def main() -> None:
    """Train, export."""
    args = arguments(__doc__, steps=5000)
    train_by_label(
        DiT().to(DEVICE),
        v_noised,
        args.output / "fashion-dit.onnx",
        args,
        output="v",
        batch=BATCH,
        rate=RATE,
    )


if __name__ == "__main__":
    main()
