"""What int8 and int4 cost in each family's own measure: `leangen compare` over one model of each.

    python bench/families.py             (after pip install ./bench/zoo)
    python bench/families.py fashion-ddpm galaxy-flow

A table in Markdown: size, the family's figures against fp32 (± u), time against
fp32's with the interval of the paired ratio. Where a scheme has no treatment for any layer of a
model it is left out and said so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from precision import texts

from leangen.console import say, with_u

MODELS = {
    "smiles-lm": "language",
    "annalog": "text to text",
    "whisper-tiny-en": "speech to text",
    "minilm-l6": "embedding",
    "terrain": "diffusion",
    "fashion-fm": "flow matching",
    "fashion-vae": "one-shot",
    "piper-joe": "flow, speech",
    "galaxy-flow": "flow, densities",
    "fashion-gpt": "pixel by pixel",
}
SCHEMES = ("fp32", "int8", "int4")
CHARACTERS = 40_000
"""Of molecules, for the language model."""
MOST = 2
"""Figures of a family, the first ones that `compare` gives."""


def compared(model: str, rounds: int, folder: Path) -> dict[str, Any]:
    """What `leangen compare` says in JSON; exits with its message where it fails."""
    command = [sys.executable, "-m", "leangen", "compare", model, "--json"]
    command += ["--rounds", str(rounds), "--schemes", ",".join(SCHEMES)]
    if model == "smiles-lm":  # `compare` has English text, which it was not made for
        molecules = folder / "molecules.txt"
        molecules.write_text(texts(model, None)[1][:CHARACTERS], encoding="utf-8")
        command += ["--data", str(molecules)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command[2:])}: {done.stderr.strip()}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def figure(measure: dict[str, Any]) -> str:
    """`name value ± u unit`."""
    value = with_u(measure["value"], measure["u"], measure["unit"])
    return f"{measure['name']} {value.strip()}"


def line(family: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [f"{family}: `{found['model']}`"]
    cells.append(", ".join(f"{row['size_bytes'] / 1e6:.2f}" for row in found["rows"]))
    ratios = {ratio["other"]: ratio for ratio in found["ratios"] if ratio["base"] == "fp32"}
    for row in found["rows"][1:]:
        ratio = ratios[row["label"]]
        quality = "; ".join(figure(measure) for measure in row["quality"][:MOST])
        time = f"{ratio['value']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})"
        cells += [quality, time]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if unknown := set(args.models) - set(MODELS):
        parser.error(f"{', '.join(unknown)}: there are {', '.join(MODELS)}")
    print("| family: model | MB fp32, int8, int4 | int8 | time | int4 | time |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="leangen-") as folder:
        for model in args.models or MODELS:
            say(f"comparing {model}")
            found = compared(model, args.rounds, Path(folder))
            print(line(MODELS[model], found), flush=True)


if __name__ == "__main__":
    main()
