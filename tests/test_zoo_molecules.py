"""The zoo's models of molecules: what they draw at temperature 1 closes what it opens."""

from collections import Counter

import pytest

import leangen
from leangen.store import Store

DRAWN = 40


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("home"))


def is_closed(text):
    """Whether brackets and rings of a SMILES string match; rdkit would ask for more."""
    rings = Counter(letter for letter in text if letter.isdigit())
    opened = 0
    for letter in text:
        opened += {"(": 1, ")": -1}.get(letter, 0)
        if opened < 0:
            return False
    return bool(text) and opened == 0 and all(count % 2 == 0 for count in rings.values())


@pytest.mark.parametrize("scheme", ["fp32", "int4"])
def test_molecules_close_what_they_open(scheme, store, monkeypatch):
    monkeypatch.setenv("LEANGEN_HOME", str(store.home))
    engine = leangen.load(f"smiles-lm:{scheme}", ledger=False, baseline_s=0, threads=1)
    asked = {"tokens": [engine.bundle.config["bos_id"]], "max_new_tokens": 100}
    drawn = [engine.generate(seed=seed, temperature=1.0, **asked).text for seed in range(DRAWN)]
    assert len(set(drawn)) == DRAWN
    assert sum(map(is_closed, drawn)) >= 0.95 * DRAWN, drawn
