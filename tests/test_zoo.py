"""The models that come with leangen: unpacked, exported, quantized, and worth looking at."""

import numpy as np
import pytest

import leangen
from leangen import verification
from leangen.catalog import CATALOG, Packaged
from leangen.engine import Engine
from leangen.errors import ChecksumError, RequestError
from leangen.session import Session
from leangen.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return Store(tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module")
def clothes(store):
    return Engine(Session(store.resolve("fashion-ddpm"), threads=1), baseline_s=0)


def test_what_is_exported_is_what_was_trained(clothes):
    lines = list(verification.verify(clothes.bundle))
    assert "graph model: 0 off its fp32 reference" in lines[-1]


def test_a_label_decides_what_is_drawn(clothes):
    """Trousers are two legs of light with a gap, a bag is wide: no classifier is needed."""
    options = {"steps": 8, "count": 4, "seed": 1}
    trousers = clothes.generate(conditions={"label": 1}, **options).array
    bags = clothes.generate(conditions={"label": 8}, **options).array
    again = clothes.generate(conditions={"label": 8}, **options).array
    assert trousers.shape == (4, 28, 28, 1) and np.array_equal(bags, again)
    lit = [(images > -0.5).mean(axis=(1, 2, 3)) for images in (trousers, bags)]
    wide = [(images > -0.5).any(axis=1).sum(axis=(1, 2)) for images in (trousers, bags)]
    assert (lit[0] < lit[1]).all() and (wide[0] < wide[1]).all() and (wide[1] > 20).all()


def test_labels_that_there_are_not(clothes):
    with pytest.raises(RequestError, match="condition label is 11, expected 0 to 9"):
        clothes.generate(conditions={"label": 11})


def test_repaint_changes_what_the_mask_covers_and_nothing_else(monkeypatch, store):
    monkeypatch.setenv("LEANGEN_HOME", str(store.home))
    result = leangen.load("repaint", ledger=False).generate(seed=2)
    before, after = result.parts["first"].array[0], result.array[0]
    assert np.allclose(before[:14], after[:14], atol=1e-5)
    assert np.abs(before[14:] - after[14:]).mean() > 0.05
    parts = [part.receipt.energy.gross_uj for part in result.parts.values()]
    assert sum(parts) == result.receipt.energy.gross_uj


def test_a_damaged_package_says_so(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx.xz"
    path.write_bytes(b"not it")
    monkeypatch.setattr(Packaged, "path", path)
    with pytest.raises(ChecksumError, match="is missing or damaged: install leangen again"):
        Store(tmp_path / "home").resolve("fashion-ddpm")


def test_the_package_holds_it_compressed_and_it_is_unpacked_once(store, clothes):
    source = CATALOG["fashion-ddpm"].source
    assert source.path.suffix == ".xz"
    (unpacked,) = (store.home / "sources" / "fashion-ddpm").rglob("*.onnx")
    assert unpacked.stat().st_size > source.size_bytes
    store.collect_garbage()
    assert not unpacked.exists()
