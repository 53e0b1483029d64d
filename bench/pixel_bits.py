"""Bits per dimension of pixel models.

    python bench/pixel_bits.py fashion-pixelcnn:int8 fashion-pixelcnn:int4

Scores the first `--count` pictures of Fashion-MNIST's test set, each given its label, with the
bundles themselves; a mean with two standard errors, and what each scheme adds to fp32 on the same
pictures. `--grid FILE.png` draws four pictures of each label.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

import leangen as lg
from leangen import families, media
from leangen.console import progress_bar, table, with_u
from leangen.families.pixel_request import Request
from leangen.session import Session
from leangen.store import Store

sys.path.insert(0, str(Path(__file__).parent / "train"))
from fashion_gpt import shrunk
from shared import fashion

LABELS, EACH = 10, 4


def bits(name: str, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Bits per dimension [n] of pictures uint8 [n, 28, 28] under a model."""
    session = Session(Store().resolve(name), threads=1)
    family = cast(Any, families.of(session.bundle))
    small = session.bundle.config["size"] == [14, 14]
    pixels = shrunk(images) if small else images.reshape(len(images), -1).astype(np.int64)
    found = []
    with progress_bar() as progress:
        for row, label in zip(pixels, labels, strict=True):
            asked = Request(conditions={"label": int(label)})
            logits = family.logits(session, row.tolist(), request=asked).astype(np.float64)
            logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
            found.append(-logits[np.arange(len(row)), row].mean() / np.log(2))
            progress(len(found), len(pixels), name)
    return np.array(found)


def draw(name: str, path: Path, seed: int) -> None:
    """A column of pictures for each label."""
    engine = lg.load(name, ledger=False, baseline_s=0)
    drawn = [
        engine.generate(count=EACH, seed=seed, conditions={"label": label}).array
        for label in range(LABELS)
    ]
    columns = [np.concatenate(list(pictures)) for pictures in drawn]  # a label below each other
    Image.fromarray(media.to_bytes(np.concatenate(columns, 1)[None], (-1.0, 1.0))[0, ..., 0]).save(
        path
    )


def main() -> None:
    """Score, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--data", type=Path, metavar="DIR", help="Fashion-MNIST's four files")
    parser.add_argument("--grid", type=Path, metavar="FILE.png")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    images, labels = fashion("t10k", args.data)
    rows, references = [], {}
    for name in args.models:
        found = bits(name, images[: args.count], labels[: args.count])
        own = name.partition(":")[0]
        more = found - references.setdefault(own, found)
        told = [
            with_u(each.mean(), 2 * each.std(ddof=1) / np.sqrt(len(each)), "")
            for each in (found, more)
        ]
        rows.append([name, *told])
    table(["model", "bits per dimension", "more than the first"], rows)
    if args.grid is not None:
        draw(args.models[0], args.grid, args.seed)


if __name__ == "__main__":
    main()
