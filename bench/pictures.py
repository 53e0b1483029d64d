"""Do pictures look like what was asked for? `python bench/pictures.py MODEL --judge judge.onnx`

Draws `--count` pictures of each of Fashion-MNIST's ten labels, same seeds for every model, and has
a classifier (`bench/train/fashion_judge.py`) judge them: the share that gets its own label, with a
95% interval (Wilson 1927), and the Fréchet distance of its features to the test set's (Heusel et
al. 2017), beside that of as many real pictures. Small sets overstate the distance: compare those of
one size. `--grid FILE.png` writes a row of pictures for each label.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from PIL import Image
from shares import interval, percent

import leangen as lg
from leangen import media
from leangen.console import progress_bar, table
from leangen.quality.features import frechet

sys.path.insert(0, str(Path(__file__).parent / "train"))
from shared import fashion

LABELS = 10


class Judge:
    """The classifier, for pictures [n, h, w, 1] in -1..1."""

    def __init__(self, path: Path) -> None:
        self._session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def __call__(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels [n] and features [n, d]."""
        samples = np.ascontiguousarray(np.moveaxis(pictures, -1, 1), np.float32)
        logits, features = self._session.run(["logits", "features"], {"sample": samples})
        return logits.argmax(axis=1), features.astype(np.float64)


def draw(name: str, count: int, options: dict[str, Any]) -> np.ndarray:
    """Pictures [10 * count, 28, 28, 1] of one model, label by label."""
    engine = lg.load(name, ledger=False, baseline_s=0)
    drawn = []
    with progress_bar() as progress:
        for label in range(LABELS):
            drawn.append(
                engine.generate(
                    count=count, seed=label, conditions={"label": label}, **options
                ).array
            )
            progress(label + 1, LABELS, name)
    return np.concatenate(drawn)


def main() -> None:
    """Draw, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--judge", type=Path, required=True, metavar="judge.onnx")
    parser.add_argument("--count", type=int, default=30, help="pictures of each label")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--data", type=Path, metavar="DIR", help="Fashion-MNIST's four files")
    parser.add_argument("--grid", type=Path, metavar="FILE.png", help="of the first model")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    given = {"steps": args.steps, "guidance": args.guidance}
    options = {name: value for name, value in given.items() if value is not None}
    judge = Judge(args.judge)
    images, truth = fashion("t10k", args.data)
    real = images[..., None].astype(np.float32) / 127.5 - 1
    chosen = np.random.default_rng(0).choice(len(real), LABELS * args.count, replace=False)
    labels, features = judge(real)
    others = np.delete(features, chosen, axis=0)
    rows = [
        {
            "model": "real pictures",
            "right": interval(int((labels[chosen] == truth[chosen]).sum()), len(chosen)),
            "frechet": frechet(others, features[chosen]),
        }
    ]
    asked = np.repeat(np.arange(LABELS), args.count)
    for name in args.models:
        pictures = draw(name, args.count, options)
        labels, features = judge(pictures)
        rows.append(
            {
                "model": name,
                "right": interval(int((labels == asked).sum()), len(asked)),
                "frechet": frechet(others, features),
                "right_by_label": [
                    float((labels[asked == label] == label).mean()) for label in range(LABELS)
                ],
            }
        )
        if args.grid is not None and name == args.models[0]:
            shown = pictures.reshape(LABELS, args.count, 28, 28)[:, :LABELS]
            tiled = shown.transpose(0, 2, 1, 3).reshape(1, LABELS * 28, -1, 1)
            Image.fromarray(media.to_bytes(tiled, (-1.0, 1.0))[0, ..., 0]).save(args.grid)
    if args.json:
        print(json.dumps(rows))
        return
    table(
        ["model", "own label", "Fréchet distance"],
        [[row["model"], percent(row["right"]), f"{row['frechet']:.2f}"] for row in rows],
    )


if __name__ == "__main__":
    main()
