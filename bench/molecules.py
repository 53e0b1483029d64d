"""Are the molecules that a model writes molecules?

    python bench/molecules.py smiles-lm smiles-lm:int4

Draws `--count` samples from each model at temperature 1, same seeds, and has rdkit judge them:
valid (it parses), unique (of the valid ones), novel (of the unique ones: not in the training set
of MOSES). Shares with 95% intervals (Wilson 1927). What a second head says of those that are valid
is held against rdkit's logP and QED: R2 and mean absolute error. Needs `pip install rdkit`.
"""

from __future__ import annotations

import argparse
import gzip
import json
from typing import Any

import numpy as np
from rdkit import Chem, RDLogger
from rdkit.Chem import QED, Crippen
from shares import interval, percent

import leangen as lg
from leangen.console import progress_bar, table
from leangen.store import Store

JUDGED = ("valid", "unique", "novel")
PROPERTIES = {"logP": Crippen.MolLogP, "QED": QED.qed}


def known_molecules() -> set[str]:
    """The training set, as it writes them: rdkit's canonical form."""
    with gzip.open(Store().data("molecules"), "rt", encoding="utf-8") as file:
        return {line.split(",")[0].strip() for line in file}


def head_quality(said: list[Any], parsed: list[Any]) -> dict[str, dict[str, float]]:
    """R2 and mean absolute error, by property, of what was said of molecules that rdkit reads."""
    kept = [(each, molecule) for each, molecule in zip(said, parsed, strict=True) if molecule]
    found = {}
    for name, value in PROPERTIES.items():
        pairs = [(each[name].value, value(molecule)) for each, molecule in kept if each]
        told, true = np.array(pairs).reshape(-1, 2).T
        error = told - true
        if len(error):
            share, mean = 1 - (error**2).mean() / true.var(), np.abs(error).mean()
            found[name] = {"r2": float(share), "mae": float(mean)}
    return found


def main() -> None:
    """Draw, judge, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
                    engine.generate(tokens=start, max_new_tokens=100, temperature=1.0, seed=seed)
                )
                progress(seed + 1, args.count, name)
        parsed = [Chem.MolFromSmiles(each.text) if each.text else None for each in drawn]
        valid = [Chem.MolToSmiles(molecule) for molecule in parsed if molecule is not None]
        unique = set(valid)
        rows.append(
            {
                "model": name,
                "drawn": len(drawn),
                "valid": interval(len(valid), len(drawn)),
                "unique": interval(len(unique), len(valid)),
                "novel": interval(len(unique - known), len(unique)),
                "properties": head_quality([each.properties for each in drawn], parsed),
            }
        )
    if args.json:
        print(json.dumps(rows))
        return
    table(
        ["model", *JUDGED], [[row["model"], *(percent(row[key]) for key in JUDGED)] for row in rows]
    )
    for row in rows:
        for name, found in row["properties"].items():
            print(
                f"{row['model']} says {name}: R2 {found['r2']:.3f}, mean error {found['mae']:.3f}"
            )


if __name__ == "__main__":
    main()
