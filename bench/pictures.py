"""Do pictures look like what was asked for?

    python bench/pictures.py fashion-ddpm fashion-ddpm:int8

Draws `--count` pictures of each of Fashion-MNIST's ten labels, same seeds for every model, and has
a classifier (that of `bench/train/fashion_judge.py`, which leangen-zoo has too) judge them: the
share that gets its own label, with a 95% interval (Wilson 1927), and the Fréchet distance of its
features to the test set's (Heusel et al. 2017) with two standard errors by resampling, beside that
of as many real pictures. Small sets overstate the distance: compare those of one size. MODEL may be
a pipeline that takes a label or a text, `draw:int4` is one with all its parts at int4; `--held-out`
asks with captions that no model was trained on. `--grid FILE.png` writes a row of pictures for each
label.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from PIL import Image
from shares import interval, percent

import leangen as lg
from leangen import media, pipeline
from leangen.catalog.clothes import CLOTHES
from leangen.console import progress_bar, table
from leangen.quality.features import RESAMPLES, frechet

sys.path.insert(0, str(Path(__file__).parent / "train"))
import fashion_captions
from shared import fashion

LABELS = len(CLOTHES)
JUDGE = Path(__file__).parent / "zoo" / "leangen_zoo" / "fashion-judge.onnx.xz"
CAPTION = "a picture of a {}"


class Judge:
    """The classifier, for pictures [n, h, w, 1] in -1..1."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes()
        content = lzma.decompress(content) if path.suffix == ".xz" else content
        self._session = ort.InferenceSession(content, providers=["CPUExecutionProvider"])

    def __call__(self, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels [n] and features [n, d]."""
        samples = np.ascontiguousarray(np.moveaxis(pictures, -1, 1), np.float32)
        logits, features = self._session.run(["logits", "features"], {"sample": samples})
        return logits.argmax(axis=1), features.astype(np.float64)


def load(name: str) -> Any:
    """A model or a pipeline, ready to generate."""
    stem, _, scheme = name.partition(":")
    file = pipeline.shipped().get(stem)
    if file is None or not scheme:
        return lg.load(name, ledger=False, baseline_s=0)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / file.name
        written = re.sub(
            r'^(model = "[^":]+)[^"]*"', rf'\1:{scheme}"', file.read_text(), flags=re.M
        )
        copy.write_text(written)
        return lg.load(copy, ledger=False, baseline_s=0)


def asks(engine: Any, *, held_out: bool) -> list[dict[str, Any]]:
    """What each label is asked for with."""
    if not isinstance(engine, pipeline.Pipeline):
        return [{"conditions": {"label": label}} for label in range(LABELS)]
    if "label" in engine.spec.inputs:
        return [{"label": name} for name in CLOTHES]
    known = [CAPTION.format(nouns[0]) for nouns in fashion_captions.NOUNS]
    return [{"text": text} for text in (fashion_captions.held_out() if held_out else known)]


def draw(name: str, count: int, options: dict[str, Any], *, held_out: bool = False) -> np.ndarray:
    """Pictures [10 * count, 28, 28, 1] of one model, label by label."""
    engine = load(name)
    drawn = []
    with progress_bar() as progress:
        for label, ask in enumerate(asks(engine, held_out=held_out)):
            drawn.append(engine.generate(count=count, seed=label, **ask, **options).array)
            progress(label + 1, LABELS, name)
    return np.concatenate(drawn)


def distance(real: np.ndarray, drawn: np.ndarray) -> list[float]:
    """The Fréchet distance of features, and two standard errors by resampling what was drawn."""
    rng = np.random.default_rng(0)
    again = [
        frechet(real, drawn[rng.integers(0, len(drawn), len(drawn))]) for _ in range(RESAMPLES)
    ]
    return [frechet(real, drawn), 2 * float(np.std(again, ddof=1))]


def main() -> None:
    """Draw, judge, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--judge", type=Path, default=JUDGE, metavar="FILE.onnx", help="or .xz")
    parser.add_argument("--count", type=int, default=30, help="pictures of each label")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--held-out", action="store_true", help="captions no model has read")
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
            "frechet": distance(others, features[chosen]),
        }
    ]
    asked = np.repeat(np.arange(LABELS), args.count)
    for name in args.models:
        pictures = draw(name, args.count, options, held_out=args.held_out)
        labels, features = judge(pictures)
        rows.append(
            {
                "model": name,
                "right": interval(int((labels == asked).sum()), len(asked)),
                "frechet": distance(others, features),
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
        [
            [row["model"], percent(row["right"]), "{:.1f} ± {:.1f}".format(*row["frechet"])]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
