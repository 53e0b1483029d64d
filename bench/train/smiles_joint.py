"""Train the zoo's smiles-joint: `python bench/train/smiles_joint.py -o DIR`

smiles-lm with a second head: once a molecule has ended, two more rows of the token table say its
logP (Wildman and Crippen 1999) and its QED (Bickerton et al. 2012), both as rdkit computes them.
All weights go on from smiles-lm's, on the squared error and on the divergence of what they write
from what smiles-lm writes, which keeps most of what its reward has bought (Hinton et al. 2015).
A GGUF: the rows are control tokens whose logits are read, never drawn; their scale stands in the
key `leangen.properties`.

Needs `pip install 'leangen[export]' rdkit`.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llama import Llama
from rdkit import Chem
from rdkit.Chem import QED, Crippen
from shared import DEVICE, packed_size, parameters, write_card
from smiles_gguf import read_gguf, write_gguf
from smiles_shared import (
    NOTHING,
    SHAPE,
    Tokens,
    batches,
    encode,
    molecules,
    nats_per_molecule,
    padded,
    train,
    train_tokenizer,
)
from torch import Tensor
from torch.nn import functional as F

from leangen.catalog import CATALOG, Packaged
from leangen.console import say

JUDGED, FITTED, RATE = 500, 10_000, 5e-4
PROPERTIES = {"logP": Crippen.MolLogP, "QED": QED.qed}
PLACES = [SHAPE.vocab + i for i in range(len(PROPERTIES))]
WEIGHT = 0.5
"""Of the squared error beside the divergence, in nats, of a token."""
NEVER = -30.0
"""The logit of what the teacher does not know."""
Array = np.ndarray[Any, Any]


def measured(texts: Sequence[str]) -> Array:
    """The properties [n, 2] of molecules."""
    parsed = [Chem.MolFromSmiles(text) for text in texts]
    return np.array([[value(each) for value in PROPERTIES.values()] for each in parsed])


def ended(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One END more to read, where nothing is to be said, and the places [n] of those."""
    pad = torch.zeros_like(inputs[:, :1])
    inputs, targets = torch.cat([inputs, pad], 1), torch.cat([targets, pad + NOTHING], 1)
    return inputs, targets, (targets != NOTHING).sum(1)


def losses(
    model: Llama, teacher: Llama, rows: Sequence[Tokens], wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """A token's mean divergence from the teacher's, and the scaled properties' mean squared error.

    The teacher has met a reward that the molecules themselves do not show: likelihood
    would undo it.
    """
    inputs, targets, ends = ended(*padded(rows))
    with torch.autocast(DEVICE, torch.bfloat16):
        logits = model(inputs).float()
        with torch.no_grad():
            taught = teacher(inputs).float()
            taught[..., PLACES] = NEVER
    told = targets != NOTHING
    apart = F.kl_div(
        logits[told].log_softmax(1),
        taught[told].log_softmax(1),
        reduction="batchmean",
        log_target=True,
    )
    said = logits[torch.arange(len(rows)), ends][:, PLACES]
    return apart, F.mse_loss(said, wanted)


@torch.no_grad()
def predicted(model: Llama, rows: Sequence[Tokens]) -> Array:
    """The scaled properties [n, 2] that the model says of molecules."""
    found = []
    for start in range(0, len(rows), 100):
        inputs, _, ends = ended(*padded(rows[start : start + 100]))
        found.append(model(inputs)[torch.arange(len(ends)), ends][:, PLACES].cpu().numpy())
    return np.concatenate(found)


@torch.no_grad()
def fit(model: Llama, rows: Sequence[Tokens], wanted: Tensor) -> None:
    """Begin with the least squares of what the head reads at the ends, a little damped."""
    read = []
    for start in range(0, len(rows), 100):
        inputs, _, ends = ended(*padded(rows[start : start + 100]))
        with torch.autocast(DEVICE, torch.bfloat16):
            read.append(model.hidden(inputs)[torch.arange(len(ends)), ends].float())
    x = torch.cat(read)
    damped = x.T @ x + 1e-3 * len(x) * torch.eye(x.shape[1], device=DEVICE)
    model.token_embd.weight[PLACES] = torch.linalg.solve(damped, x.T @ wanted).T


def letter_counts(texts: Sequence[str], letters: Sequence[str]) -> Array:
    """How often each character is in each molecule, and a 1."""
    counts = [Counter(text) for text in texts]
    return np.array([[1, *(count[letter] for letter in letters)] for count in counts])


def quality(said: Array, true: Array) -> dict[str, dict[str, float]]:
    """R2 and mean absolute error by property."""
    error = np.abs(said - true)
    shares = 1 - (error**2).mean(0) / true.var(0)
    return {
        name: {"r2": round(float(shares[i]), 4), "mae": round(float(error[:, i].mean()), 4)}
        for i, name in enumerate(PROPERTIES)
    }


def described(found: Mapping[str, Mapping[str, float]], mean: Array, spread: Array) -> str:
    """What `leangen.properties` says: each property's token, scale and held-out error."""
    return json.dumps(
        {
            name: {
                "token": PLACES[i],
                "mean": round(float(mean[i]), 6),
                "scale": round(float(spread[i]), 6),
                "error": found[name]["mae"],
            }
            for i, name in enumerate(PROPERTIES)
        }
    )


def main() -> None:
    """Train, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--count", type=int, default=40_000, help="molecules to learn from")
    parser.add_argument("--begun", type=Path, metavar="FILE.gguf", help="another smiles-lm")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    all_texts, test = molecules("train"), molecules("test")
    order = np.random.default_rng(0).permutation(len(all_texts))
    tokenizer = train_tokenizer([all_texts[i] for i in order[:200_000]])
    texts = [all_texts[i] for i in order[: args.count]]
    judged = [test[i] for i in np.random.default_rng(1).choice(len(test), JUDGED, replace=False)]
    say(f"computing the properties of {len(texts) + len(judged)} molecules")
    true, held_out = measured(texts), measured(judged)
    mean, spread = true.mean(0), true.std(0)
    wanted = torch.from_numpy(((true - mean) / spread).astype(np.float32)).to(DEVICE)
    rows, asked = encode(tokenizer, texts), encode(tokenizer, judged)
    torch.manual_seed(0)
    model = Llama(replace(SHAPE, vocab=SHAPE.vocab + len(PROPERTIES))).to(DEVICE)
    begun = args.begun or args.output / "smiles-lm.gguf"
    if args.begun is None:
        source = CATALOG["smiles-lm"].source
        assert isinstance(source, Packaged) and source.path is not None
        begun.write_bytes(lzma.decompress(source.path.read_bytes()))
    read_gguf(begun, model)
    before = nats_per_molecule(model, asked)
    teacher = deepcopy(model).eval()
    fit(model, rows[:FITTED], wanted[:FITTED])
    drawn = batches(np.array([len(row) for row in rows]), 0)
    skipped = 0

    def loss_at(step: int) -> Tensor:
        nonlocal skipped
        while skipped < step:  # of a run that goes on
            next(drawn)
            skipped += 1
        chosen = next(drawn)
        skipped += 1
        apart, error = losses(model, teacher, [rows[i] for i in chosen], wanted[chosen])
        return apart + WEIGHT * error

    curve = train(
        model,
        torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1),
        loss_at,
        lambda share: 1 - share,
        args.steps,
        args.output / "checkpoint.pt",
    )
    model.eval().half().float()  # judged as it is stored
    found = quality(predicted(model, asked) * spread + mean, held_out)
    letters = sorted(set("".join(texts)))
    table, *_ = np.linalg.lstsq(letter_counts(texts, letters), true)
    own = nats_per_molecule(model, asked)
    path = args.output / "smiles-joint.gguf"
    extra = {"leangen.properties": described(found, mean, spread)}
    write_gguf(path, model, tokenizer, named=[f"<|{name}|>" for name in PROPERTIES], extra=extra)
    packed = lzma.compress(path.read_bytes(), preset=9 | lzma.PRESET_EXTREME)
    path.with_name(path.name + ".xz").write_bytes(packed)
    card = {
        "name": "smiles-joint",
        "parameters": parameters(model),
        "stored_bytes": packed_size(path.with_name(path.name + ".xz")),
        "steps": args.steps,
        "molecules": len(texts),
        "held_out": found,
        "held_out_of_letter_counts": quality(letter_counts(judged, letters) @ table, held_out),
        "test_nats_per_molecule": round(float(own.mean()), 3),
        "test_nats_per_molecule_se": round(float(own.std() / math.sqrt(len(own))), 3),
        "smiles_lm_nats_per_molecule": round(float(before.mean()), 3),
        "loss_curve": curve,
    }
    write_card(args.output / "card.json", card)


if __name__ == "__main__":
    main()
