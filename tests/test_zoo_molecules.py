"""The zoo's models of molecules: what they draw at temperature 1 closes what it opens."""

import json
from collections import Counter
from pathlib import Path

import pytest

import leangen
from leangen.cli import main
from leangen.families import properties
from leangen.families.language import tokenizer
from leangen.store import Store

DRAWN = 40
HELD_OUT = {
    "CCN(CC)S(=O)(=O)CC(=O)Nc1ccccc1-c1ccccc1": (2.964, 0.838),
    "CC(=O)Nc1cccc(-c2nn3c(C)nnc3s2)c1": (2.120, 0.776),
    "Cc1cc(C(=O)NC2CC(O)C(CO)C2)c(C)o1": (0.758, 0.742),
    "CC(Sc1ccccn1)C(=O)Nc1ccc2oc(=O)ccc2c1": (3.307, 0.588),
}
"""Molecules of MOSES's test set, with the logP and QED that rdkit computes of them."""


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


@pytest.mark.parametrize("scheme", ["fp32", "int4"])
def test_the_second_head_knows_properties_of_molecules(scheme, store, monkeypatch):
    monkeypatch.setenv("LEANGEN_HOME", str(store.home))
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench" / "zoo")
    engine = leangen.load(f"smiles-joint:{scheme}", ledger=False, baseline_s=0, threads=1)
    end = engine.bundle.config["bos_id"]
    for text, true in HELD_OUT.items():
        written = [end, *tokenizer(engine.session).encode(text).ids, end]
        logp, qed = properties.of_tokens(engine.session, written).values()
        assert (logp.value, qed.value) == (
            pytest.approx(true[0], abs=0.6),
            pytest.approx(true[1], abs=0.2),
        )
    drawn = engine.generate(tokens=[end], max_new_tokens=100, temperature=1.0, seed=3)
    assert drawn.properties and is_closed(drawn.text)


def test_a_model_of_molecules_is_judged_on_molecules(store, monkeypatch, capsys):
    """Not on prose, of which it knows nothing; and without a download."""
    monkeypatch.setenv("LEANGEN_HOME", str(store.home))
    asked = ["--tokens", "512", "--prompts", "0", "--json"]
    assert main(["eval", "smiles-lm:int4", "--reference", "fp32", *asked]) == 0
    found = {each["name"]: each for each in json.loads(capsys.readouterr().out)["measures"]}
    assert 2 < found["reference perplexity"]["value"] < 6
    assert 0 < found["KL divergence"]["value"] < 0.02
