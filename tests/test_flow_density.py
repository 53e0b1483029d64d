"""The density task: seeds, batches, and what counts as rows."""

import pickle

import numpy as np
import pytest
from flow_models import coupling_info, drain, flow_state

from leangen.errors import RequestError
from leangen.exporters import pzflow
from leangen.families import density
from leangen.session import Session

PARTS = [
    ("ShiftBounds", (np.float32([0, 0, 0]), np.float32([1, 2, 3]), 4)),
    *[coupling_info(), ("Roll", (1,))] * 3,
]


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow")
    path = folder / "tiny.pzflow.pkl"
    path.write_bytes(pickle.dumps(flow_state(PARTS, 3)))
    return Session(pzflow.export(path, folder / "bundle"), threads=1)


def run(session, **options):
    return drain(density.run(session, density.Request(**options)))


def test_the_seed_alone_decides_the_samples(session, monkeypatch):
    steps, whole = run(session, count=100, seed=9)
    assert [s.units for s in steps] == [100]
    monkeypatch.setattr(density, "BATCH", 33)
    steps, pieces = run(session, count=100, seed=9)
    assert [s.units for s in steps] == [33, 33, 33, 1]
    np.testing.assert_allclose(whole.array, pieces.array, atol=1e-6)
    assert np.abs(whole.array - run(session, count=100, seed=8)[1].array).max() > 0.1
    assert (whole.media, whole.extra["columns"]) == ("table", ["c0", "c1", "c2"])


def test_scores_do_not_depend_on_batches_or_on_the_file_they_come_from(
    session, tmp_path, monkeypatch
):
    rows = run(session, count=50)[1].array
    steps, output = run(session, data=rows)
    assert output.array.shape == (50,)
    assert output.extra["columns"] == ["log_density"]
    assert sum(s.units for s in steps) == 50
    np.save(tmp_path / "rows.npy", rows)
    header = tmp_path / "header.csv"
    np.savetxt(header, np.c_[rows[:, 2], rows[:, 0], rows[:, 0], rows[:, 1]], delimiter=",",
               header="c2,c0,other,c1", comments="")  # fmt: skip
    bare = tmp_path / "bare.csv"
    np.savetxt(bare, rows, delimiter=",")
    monkeypatch.setattr(density, "BATCH", 20)
    for data in (rows.tolist(), tmp_path / "rows.npy", header, str(bare)):
        np.testing.assert_allclose(run(session, data=data)[1].array, output.array, atol=1e-5)


def test_draws_are_finite_and_follow_the_density(session):
    """The mean of 1 / p over draws from p is the support's volume, here the box of the latent."""
    rows = run(session, count=20_000)[1].array
    log_density = run(session, data=rows)[1].array
    assert np.isfinite(log_density).all()
    volume = np.prod([1, 2, 3]) * (5 / 4) ** 3
    assert np.exp(-log_density).mean() == pytest.approx(volume, rel=0.05)


def test_calibration_requests_exercise_both_graphs(session):
    requests = density.calibration_requests(session)
    assert sorted(r.describe()["mode"] for r in requests) == ["log-density", "sample"]
    for request in requests:
        assert len(drain(density.run(session, request))[1].array) == density.CALIBRATION_ROWS


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "given neither"),
        ({"count": 1, "data": [[1, 2, 3]]}, "given both"),
        ({"count": 0}, "count is 0"),
        ({"count": -5}, "count is -5"),
        ({"count": 2.5}, r"count is 2\.5"),
        ({"count": 1, "seed": -1}, "seed is -1"),
        ({"data": [[1, 2]]}, r"shape \[1, 2\], expected \[rows, 3\] with the columns c0, c1, c2"),
        ({"data": [1, 2, 3]}, r"shape \[3\]"),
        ({"data": np.zeros((0, 3))}, r"shape \[0, 3\]"),
        ({"data": [[1, 2, 3], [4, 5]]}, "not numeric"),
        ({"data": [["a", "b", "c"]]}, "not numeric"),
        ({"data": [[1, 2, 3], [4, np.nan, 6]]}, "1 of 2 rows hold NaN or infinity, row 1 first"),
        ({"data": "rows.txt"}, r"expected a \.npy or \.csv"),
        ({"data": "none.csv"}, r"cannot read none\.csv"),
    ],
)
def test_requests_that_cannot_be_met(session, options, text):
    with pytest.raises(RequestError, match=text):
        run(session, **options)


def test_files_that_are_not_what_their_name_says(session, tmp_path):
    (tmp_path / "a.npy").write_bytes(b"no array")
    np.save(tmp_path / "b.npy", np.array([{}], object), allow_pickle=True)
    (tmp_path / "c.csv").write_bytes(b"\xff\xfe1,2,3\n")
    (tmp_path / "d.csv").write_text('1,2,3\n4,5,"6\n')  # a quote that never ends
    (tmp_path / "e.npy").write_bytes(b"")
    for name in "a.npy", "b.npy", "c.csv", "d.csv", "e.npy":
        with pytest.raises(RequestError, match=f"cannot read .*{name}"):
            run(session, data=tmp_path / name)


def test_temperature_is_the_spread_of_a_normal_latent(tmp_path):
    parts = [("StandardScaler", (np.float32([1, 2]), np.float32([3, 4])))]
    path = tmp_path / "normal.pzflow.pkl"
    path.write_bytes(pickle.dumps(flow_state(parts, 2, latent=("Normal", (2,)))))
    session = Session(pzflow.export(path, tmp_path / "bundle"), threads=1)
    whole, half, none = (
        run(session, count=20, seed=3, temperature=value)[1].array for value in (1.0, 0.5, 0.0)
    )
    np.testing.assert_allclose(half - none, (whole - none) / 2, atol=1e-6)
    np.testing.assert_allclose(none, np.tile([1, 2], (20, 1)), atol=1e-6)


def test_temperature_where_there_is_none(session):
    with pytest.raises(RequestError, match="this flow's latent is uniform, which has none"):
        run(session, count=2, temperature=0.7)
    for temperature in (-1, 1e30):
        with pytest.raises(RequestError, match="temperature is .*, expected 0 to 1000"):
            density.Request(count=2, temperature=temperature)
    with pytest.raises(RequestError, match="temperature is for draws"):
        density.Request(data=[[0.0]], temperature=0.5)
