"""The flows of leangen-zoo: exact, finite, invertible, and worth looking at."""

from pathlib import Path

import numpy as np
import pytest

from leangen import verification
from leangen.catalog import CATALOG, flows
from leangen.engine import Engine
from leangen.families import density
from leangen.quality import density as quality
from leangen.session import Session
from leangen.store import Store

IMAGES = [entry.name for entry in flows.ENTRIES if entry.name.startswith("fashion-")]
TABLES = [entry.name for entry in flows.ENTRIES if entry.name.startswith("galaxy-")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A bundle by name, from the checkout's leangen-zoo."""
    store = Store(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "bench" / "zoo")
        yield store.resolve


@pytest.mark.parametrize("name", [*IMAGES, *TABLES])
def test_both_directions_are_what_torch_computed_in_float64(bundle, name):
    *_, backward, forward = verification.verify(bundle(name))
    for line, role in ((backward, "log_prob"), (forward, "sample")):
        assert line.startswith(f"graph {role}: ")
        assert float(line.split(": ")[1].split()[0]) < 2e-5


@pytest.mark.parametrize("name", [*IMAGES, *TABLES])
def test_draws_are_finite_and_their_densities_are_their_own(bundle, name):
    engine = Engine(Session(bundle(name), threads=1), baseline_s=0)
    count = 100 if name in IMAGES else 2000
    drawn = engine.generate(count=count, seed=5).array
    assert np.isfinite(drawn).all() and len(drawn) == count
    assert np.array_equal(drawn[:8], engine.generate(count=8, seed=5).array) or np.allclose(
        drawn[:8], engine.generate(count=8, seed=5).array, atol=1e-4
    )
    scored = engine.generate(data=drawn).array
    assert np.isfinite(scored).all()
    shuffled = np.roll(density.as_rows(drawn), 1, axis=1)
    elsewhere = engine.generate(data=shuffled).array
    assert np.mean(scored[..., 0] if scored.ndim > 1 else scored) > np.mean(
        elsewhere[..., 0] if elsewhere.ndim > 1 else elsewhere
    )


@pytest.mark.parametrize("name", IMAGES)
def test_draws_look_like_clothes(bundle, name):
    """Dark at the corners, lit in the middle, and no two alike."""
    drawn = Engine(Session(bundle(name), threads=1), baseline_s=0).generate(count=64).array
    assert drawn.shape == (64, 28, 28, 1) and drawn.min() >= 0 and drawn.max() <= 1
    corners = drawn[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.mean() < 0.1 < drawn[:, 10:18, 10:18].mean()
    assert drawn.std(axis=0)[10:18, 10:18].mean() > 0.1


def test_a_flow_of_pictures_is_judged_in_bits_of_their_levels(bundle):
    session = Session(bundle(IMAGES[0]), threads=1)
    task = quality.Task(rows=64)
    seen = quality.observe(session, task, None)
    named = {measure.name: measure.value for measure in quality.measure(seen, seen)}
    assert 2 < named["bits per dimension"] < 5


def test_cards_tell_what_the_models_are():
    import json

    for name in (*IMAGES, *TABLES):
        path = Path(__file__).parents[1] / "bench" / "train" / "cards" / f"{name}.json"
        card = json.loads(path.read_text(encoding="utf-8"))
        assert card["name"] == name and card["draws_float32"]["finite"] == 10_000
        assert card["packed_bytes"] == CATALOG[name].source.size_bytes
