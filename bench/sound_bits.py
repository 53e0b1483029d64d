"""Bits per sample of prompts-wavenet.

    python bench/sound_bits.py prompts-wavenet:int8 prompts-wavenet:int4

Scores the held-out prompts (bench/train/prompts.py) with the bundles themselves; a mean with two
standard errors, and what each scheme adds to fp32 on the same files. `--picture FILE.png` draws the
spectrogram of a held-out prompt above that of a sample.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

import leangen as lg
from leangen import families
from leangen.console import progress_bar, table, with_u
from leangen.families.waveform import expand
from leangen.session import Session
from leangen.store import Store

sys.path.insert(0, str(Path(__file__).parent / "train"))
from prompts import FOLDER, LEVELS, RATE_HZ, Array, per_sample, prompts

WINDOW, HOP, RANGE_DB = 256, 40, 60
SHOWN_S = 3.0


def bits(name: str, sounds: list[Array]) -> list[Array]:
    """Bits of each sample [n] of sounds under a model."""
    session = Session(Store().resolve(name), threads=1)
    family = cast(Any, families.of(session.bundle))
    found = []
    with progress_bar() as progress:
        for levels in sounds:
            logits = family.logits(session, levels.tolist()).astype(np.float64)
            logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
            found.append(-logits[np.arange(len(levels)), levels] / np.log(2))
            progress(len(found), len(sounds), name)
    return found


def spectrogram(sound: Array) -> Array:
    """Greys [129, t] of a sound: 0 to 4 kHz upwards, black is the loudest and white 60 dB below."""
    frames = np.lib.stride_tricks.sliding_window_view(sound, WINDOW)[::HOP] * np.hanning(WINDOW)
    loud = 20 * np.log10(np.abs(np.fft.rfft(frames)) + 1e-9)
    return np.uint8(np.clip((loud.max() - loud) / RANGE_DB, 0, 1) * 255).T[::-1]


def draw(name: str, path: Path, seed: int, sounds: list[Array]) -> None:
    """The first held-out prompt of `SHOWN_S`, a white line, and as much of a model's sound."""
    count = round(SHOWN_S * RATE_HZ)
    real = expand(next(levels for levels in sounds if len(levels) >= count)[:count], LEVELS)
    engine = lg.load(name, ledger=False, baseline_s=0)
    drawn = engine.generate(seconds=SHOWN_S, seed=seed).array
    above, below = spectrogram(real), spectrogram(drawn)
    gap = np.full((8, above.shape[1]), 255, np.uint8)
    greys = np.concatenate([above, gap, below]) // 17 * 17  # 16 of them: half the file
    Image.fromarray(greys).save(path, optimize=True)


def main() -> None:
    """Score, print, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--count", type=int, help="of the held-out files, the first so many")
    parser.add_argument("--data", type=Path, default=FOLDER, metavar="DIR", help="the prompts")
    parser.add_argument("--picture", type=Path, metavar="FILE.png")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sounds = prompts(args.data)[1]
    rows, references = [], {}
    for name in args.models:
        found = bits(name, sounds[: args.count])
        first = references.setdefault(name.partition(":")[0], found)
        more = [each - other for each, other in zip(found, first, strict=True)]
        told = [per_sample(each) for each in (found, more)]
        rows.append([name, *(with_u(each["mean"], each["u"], "") for each in told)])
    table(["model", "bits per sample", "more than the first"], rows)
    if args.picture is not None:
        draw(args.models[0], args.picture, args.seed, sounds)


if __name__ == "__main__":
    main()
