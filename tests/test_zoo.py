"""The models that come with leangen: unpacked, exported, quantized, and worth looking at."""

from pathlib import Path

import numpy as np
import pytest

import leangen
from leangen import verification
from leangen.catalog import CATALOG, Packaged
from leangen.engine import Engine
from leangen.errors import ChecksumError, DependencyError, RequestError
from leangen.families import diffusion
from leangen.session import Session
from leangen.store import Store

ZOO = [name for name, entry in CATALOG.items() if isinstance(entry.source, Packaged)]
SECOND = [name for name in ZOO if CATALOG[name].source.distribution == "leangen-zoo"]
DENOISERS = [name for name in ZOO if CATALOG[name].family == "diffusion"]


@pytest.fixture(autouse=True)
def zoo(monkeypatch):
    """The second distribution as if it were installed."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench" / "zoo")


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


@pytest.mark.parametrize("name", DENOISERS)
def test_every_denoiser_draws_what_differs_by_seed_alone(name, store):
    engine = Engine(Session(store.resolve(name), threads=1), baseline_s=0)
    asked = diffusion.trial(engine.session, 0)
    options = {"steps": 2, "image": asked.image, "conditions": asked.conditions}
    first, again, other = (engine.generate(seed=seed, **options).array for seed in (1, 1, 2))
    assert np.isfinite(first).all() and np.array_equal(first, again)
    assert not np.allclose(first, other)


@pytest.mark.parametrize("name", SECOND)
def test_without_the_second_distribution_it_is_said_how_to_get_it(name, tmp_path, monkeypatch):
    monkeypatch.undo()
    if CATALOG[name].source.path is not None:
        pytest.skip("leangen-zoo is installed")
    with pytest.raises(DependencyError, match=f"{name} comes with leangen-zoo, .*pip install"):
        Store(tmp_path).resolve(name)


def test_a_generator_is_told_the_label(store):
    engine = Engine(Session(store.resolve("fashion-gan"), threads=1), baseline_s=0)
    trousers, bags = (engine.generate(count=8, conditions={"label": y}).array for y in (1, 8))
    wide = [(images > -0.5).any(axis=1).sum(axis=(1, 2)).mean() for images in (trousers, bags)]
    assert wide[0] < wide[1] and np.abs(bags).max() < 1.001


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


def test_a_cascade_enlarges_what_its_first_part_drew(monkeypatch, store):
    monkeypatch.setenv("LEANGEN_HOME", str(store.home))
    result = leangen.load("cascade", ledger=False).generate(label="trouser", seed=2, count=2)
    small, large = result.parts["small"].array, result.array
    assert small.shape == (2, 14, 14, 1) and large.shape == (2, 28, 28, 1)
    shrunk = large.reshape(2, 14, 2, 14, 2).mean(axis=(2, 4))
    assert np.abs(shrunk - small[..., 0]).mean() < 0.15 < np.abs(shrunk + 1).mean()
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
