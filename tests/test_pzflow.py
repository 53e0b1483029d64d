"""The pzflow exporter: what it reads, what it refuses, and that its graphs are the flow."""

import pickle
from collections import OrderedDict

import numpy as np
import onnx
import pytest
from flow_models import coupling_info, drain, flow_state
from flow_reference import log_prob
from real_models import source

from leangen import families
from leangen.errors import SourceError, StorageError, UnsupportedError
from leangen.exporters import pzflow, restricted_pickle
from leangen.families import density
from leangen.session import Session

LOW, HIGH = np.float32([-1, 0, 10, 3, -7]), np.float32([1, 2, 30, 4, 8])


def bounds(dim, bound=4):
    return ("ShiftBounds", (LOW[:dim], HIGH[:dim], bound))


FLOWS = {
    "rolling": ([bounds(5), *[coupling_info(), ("Roll", (1,))] * 3], 5, None),
    "two columns": ([bounds(2), *[coupling_info(bins=4), ("Reverse", ())] * 2], 2, None),
    "normal latent": (
        [
            ("StandardScaler", (np.float32([1, 2, 3]), np.float32([0.5, 2, 4]))),
            ("Scale", (0.5,)),
            *[coupling_info(transformed=1), ("Roll", (-1,))] * 3,
        ],
        3,
        ("Normal", (3,)),
    ),
    "nested": ([bounds(4), ("Roll", (2,)), coupling_info(bound=3), ("Roll", (3,))], 4, None),
}


def save(state, folder, name="tiny.pzflow.pkl"):
    path = folder / name
    with path.open("wb") as file:
        pickle.dump(state, file)
    return path


def export(state, folder):
    return Session(pzflow.export(save(state, folder), folder / "bundle"), threads=1)


def draws(session, count=300, seed=1):
    return drain(density.run(session, density.Request(count=count, seed=seed)))[1].array


@pytest.mark.parametrize("name", FLOWS)
def test_log_density_is_that_of_the_formulas(name, tmp_path):
    parts, dim, latent = FLOWS[name]
    state = flow_state(parts, dim, latent=latent)
    session = export(state, tmp_path)
    x = draws(session)
    (log_density,) = session.run("log_prob", {"x": x}, ["log_prob"])
    np.testing.assert_allclose(log_density, log_prob(state, x), atol=2e-4)


@pytest.mark.parametrize("name", FLOWS)
def test_the_two_graphs_are_inverse(name, tmp_path):
    parts, dim, latent = FLOWS[name]
    session = export(flow_state(parts, dim, latent=latent), tmp_path)
    u = np.random.default_rng(0).uniform(-4.9, 4.9, (400, dim))
    (x,) = session.run("sample", {"latent": u})
    log_density, back = session.run("log_prob", {"x": x})
    np.testing.assert_allclose(back, u, atol=1e-7)
    assert np.isfinite(log_density).all()


def test_density_integrates_to_one(tmp_path):
    state = flow_state([bounds(2, 5), coupling_info(bins=4), ("Reverse", ()), coupling_info()], 2)
    session = export(state, tmp_path)
    axes = [
        np.linspace(low, high, 400)
        for low, high in zip(LOW[:2].tolist(), HIGH[:2].tolist(), strict=True)
    ]
    grid = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)
    (log_density,) = session.run("log_prob", {"x": grid}, ["log_prob"])
    cell = np.prod([axis[1] - axis[0] for axis in axes])
    assert np.exp(log_density).sum() * cell == pytest.approx(1, abs=0.02)


def test_edges_of_the_support(tmp_path):
    parts, dim, _ = FLOWS["rolling"]
    session = export(flow_state(parts, dim), tmp_path)
    corners = np.array([[-5.0] * 5, [5.0] * 5, [np.nextafter(5, 0)] * 5, [0, -5, 5, 0, -5]])
    (x,) = session.run("sample", {"latent": corners})
    assert np.isfinite(x).all()
    far = np.array([HIGH * 100, LOW - 1e6], np.float64)
    (log_density,) = session.run("log_prob", {"x": far}, ["log_prob"])
    assert (log_density == -np.inf).all()


def test_conditioners_can_be_quantized(tmp_path):
    """MatMul + Add with float32 [K, N] constants, the same names and weights in both graphs."""
    parts, dim, _ = FLOWS["rolling"]
    bundle = export(flow_state(parts, dim), tmp_path).bundle
    dense = []
    for role in ("log_prob", "sample"):
        graph = onnx.load(bundle.graph(role)).graph
        constants = {c.name: onnx.numpy_helper.to_array(c) for c in graph.initializer}
        dense.append(
            {
                n.name: constants[n.input[1]]
                for n in graph.node
                if n.op_type == "MatMul" and "/dense." in n.name
            }
        )
    expected = {f"/coupling.{c}/dense.{d}/MatMul" for c in range(3) for d in range(3)}
    assert set(dense[0]) == set(dense[1]) == expected
    for name in expected:
        assert dense[0][name].dtype == np.float32
        np.testing.assert_array_equal(dense[0][name], dense[1][name])


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (self.target, "w")


def test_a_malicious_pickle_runs_nothing(tmp_path):
    target = tmp_path / "written-by-the-pickle"
    path = save({"class": Evil(str(target))}, tmp_path)
    with pytest.raises(SourceError, match=r"_?io\.open.*refused, nothing was run"):
        pzflow.export(path, tmp_path / "bundle")
    assert not target.exists()
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("value", [OrderedDict(), np.float64(1), range(3), Evil("x").__class__])
def test_globals_outside_the_list_are_refused(value, tmp_path):
    with pytest.raises(SourceError, match="closed list"):
        restricted_pickle.read(save([value], tmp_path))


def test_a_dotted_name_is_no_way_in(tmp_path):
    path = tmp_path / "dotted.pkl"
    path.write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.")
    with pytest.raises(SourceError, match=r"numpy\.ndarray\.tofile"):
        restricted_pickle.read(path)


def test_plain_values_and_arrays_are_read_back(tmp_path):
    value = {"a": [1, 2.5, None, ("x", b"y")], "w": np.arange(6, dtype=np.float32).reshape(2, 3)}
    read = restricted_pickle.read(save(value, tmp_path))
    assert read["a"] == value["a"]
    np.testing.assert_array_equal(read["w"], value["w"])


@pytest.mark.parametrize("keep", [0, 1, 40, -200])
def test_truncated_files_are_named(keep, tmp_path):
    parts, dim, _ = FLOWS["two columns"]
    path = save(flow_state(parts, dim), tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SourceError, match="truncated"):
        pzflow.export(path, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == [path]


def test_text_and_missing_files_are_source_errors(tmp_path):
    path = tmp_path / "text.pzflow.pkl"
    path.write_text("hello, this is no pickle")
    with pytest.raises(SourceError, match="not a readable pickle"):
        pzflow.export(path, tmp_path / "bundle")
    with pytest.raises(SourceError, match="cannot read"):
        pzflow.export(tmp_path / "none.pzflow.pkl", tmp_path / "bundle")


def broken(**changes):
    parts, dim, _ = FLOWS["two columns"]
    return {**flow_state(parts, dim), **changes}


@pytest.mark.parametrize(
    ("state", "error", "text"),
    [
        ([1, 2], SourceError, "holds list, not a pzflow flow"),
        ({"a": 1}, SourceError, "not a pzflow flow"),
        (broken(params=((), [])), SourceError, "not a complete pzflow flow"),
        (broken(params=None), SourceError, "not a complete pzflow flow"),
        (broken(data_columns=None), SourceError, "not a complete pzflow flow"),
        (broken(conditional_columns=("z",)), UnsupportedError, "conditional"),
        (broken(latent_info=("CentBeta13", (2, 5))), UnsupportedError, "CentBeta13"),
        (broken(bijector_info=("Shuffle", ())), UnsupportedError, "bijector Shuffle"),
        (broken(bijector_info=("NeuralSplineCoupling", (4, 5, 2, 16, None, 0, True))),
         UnsupportedError, "periodic True"),
    ],
)  # fmt: skip
def test_states_that_cannot_be_exported(state, error, text, tmp_path):
    with pytest.raises(error, match=text):
        pzflow.export(save(state, tmp_path), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_damaged_weights(tmp_path):
    parts, dim, _ = FLOWS["two columns"]
    state = flow_state(parts, dim)
    weight, bias = state["params"][1][1][0]
    for layer, text in [((weight.T, bias), "dense layer"), ((weight * np.nan, bias), "not finite")]:
        state["params"][1][1][0] = layer
        with pytest.raises(SourceError, match=text):
            pzflow.export(save(state, tmp_path), tmp_path / "bundle")


def test_the_bundle_says_what_it_is(tmp_path):
    parts, dim, _ = FLOWS["rolling"]
    path = save(flow_state(parts, dim), tmp_path)
    assert pzflow.accepts(path)
    assert not pzflow.accepts(tmp_path / "other.pkl")
    bundle = pzflow.export(path, tmp_path / "bundle", source={"package": "p"})
    assert (bundle.name, bundle.family, bundle.scheme) == ("tiny", "flow", "fp32")
    assert bundle.config["columns"] == ["c0", "c1", "c2", "c3", "c4"]
    assert bundle.source["package"] == "p"
    assert families.of(bundle).UNIT == "sample"
    with pytest.raises(StorageError, match="exists already"):
        pzflow.export(path, tmp_path / "bundle")
    assert pzflow.export(path, tmp_path / "bundle", replace=True).digest != ""


class Frame:
    """Stands in for every pandas class of a pickled table."""

    def __new__(cls, *arguments, **options):
        return object.__new__(cls)

    def __init__(self, *arguments, **options):
        pass

    def __setstate__(self, state):
        self.state = state


def galaxies():
    """The 100,000 x 7 rows that the flow was trained on."""
    stand_ins = {
        ("pandas.core.frame", "DataFrame"): Frame,
        ("pandas.core.internals.managers", "BlockManager"): Frame,
        ("pandas.core.indexes.base", "Index"): Frame,
        ("pandas.core.indexes.range", "RangeIndex"): Frame,
        ("pandas.core.indexes.base", "_new_Index"): Frame,
        ("builtins", "slice"): slice,
    }
    path = source("galaxy-data")
    state = restricted_pickle.read(path, stand_ins).state
    manager = next(v for v in state.values() if isinstance(v, Frame))
    return manager.state[-1]["0.14.1"]["blocks"][0]["values"].T


@pytest.mark.slow
def test_galaxy_flow(tmp_path):
    path = source("galaxy-flow")
    session = Session(pzflow.export(path, tmp_path / "bundle"))
    state = restricted_pickle.read(path, pzflow.STAND_INS)
    x = galaxies()
    _, output = drain(density.run(session, density.Request(data=x)))
    reference = log_prob(state, x)
    assert np.abs(output.array - reference).max() < 1e-3
    assert output.array.mean() == pytest.approx(5.72, abs=0.01)
    _, output = drain(density.run(session, density.Request(data=draws(session, 10_000))))
    assert np.isfinite(output.array).all()
