"""What the scripts of molecules share: MOSES, its tokens, likelihoods and the training loop."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama import Llama, Shape
from shared import DEVICE
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F

from leangen.console import progress_bar, say
from leangen.store import Store

END = "<|end|>"  # begins and ends every molecule
SHAPE = Shape(vocab=512)
BATCH, POOL = 64, 16  # molecules of a step, and steps whose molecules are sorted by length
NOTHING = -100  # where there is nothing to predict
Tokens = np.ndarray[Any, np.dtype[np.int16]]


def molecules(part: str) -> list[str]:
    """The SMILES strings of `train` or `test`."""
    folder = Store().data("molecules").parent
    with gzip.open(folder / f"{part}.csv.gz", "rt", encoding="utf-8") as file:
        return [line.split(",")[0].strip() for line in file][1:]


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Byte-level BPE with GPT-2's splits, which is what a GGUF's pre-tokenizer `gpt-2` says."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE.vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Tokens]:
    """The tokens of each molecule, without END."""
    rows: list[Tokens] = []
    for start in range(0, len(texts), 10_000):  # all at once would take gigabytes
        encoded = tokenizer.encode_batch_fast(list(texts[start : start + 10_000]))
        rows.extend(np.array(row.ids, np.int16) for row in encoded)
    return rows


def padded(rows: Sequence[Sequence[int] | Tokens]) -> tuple[Tensor, Tensor]:
    """What the model reads and what it shall say, [n, t]: END, the molecule, END."""
    length = max(len(row) for row in rows) + 1
    inputs = np.zeros((len(rows), length), np.int64)
    targets = np.full((len(rows), length), NOTHING)
    for i, row in enumerate(rows):
        inputs[i, 1 : len(row) + 1] = row
        targets[i, : len(row)] = row
        targets[i, len(row)] = 0
    return torch.from_numpy(inputs).to(DEVICE), torch.from_numpy(targets).to(DEVICE)


def batches(lengths: np.ndarray[Any, Any], first: int) -> Iterator[np.ndarray[Any, Any]]:
    """Rows of each step from `first` on: molecules of nearly one length, so that few pads run."""
    each = len(lengths) // (BATCH * POOL)
    step = first
    while True:
        epoch, pool = divmod(step // POOL, each)
        order = np.random.default_rng(epoch).permutation(len(lengths))
        while pool < each:
            rows = order[pool * BATCH * POOL :][: BATCH * POOL]
            rows = rows[np.argsort(lengths[rows], kind="stable")].reshape(POOL, BATCH)
            shuffled = rows[np.random.default_rng((epoch, pool)).permutation(POOL)]
            yield from shuffled[step % POOL :]
            step += POOL - step % POOL
            pool += 1


def nats_of(model: Llama, rows: Sequence[Sequence[int] | Tokens]) -> Tensor:
    """Negative log-likelihood of each molecule with its END."""
    inputs, targets = padded(rows)
    with torch.autocast(DEVICE, torch.bfloat16):
        logits = model(inputs).float().transpose(1, 2)
    return F.cross_entropy(logits, targets, ignore_index=NOTHING, reduction="none").sum(1)


@torch.no_grad()
def nats_per_molecule(model: Llama, rows: Sequence[Sequence[int] | Tokens]) -> np.ndarray[Any, Any]:
    """Negative log-likelihood of each molecule with its END, each alone in its context."""
    found = []
    for start in range(0, len(rows), 100):
        inputs, targets = padded(rows[start : start + 100])
        logits = model(inputs).float().transpose(1, 2)
        loss = F.cross_entropy(logits, targets, ignore_index=NOTHING, reduction="none")
        found.append(loss.sum(1).cpu().numpy())
    return np.concatenate(found)


def train(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    loss_at: Callable[[int], Tensor],
    scale_at: Callable[[float], float],
    steps: int,
    checkpoint: Path,
) -> list[tuple[int, float]]:
    """The loss curve: (step, mean loss of the 50 steps before).

    `loss_at` is called with each step in turn, `scale_at` with the share of them that is done. It
    may be interrupted: the next run goes on from the checkpoint.
    """
    rate = optimizer.param_groups[0]["lr"]
    done, curve = 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=DEVICE)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, curve = state["step"], state["curve"]
        say(f"going on from step {done}")
    total, warm_up = 0.0, min(100, max(steps // 10, 1))
    with progress_bar() as progress:
        for step in range(done, steps):
            scale = min(1.0, (step + 1) / warm_up) * scale_at(step / steps)
            optimizer.param_groups[0]["lr"] = rate * scale
            loss = loss_at(step)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += float(loss.detach())
            if (step + 1) % 50 == 0 or step + 1 == steps:
                curve.append((step + 1, round(total / ((step % 50) + 1), 4)))
                total = 0.0
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                state |= {"step": step + 1, "curve": curve}
                torch.save(state, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").replace(checkpoint)
            progress(step + 1, steps, f"loss {float(loss.detach()):.3f}")
    return curve
