"""Bits per dimension of pixel models, and of the simple baseline beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

JUDGED = 500  # of the test set, the first so many
Array = np.ndarray[Any, Any]


@torch.no_grad()
def bits_a_pixel(
    logits_of: Callable[[Tensor, Tensor], Tensor], pixels: Array, labels: Array, levels: int
) -> dict[str, float]:
    """Mean negative log2-likelihood of a test picture's pixel given its label, and twice its s.e.

    `logits_of` takes pixels [n, p] and labels [n]. Without the label it would be at most
    log2(10) / p more: the model's mixture over ten equally frequent labels.
    """
    found = []
    for start in range(0, JUDGED, 50):
        x = torch.from_numpy(pixels[start : start + 50])
        logits = logits_of(x, torch.from_numpy(labels[start : start + 50])).reshape(-1, levels)
        loss = F.cross_entropy(logits, x.flatten(), reduction="none")
        found.append(loss.reshape(len(x), -1).mean(1).numpy() / np.log(2))
    bits = np.concatenate(found)
    return {
        "mean": round(float(bits.mean()), 4),
        "u": round(float(2 * bits.std(ddof=1) / np.sqrt(len(bits))), 4),
        "unlabelled_at_most": round(float(bits.mean() + np.log2(10) / pixels.shape[1]), 4),
    }


def histogram_bits(train: Array, test: Array, levels: int) -> float:
    """The baseline: each place has the training set's histogram of levels (plus one of each)."""
    counts = np.ones((train.shape[1], levels))
    for place in range(train.shape[1]):
        counts[place] += np.bincount(train[:, place], minlength=levels)
    bits = -np.log2(counts / counts.sum(axis=1, keepdims=True))
    return round(float(np.take_along_axis(bits.T, test[:JUDGED], axis=0).mean()), 4)
