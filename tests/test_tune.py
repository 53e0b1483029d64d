"""Tuning: the solver against brute force, the recipe bit for bit, budgets kept end to end."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys

import leangen_kernels
import numpy as np
import pytest
import tiny_bundles
from gguf_fixtures import Tiny, write
from hypothesis import given, settings
from hypothesis import strategies as st
from image_models import denoiser, model, value, weights
from onnx import helper, save

from leangen import clock, meters, quality, quantize, recipe, tune
from leangen.cli import main
from leangen.errors import RequestError
from leangen.exporters import gguf, onnx_file
from leangen.meters.meter import Meter, Selection, Tick
from leangen.quality import Task
from leangen.records import Reading
from leangen.session import Session
from leangen.tune import costs, harms, solve
from leangen.tune import settings as run_settings
from leangen.tune.solve import Option

QUIET = lambda *_: None  # noqa: E731

options = st.dictionaries(
    st.sampled_from("abc"),
    st.builds(Option, st.integers(0, 20).map(float), st.integers(0, 20).map(float)),
    min_size=1,
)
tables = st.dictionaries(st.sampled_from("vwxyz"), options, min_size=1, max_size=5)


def brute_force(table, budget):
    found = None
    for chosen in itertools.product(*(each.values() for each in table.values())):
        if sum(option.harm for option in chosen) <= budget:
            cost = sum(option.cost for option in chosen)
            found = cost if found is None else min(found, cost)
    return found


@settings(max_examples=60)
@given(tables, st.integers(0, 60))
def test_the_integer_program_finds_the_least_cost(table, budget):
    pytest.importorskip("scipy")
    best, found = brute_force(table, budget), solve.solve(table, float(budget))
    assert (found is None) == (best is None)
    if found is not None:
        assert found.cost == pytest.approx(best, rel=1e-3)
        assert found.harm <= budget
        assert set(found.choices) == set(table)


@settings(max_examples=200)
@given(tables, st.integers(0, 60))
def test_without_scipy_the_gap_is_true(table, budget):
    best, found = brute_force(table, budget), solve.relaxed(table, float(budget))
    assert (found is None) == (best is None)
    if found is not None:
        assert found.harm <= budget
        assert found.cost * (1 - found.gap) <= best + 1e-6 <= found.cost + 2e-6


def test_the_solver_prints_nothing(capfd):
    """HiGHS does, to standard output, where harms span many orders: that is for one JSON."""
    pytest.importorskip("scipy")
    rng = np.random.default_rng(0)
    table = {}
    for node in range(33):
        harm = 10 ** rng.uniform(-6, -2)
        table[f"n{node}"] = {
            f"t{j}": Option(rng.uniform(1, 10) * 1e-6, harm * 4.0**-j) for j in range(10)
        }
    harms = [[option.harm for option in each.values()] for each in table.values()]
    ends = np.log10(sum(map(min, harms))), np.log10(sum(map(max, harms)))
    assert solve.solve(table, 10 ** rng.uniform(*ends)) is not None
    assert capfd.readouterr().out == ""


def test_scipy_may_be_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    table = {"x": {"a": Option(1, 5), "b": Option(3, 0)}}
    assert solve.solve(table, 4.0).choices == {"x": "b"}
    assert solve.solve(table, 5.0).choices == {"x": "a"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Sensitivities are measured once for all tests."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tune")
    return onnx_file.export(denoiser(folder / "d.onnx"), folder / "bundle")


TASK = Task(seeds=3)


def tuned(bundle, home, limit, kind="rmse", minimize="size"):
    return tune.tune(
        bundle, tune.Budget(kind, limit), minimize=minimize, task=TASK, home=home, progress=QUIET
    )


@pytest.mark.parametrize(("kind", "limit"), [("rmse", 0.03), ("rmse", 0.15), ("psnr", 35.0)])
def test_the_budget_is_kept_end_to_end(bundle, home, tmp_path, kind, limit):
    found = tuned(bundle, home, limit, kind)
    made = quantize.replay(bundle, found.recipe, tmp_path / "made")
    (measures,) = tune.judge_others(bundle, [made], TASK, QUIET)
    loss = tune.Budget(kind, limit).measured(bundle, measures)
    assert loss == found.loss, "what was promised is what the recipe gives"
    assert loss.value >= limit if kind == "psnr" else loss.value <= limit
    assert made.scheme == "tuned"
    assert found.cost_of(made) == pytest.approx(found.solution.cost)


def test_a_looser_budget_is_never_dearer(bundle, home):
    sizes = [tuned(bundle, home, limit).solution.cost for limit in (0.02, 0.06, 0.3)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_replay_is_bit_for_bit(bundle, home, tmp_path):
    tuned(bundle, home, 0.05).recipe.save(tmp_path / "r.json")
    first, second = (
        quantize.replay(bundle, recipe.read(tmp_path / "r.json"), tmp_path / name)
        for name in ("a", "b")
    )
    assert first.digest == second.digest
    assert {e["treatment"] for e in first.quantization["nodes"].values()} - {"fp32"}


def test_sensitivities_are_measured_once(bundle, tmp_path, monkeypatch):
    home = tmp_path
    first = harms.measure(bundle, quantize.Calibration(bundle), home, QUIET)
    monkeypatch.setattr(harms, "Probe", None)
    assert harms.measure(bundle, quantize.Calibration(bundle), home, QUIET) == first
    assert set(first) >= {"/mid", "/deep", "/up"}
    assert first["/deep"]["w4"] > first["/deep"]["w8"] > first["/deep"]["w16"] >= 0
    (kept,) = (home / "tune").iterdir()
    kept.write_text("damaged")
    with pytest.raises(TypeError):
        harms.measure(
            bundle, quantize.Calibration(bundle), home, QUIET
        )  # measures again: the Probe is gone


def test_harms_are_what_each_node_does_alone(bundle, home, tmp_path):
    """Against the graph written with that one node treated."""
    from leangen import calibrate

    found = harms.measure(bundle, quantize.Calibration(bundle), home, QUIET)
    one = recipe.NodeRecipe(bundle.name, bundle.digest, {"/deep": "w4"})
    made = quantize.replay(bundle, one, tmp_path / "one")
    (inputs,) = quantize.Calibration(bundle).feeds.values()
    sessions = [calibrate.open_session(b.graph("model")) for b in (made, bundle)]
    error = calibrate.relative_error(*(s.run(None, dict(inputs[0])) for s in sessions))
    assert found["/deep"]["w4"] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_of_its_own_has_a_choice(tmp_path, tied, monkeypatch):
    """One that is the output head as well does not: 8 bits serve both."""
    monkeypatch.setattr(harms, "MOST_TOKENS", 2 * harms.LEAST_TOKENS)
    bundle = gguf.export(write(tmp_path / "t.gguf", Tiny(tied=tied)), tmp_path / "bundle")
    found = harms.measure(bundle, quantize.Calibration(bundle, "gptq"), tmp_path, QUIET)
    (embedding,) = [each for name, each in found.items() if "embed" in name]
    if tied:
        assert set(embedding) == {"gather8"}
    else:
        assert embedding["gather4"] > embedding["gather8"] > embedding["gather16"] >= 0


def test_size_is_what_is_stored(bundle, home):
    found = harms.measure(bundle, quantize.Calibration(bundle), home, QUIET)
    inputs = quantize.Calibration(bundle)
    bytes_of = costs.measure(bundle, inputs, found, costs.objective("size"), QUIET)
    assert bytes_of["/deep"]["fp32"] == 32 * 32 * 9 * 4
    assert bytes_of["/deep"]["w4"] < bytes_of["/deep"]["w8"] < bytes_of["/deep"]["w16"]


def test_time_is_of_the_node_alone_as_it_will_run(bundle, home, monkeypatch):
    monkeypatch.setattr(costs, "BUDGET_S", 0.0)
    found = harms.measure(bundle, quantize.Calibration(bundle), home, QUIET)
    seconds = costs.measure(
        bundle, quantize.Calibration(bundle), found, costs.objective("latency"), QUIET
    )
    assert all(0 <= value < 1 for each in seconds.values() for value in each.values())
    assert seconds["/deep"]["w16"] == seconds["/deep"]["fp32"], "unpacked while loading"
    assert seconds["/deep"]["w8a8"] != seconds["/deep"]["fp32"]
    on_kernels = seconds["/deep"]["w8"] != seconds["/deep"]["fp32"]
    assert on_kernels == (leangen_kernels.library() is not None)


def test_a_language_model_is_timed_as_a_whole(tmp_path, monkeypatch):
    """A node has its weights' share of a token: alike everywhere, they add up to it."""
    bundle = tiny_bundles.language(tmp_path)
    calibration = quantize.Calibration(bundle)
    _, sites, _ = calibration.prepared("model")
    names = [site.node.name for site in sites if site.kind != "embedding"]
    offered = {name: {"matmul8": 0.0, "matmul4": 0.0} for name in names}
    seen = []

    def token(alike, aim, threads):
        nodes = alike.quantization.get("nodes", {}).values()
        (treatment,) = {e["treatment"] for e in nodes} - {"fp32"} or {"fp32"}
        seen.append(treatment)
        return {"fp32": 4.0, "matmul8": 2.0, "matmul4": 1.0}[treatment]

    monkeypatch.setattr(costs, "_token", token)
    found = costs.measure(bundle, calibration, offered, costs.objective("latency"), QUIET)
    assert sorted(seen) == ["fp32", "matmul4", "matmul8"]
    for treatment, whole in (("fp32", 4.0), ("matmul8", 2.0), ("matmul4", 1.0)):
        assert sum(found[name][treatment] for name in names) == pytest.approx(whole)
    largest = max((s for s in sites if s.node.name in names), key=lambda site: site.weights)
    assert found[largest.node.name]["fp32"] == max(each["fp32"] for each in found.values())
    monkeypatch.undo()
    monkeypatch.setattr(costs, "WHOLE_S", 0.0)
    seconds = costs.measure(bundle, calibration, offered, costs.objective("latency"), QUIET)
    assert all(s > 0 for name in names for s in seconds[name].values())


def test_energy_without_a_counter_is_time_and_says_so():
    aim = costs.objective("energy")
    assert (aim.name == "time") == (aim.selection is None)
    if aim.selection is None:
        assert "no counter can be read here" in aim.reason
    with pytest.raises(RequestError, match="expected size, latency or energy"):
        costs.objective("beauty")


def test_energy_is_that_of_a_counter(bundle, home, monkeypatch):
    """A counter of 50 W, and nodes of which a run takes 2 ms: 0.1 J."""
    now_ns = [10**9]

    def passes(ns):
        now_ns[0] += ns
        return now_ns[0]

    monkeypatch.setattr(clock, "monotonic_ns", lambda: passes(1000))
    monkeypatch.setattr(clock, "boottime_ns", lambda: now_ns[0])
    open_session = costs.calibrate.open_session

    class Timed:
        def __init__(self, *of):
            self.session = open_session(*of)

        def run(self, *of):
            passes(2_000_000)
            return self.session.run(*of)

    monkeypatch.setattr(costs.calibrate, "open_session", Timed)
    counter = Meter(
        name="sim:package-0", source="measured", scope="package-0", in_total=True, unit="uJ",
        tick=Tick(1e-3, "given"), u_systematic=0.01, max_power_w=1e9, wraps_at=None, coverage=1.0,
        read=lambda: Reading(now_ns[0] // 1_000_000 * 50_000, "uJ", now_ns[0]),
    )  # fmt: skip
    monkeypatch.setattr(meters, "select", lambda **_: Selection(meters=(counter,), reason=None))
    aim = costs.objective("energy", "sim")
    assert (aim.name, aim.unit) == ("energy", "J")
    names = ("/deep", "/mid")
    inputs = quantize.Calibration(bundle)
    joules = costs.measure(bundle, inputs, {name: {} for name in names}, aim, QUIET)
    for name in names:
        assert joules[name]["fp32"] == pytest.approx(50 * 0.002, rel=0.05)


def test_an_impossible_budget_says_the_best_reachable(bundle, home):
    with pytest.raises(RequestError, match=r"no treatment .* relative RMSE \d"):
        tuned(bundle, home, 1e-9)
    with pytest.raises(RequestError, match=r"no treatment .*min-psnr 400.* PSNR \d+"):
        tuned(bundle, home, 400.0, "psnr")


@pytest.mark.parametrize(
    ("kind", "limit", "message"),
    [("kl", 0.1, "expected --max-rmse"), ("rmse", 0.0, "above 0"), ("rmse", np.nan, "above 0")],
)
def test_bad_budgets(bundle, kind, limit, message):
    with pytest.raises(RequestError, match=message):
        tune.Budget(kind, limit).check(bundle)


def test_a_recipe_for_another_model_is_refused(bundle, tmp_path, capsys):
    other = recipe.NodeRecipe("other", "sha256:" + "0" * 64, {"/deep": "w4"})
    other.save(tmp_path / "r.json")
    out = tmp_path / "out"
    command = ["quantize", str(bundle.path), "--recipe", str(tmp_path / "r.json"), "-o", str(out)]
    assert main(command) == 2
    assert "the recipe is for other" in capsys.readouterr().err
    for nodes, message in (
        ({"/deep": "w99"}, "does not fit it"),
        ({"/deep": "gather8"}, "does not fit it"),
        ({"/nowhere": "w4"}, "no node '/nowhere'"),
    ):
        recipe.NodeRecipe(bundle.name, bundle.digest, nodes).save(tmp_path / "r.json")
        assert main(command) == 2
        assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read"),
        ("{", "is not a recipe"),
        ("[]", "expected model, source and nodes"),
        ('{"schema": "leangen.recipe/9"}', "this leangen reads 'leangen.recipe/1'"),
        ('{"model": "m", "source": "s", "nodes": {"a": 4}}', "expected model, source and nodes"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, text, message):
    path = tmp_path / "r.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RequestError, match=message):
        recipe.read(path)


def test_the_command(bundle, tmp_path, capsys):
    out, folder = tmp_path / "r.json", tmp_path / "tuned"
    command = ["tune", str(bundle.path), "--max-rmse", "0.1", "--minimize", "size", "--seeds", "2"]
    command += ["-o", str(out)]
    assert main([*command, "--bundle", str(folder)]) == 0
    printed = capsys.readouterr()
    assert "end-to-end checks" in printed.out
    assert "tuned" in printed.out
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    assert main([*command, "--json", "--force"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["found"]["loss"]["value"] <= 0.1
    again = ["quantize", str(bundle.path), "--recipe", str(out), "-o", str(tmp_path / "again")]
    assert main(again) == 0
    files = [sorted(p.name for p in place.iterdir()) for place in (folder, tmp_path / "again")]
    assert files[0] == files[1]
    for name in files[0]:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert main(["tune", str(folder), "--max-rmse", "0.1", "-o", str(tmp_path / "x.json")]) == 2
    assert "expected the fp32 bundle" in capsys.readouterr().err


def test_fewer_steps_threads_and_spinning_are_looked_for(tmp_path, home):
    bundle = onnx_file.export(denoiser(tmp_path / "d.onnx"), tmp_path / "bundle")
    many = dataclasses.replace(bundle, config={**bundle.config, "steps": 8})
    reference = Session(many)
    observed = quality.observe(reference, None, TASK)

    def loss(steps):
        seen = quality.observe(reference, observed, dataclasses.replace(TASK, steps=steps))
        return quality.measure(many, observed, seen)[0].value

    limit = loss(5) * 1.01
    found = run_settings.fewest_steps(
        reference, TASK, observed, lambda m, share: m[0].value <= limit, QUIET
    )
    assert loss(found) <= limit
    assert found == 1 or loss(found - 1) > limit
    assert run_settings.fewest_steps(Session(bundle), TASK, observed, None, QUIET) is None

    told = recipe.NodeRecipe("d", "x", {}, run={"threads": 1, "spin_us": 0, "steps": found})
    assert told.config() == {"run": {"threads": 1, "spin_us": 0}, "steps": found}
    told.save(tmp_path / "r.json")
    assert recipe.read(tmp_path / "r.json") == told
    aim = costs.objective("latency")
    best = run_settings.best_run(bundle, aim, QUIET)
    assert best["threads"] >= 1 and best["spin_us"] in run_settings.SPINS_US
    tuned_here = dataclasses.replace(bundle, config={**bundle.config, "run": best | {"threads": 1}})
    assert Session(tuned_here).threads == 1
    assert "leangen tune" in Session(tuned_here).reasons["threads"]
    assert Session(tuned_here, threads=2).threads == 2


def tower(path, blocks=10):
    """A denoiser of residual blocks, each of less weight than the one before."""
    rng = np.random.default_rng(0)
    constants = {"w_in": weights(rng, 32, 1, 3, 3), "w_out": weights(rng, 1, 32, 3, 3)}
    nodes = [
        helper.make_node("Div", ["noisy", "level"], ["x"]),
        helper.make_node("Conv", ["x", "w_in"], ["h0"], "/in", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", [f"h{blocks}", "w_out"], ["denoised"], "/out", pads=[1, 1, 1, 1]),
        helper.make_node("Unsqueeze", ["sigma", "axes"], ["level"]),
    ]
    constants["axes"] = np.array([1, 2, 3])
    for n in range(blocks):
        constants[f"w{n}"] = weights(rng, 32, 32, 3, 3) * 0.8**n
        nodes += [
            helper.make_node("Conv", [f"h{n}", f"w{n}"], [f"c{n}"], f"/b{n}", pads=[1, 1, 1, 1]),
            helper.make_node("Relu", [f"c{n}"], [f"r{n}"]),
            helper.make_node("Add", [f"h{n}", f"r{n}"], [f"h{n + 1}"]),
        ]
    nodes = [nodes[3], nodes[0], nodes[1], *nodes[4:], nodes[2]]
    inputs = [value("noisy", ["b", 1, 16, 16]), value("sigma", ["b"])]
    save(model(nodes, inputs, [value("denoised", ["b", 1, 16, 16])], constants), path)
    return path


def test_tuning_beats_every_uniform_scheme(home, tmp_path):
    """At the geometric mean of int8's and int4's loss: 15% smaller than what meets it."""
    bundle = onnx_file.export(tower(tmp_path / "t.onnx"), tmp_path / "bundle")
    made = [quantize.quantize(bundle, scheme, tmp_path / scheme) for scheme in ("int8", "int4")]
    losses = [measures[0].value for measures in tune.judge_others(bundle, made, TASK, QUIET)]
    limit = float(np.sqrt(np.prod(losses)))
    found = tuned(bundle, home, limit)
    meeting = [
        found.cost_of(each) for each, loss in zip(made, losses, strict=True) if loss <= limit
    ]
    assert found.solution.cost < 0.85 * min(meeting)
