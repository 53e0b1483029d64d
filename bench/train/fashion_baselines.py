"""Bits per dimension of Fashion-MNIST's test set without a trained model: what any must beat.

    python bench/train/fashion_baselines.py

`one level` codes a pixel by how often each level occurs in the training set at all, `by pixel` by
how often at that place; `gaussian` is a full covariance of dequantized logits, `png` and `xz` are
what those formats take. Means over pictures and their standard errors; JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
from pathlib import Path

import numpy as np
import torch
from fashion_flows import PIXELS, bits_per_dimension
from flow_export import mean_and_error
from flow_layers import Logit
from PIL import Image
from shared import fashion
from torch import Tensor, nn


class Gaussian(nn.Module):
    """One Gaussian of logits: the flow of a single matrix."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.logit = Logit()
        logits = self.logit(x)[0].flatten(1)
        self.mean, covariance = logits.mean(0), torch.cov(logits.T)
        self.factor = torch.linalg.cholesky(covariance + 1e-6 * torch.eye(PIXELS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, log_det = self.logit(x)
        apart = (logits.flatten(1) - self.mean).T
        z = torch.linalg.solve_triangular(self.factor, apart, upper=False).T
        return z, log_det - self.factor.diagonal().log().sum()


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="Fashion-MNIST's four files")
    args = parser.parse_args()
    train, test = (fashion(part, args.data)[0].reshape(-1, PIXELS) for part in ("train", "t10k"))

    levels = np.log2(len(train) * PIXELS) - np.log2(np.bincount(train.ravel(), minlength=256))
    counts = np.ones((PIXELS, 256))  # one more of each, so that none is impossible
    np.add.at(counts, (np.arange(PIXELS), train), 1)
    by_pixel = np.log2(counts.sum(1, keepdims=True)) - np.log2(counts)

    rng = np.random.default_rng(1)
    dequantized = [
        torch.from_numpy((x + rng.random(x.shape, np.float32)) / 256) for x in (train, test)
    ]
    sizes = []
    for image in test.reshape(-1, 28, 28):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG", optimize=True)
        sizes.append(8 * len(buffer.getvalue()) / PIXELS)
    found = {
        "one level": levels[test].mean(1),
        "by pixel": by_pixel[np.arange(PIXELS), test].mean(1),
        "gaussian": bits_per_dimension(Gaussian(dequantized[0]), dequantized[1]).numpy(),
        "png": np.array(sizes),
    }
    told = {name: mean_and_error(torch.from_numpy(bits)) for name, bits in found.items()}
    told["xz"] = {"mean": round(8 * len(lzma.compress(test.tobytes(), preset=9)) / test.size, 5)}
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
