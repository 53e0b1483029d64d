"""The later rounds of smiles_lm.py: whole molecules, and a reward for those that rdkit can read.

Beside the likelihood of real molecules, that of the model's own is raised where they are valid and
lowered where not (REINFORCE, Williams 1992), by how far each is from the share that is valid. Most
are valid and say little, so that a step learns from all that are not and as many that are, which
stand for the others too. Drawing costs less than learning: no gradients, and what has ended
leaves the batch. Blaming only the token that spoiled a molecule, found by bisection with ends drawn
anew, cost twice the time of a step and had not raised the share in 68 steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama import Llama
from rdkit import Chem, RDLogger
from shared import DEVICE
from smiles_shared import Tokens, batches, nats_of, train
from tokenizers import Tokenizer
from torch import Tensor

from leangen.console import say

DRAWN = 512  # molecules drawn at once
LONGEST = 60  # tokens: MOSES has at most 47


@dataclass(frozen=True, slots=True)
class Round:
    """How a round learns; its rate falls in a line to zero."""

    rate: float
    reward: float
    """Nats of a real molecule that one more valid molecule is worth."""
    uses: int
    """Steps that the molecules drawn at once last."""


ROUNDS = (Round(3e-4, 6.0, uses=4), Round(2e-4, 12.0, uses=2))


class Judged:
    """Molecules of the model's own, each with the weight of its negative log-likelihood."""

    def __init__(self, model: Llama, tokenizer: Tokenizer, uses: int) -> None:
        RDLogger.DisableLog("rdApp.*")
        self._model, self._tokenizer, self._uses = model, tokenizer, uses
        self._parts: list[tuple[list[list[int]], Tensor]] = []

    def take(self, step: int) -> tuple[list[list[int]], Tensor]:
        """Those of a step, of nearly one length; the weights are those of a mean over all drawn."""
        if not self._parts:
            self._draw(step)
        return self._parts.pop()

    def _draw(self, step: int) -> None:
        torch.manual_seed(step)
        rng = np.random.default_rng(step)
        rows = copy.deepcopy(self._model).bfloat16().draw(DRAWN, LONGEST)
        valid = np.array([self._is_valid(row) for row in rows])
        share = float(valid.mean())
        say(f"step {step}: {share:.1%} of {DRAWN} valid")
        good, bad = np.flatnonzero(valid), np.flatnonzero(~valid)
        some = rng.choice(good, min(len(good), max(len(bad), self._uses)), replace=False)
        weights = np.where(valid, (1 - share) * len(good) / max(len(some), 1), -share)
        taken = np.concatenate([some, bad])
        taken = taken[np.argsort([len(rows[i]) for i in taken], kind="stable")]
        parts = np.array_split(taken, self._uses)
        for part in (parts[i] for i in rng.permutation(self._uses)):
            each = torch.from_numpy(weights[part].astype(np.float32) * self._uses / DRAWN)
            self._parts.append(([rows[i] for i in part], each.to(DEVICE)))

    def _is_valid(self, row: Sequence[int]) -> bool:
        text = "".join(map(self._tokenizer.id_to_token, row))
        return bool(text) and Chem.MolFromSmiles(text) is not None


def finish(
    model: Llama,
    tokenizer: Tokenizer,
    rows: Sequence[Tokens],
    steps: Sequence[int],
    folder: Path,
) -> list[list[tuple[int, float]]]:
    """So many steps of each round, with AdamW; their loss curves."""
    lengths = np.array([len(row) for row in rows])
    curves = []
    for i, (each, count) in enumerate(zip(ROUNDS, steps, strict=True)):
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=each.rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        loss_at = rewarded(model, tokenizer, rows, lengths, each, sum(steps[:i]))
        file = folder / f"round-{i + 1}.pt"
        curves.append(train(model, optimizer, loss_at, lambda share: 1 - share, count, file))
    return curves


def rewarded(
    model: Llama,
    tokenizer: Tokenizer,
    rows: Sequence[Tokens],
    lengths: np.ndarray[Any, Any],
    this: Round,
    before: int,
) -> Callable[[int], Tensor]:
    """The loss of a step of a round: about one of a token, as its reward is divided like it."""
    tokens = float(lengths.mean()) + 1
    drawn: list[Iterator[Any]] = []
    judged = Judged(model, tokenizer, this.uses)

    def loss_at(step: int) -> Tensor:
        if not drawn:  # from where a run goes on
            drawn.append(batches(lengths, before + step))
        own, weights = judged.take(step)
        reward = (weights * nats_of(model, own)).sum()
        real = nats_of(model, [rows[i] for i in next(drawn[0])]).mean()
        return (real + this.reward * reward) / tokens

    return loss_at
