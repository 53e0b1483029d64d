"""Are the molecules that a model writes molecules? `python bench/molecules.py smiles-lm:int4`

Draws `--count` samples from each model at temperature 1, same seeds, and has rdkit judge them:
valid (it parses), unique (of the valid ones), novel (of the unique ones: not in the training set
of MOSES). Shares with 95% intervals (Wilson 1927). Needs `pip install rdkit`.
"""

from __future__ import annotations

import argparse
import gzip
import json

from rdkit import Chem, RDLogger
from shares import interval, percent

import leangen as lg
from leangen.console import progress_bar, table
from leangen.store import Store

JUDGED = ("valid", "unique", "novel")


def known_molecules() -> set[str]:
    """The training set, as it writes them: rdkit's canonical form."""
    with gzip.open(Store().data("molecules"), "rt", encoding="utf-8") as file:
        return {line.split(",")[0].strip() for line in file}


def main() -> None:
    """Draw, judge, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    RDLogger.DisableLog("rdApp.*")
    known, rows = known_molecules(), []
    for name in args.models:
        engine = lg.load(name, ledger=False, baseline_s=0)
        start = [engine.bundle.config["bos_id"]]
        drawn = []
        with progress_bar() as progress:
            for seed in range(args.count):
                drawn.append(
                    engine.generate(
                        tokens=start, max_new_tokens=100, temperature=1.0, seed=seed
                    ).text
                )
                progress(seed + 1, args.count, name)
        parsed = [Chem.MolFromSmiles(text) if text else None for text in drawn]
        valid = [Chem.MolToSmiles(molecule) for molecule in parsed if molecule is not None]
        unique = set(valid)
        rows.append(
            {
                "model": name,
                "drawn": len(drawn),
                "valid": interval(len(valid), len(drawn)),
                "unique": interval(len(unique), len(valid)),
                "novel": interval(len(unique - known), len(unique)),
            }
        )
    if args.json:
        print(json.dumps(rows))
        return
    table(
        ["model", *JUDGED], [[row["model"], *(percent(row[key]) for key in JUDGED)] for row in rows]
    )


if __name__ == "__main__":
    main()
