"""Train the catalog's smiles-lm: `python bench/train/smiles_lm.py -o DIR`

A llama-shaped decoder of 5.6M parameters on the 1.58M SMILES strings of MOSES (Polykovskiy et al.
2020), written as an fp16 GGUF that `leangen export` takes (the package has it as .xz), with its
figures beside it as JSON.

First AdamW over windows of all molecules in one row: 21.33 nats a test molecule, and rdkit reads
86% of what it draws. Then two rounds over whole molecules with a reward for those that rdkit reads
(`smiles_reward.py`): 96.6%, at 21.59 nats. So validity is bought, with a quarter of a nat of
likelihood, and what is drawn has slightly fewer rings (2.40 a molecule; 2.49 without the reward,
2.58 in real ones). CPU time of the three, with AVX512-BF16: about 33, 20 and 8 minutes.

Needs `pip install 'leangen[export]' rdkit`; fixed seeds, on a GPU when there is one. It may be
interrupted: the next run goes on from the checkpoints in DIR. `--begun FILE.gguf` leaves the first
part out and starts from a GGUF of this script. On a busy machine OMP_WAIT_POLICY=PASSIVE keeps its
threads from spinning.
"""

from __future__ import annotations

import argparse
import lzma
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama import Llama
from shared import DEVICE, parameters, write_card
from smiles_gguf import read_gguf, write_gguf
from smiles_reward import finish
from smiles_shared import (
    BATCH,
    SHAPE,
    Tokens,
    encode,
    molecules,
    nats_per_molecule,
    train,
    train_tokenizer,
)
from torch import Tensor
from torch.nn import functional as F

from leangen.console import say

WINDOW, WINDOWS = 96, 64  # tokens of a window, and windows of a step
RATE = 3e-3


def window_loss(model: Llama, row: Tokens, step: int) -> Tensor:
    """Nats a token of windows of the row of all molecules, each after END."""
    starts = np.random.default_rng(step).integers(0, len(row) - WINDOW - 1, WINDOWS)
    windows = np.stack([row[i : i + WINDOW + 1] for i in starts]).astype(np.int64)
    tokens = torch.from_numpy(windows).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        logits = model(tokens[:, :-1])
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


def begin(
    model: Llama, rows: Sequence[Tokens], steps: int, folder: Path
) -> list[tuple[int, float]]:
    """The first part: AdamW and half a cosine."""
    end = np.zeros(1, np.int16)
    row = np.concatenate([part for molecule in rows for part in (end, molecule)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    return train(
        model,
        optimizer,
        lambda step: window_loss(model, row, step),
        lambda share: max(0.02, 0.5 + 0.5 * math.cos(math.pi * share)),
        steps,
        folder / "begun.pt",
    )


def n_gram_nats(
    texts: Iterable[str], judged: Iterable[str], order: int = 10
) -> np.ndarray[Any, Any]:
    """The baseline: an interpolated n-gram of characters with Witten-Bell smoothing."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for text in texts:
        line = f"\n{text}\n"
        for i in range(1, len(line)):
            for start in range(max(0, i - order + 1), i + 1):
                counts[line[start:i]][line[i]] += 1
    totals = {context: counter.total() for context, counter in counts.items()}
    alphabet = len(counts[""])

    def probability(context: str, symbol: str) -> float:
        below = probability(context[1:], symbol) if context else 1 / (alphabet + 1)
        if context not in counts:
            return below
        kinds = len(counts[context])
        return (counts[context][symbol] + kinds * below) / (totals[context] + kinds)

    found = []
    for text in judged:
        line = f"\n{text}\n"
        found.append(
            -sum(
                math.log(probability(line[max(0, i - order + 1) : i], line[i]))
                for i in range(1, len(line))
            )
        )
    return np.array(found)


def main() -> None:
    """Train, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, nargs=3, default=(1200, 700, 200), metavar="N")
    parser.add_argument("--begun", type=Path, metavar="FILE.gguf")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    texts, test = molecules("train"), molecules("test")
    rng = np.random.default_rng(0)
    texts = [texts[i] for i in rng.permutation(len(texts))]
    judged = [test[i] for i in rng.choice(len(test), 2000, replace=False)]
    tokenizer = train_tokenizer(texts[:200_000])
    rows = encode(tokenizer, texts)
    torch.manual_seed(0)
    model = Llama(SHAPE).to(DEVICE)
    first, *later = args.steps
    curves = []
    if args.begun is not None:
        read_gguf(args.begun, model)
        say(f"begins at {nats_per_molecule(model, encode(tokenizer, judged)).mean():.3f} nats")
    else:
        curves.append(begin(model, rows, first, args.output))
    curves.extend(finish(model, tokenizer, rows, later, args.output))
    model.eval().half().float()  # judged as it is stored
    path = args.output / "smiles-lm.gguf"
    write_gguf(path, model, tokenizer)
    packed = lzma.compress(path.read_bytes(), preset=9 | lzma.PRESET_EXTREME)
    path.with_name(path.name + ".xz").write_bytes(packed)
    own = nats_per_molecule(model, encode(tokenizer, judged))
    baseline = n_gram_nats(texts[:30_000], judged)
    card = {
        "parameters": parameters(model),
        "steps": args.steps,
        "tokens_of_the_first_part": first * WINDOWS * WINDOW,
        "molecules_of_the_rounds": sum(later) * BATCH,
        "tokens_a_molecule": round(float(np.mean([len(row) + 1 for row in rows])), 2),
        "test_nats_per_molecule": round(float(own.mean()), 3),
        "test_nats_per_molecule_se": round(float(own.std() / math.sqrt(len(own))), 3),
        "ten_gram_nats_per_molecule": round(float(baseline.mean()), 3),
        "loss_curve": curves,
    }
    write_card(args.output / "card.json", card)


if __name__ == "__main__":
    main()
