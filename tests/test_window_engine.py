"""The engine's use of windows: looks on the way, repeats in one window, what a bench plans."""

from __future__ import annotations

import json

import pytest
import tiny_bundles

from leangen import benchmark, clock, meters
from leangen.cli import main
from leangen.engine import Engine
from leangen.errors import RequestError
from leangen.meters.meter import Selection, Tick
from leangen.records import Reading
from leangen.session import Session

OPTIONS = {"tokens": [3, 4, 5], "max_new_tokens": 6, "ignore_eos": True}
TICK_S, POWER_W = 20e-6, 10.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundles.language(tmp_path_factory.mktemp("language"))


def counter(scope="package-0"):
    """10 W on the machine's own clock, in ticks of 20 us."""

    def read():
        t_ns = clock.monotonic_ns()
        return Reading(int(t_ns / 1e9 // TICK_S * TICK_S * POWER_W * 1e6), "uJ", t_ns)

    return meters.Meter(
        name=f"sim:{scope}",
        source="measured",
        scope=scope,
        in_total=True,
        unit="uJ",
        tick=Tick(TICK_S, "given"),
        u_systematic=0.05,
        max_power_w=1000.0,
        wraps_at=None,
        coverage=1.0,
        read=read,
    )


@pytest.fixture
def engine(bundle):
    return Engine(Session(bundle, threads=1), baseline_s=0.02)


def measured(engine, scope="package-0"):
    engine.selection = Selection(meters=(counter(scope),), reason=None)
    return engine


def test_a_measured_generation_adds_up_and_names_its_terms(engine):
    receipt = measured(engine).generate(**OPTIONS).receipt
    energy = receipt.energy
    assert energy.source == "measured"
    assert energy.gross_j == pytest.approx(POWER_W * receipt.duration_ns / 1e9, rel=0.2)
    assert sum(step.energy_uj for step in energy.steps) == energy.gross_uj
    assert energy.gross_uj == energy.idle_uj + energy.marginal_uj
    assert energy.baseline["power_w"] == pytest.approx(POWER_W, rel=0.05)
    assert energy.baseline["u_random_w"] > 0
    assert set(energy.meters[0].terms) >= {"edges", "lag", "jitter", "coverage", "class"}
    assert energy.attribution is None or 0 <= energy.attribution["share"] <= 1
    json.dumps(receipt.to_json(), allow_nan=False)


def test_a_gpus_energy_is_not_shared_by_cpu_time(engine):
    assert measured(engine, "gpu-0").generate(**OPTIONS).receipt.energy.attribution is None


def test_an_estimate_of_the_process_is_not_shared_either(engine):
    assert engine.generate(**OPTIONS).receipt.energy.attribution is None


def test_repeats_in_one_window_are_one_receipt_over_all(engine):
    once = measured(engine).generate(**OPTIONS).receipt
    result = engine.repeat(4, **OPTIONS)
    receipt = result.receipt
    assert receipt.units.count == 4 * once.units.count
    assert receipt.units.prompt == 4 * once.units.prompt
    assert receipt.request["repeats"] == 4
    assert "repeats" not in once.request
    assert receipt.latency.total_s == pytest.approx(receipt.duration_ns / 4e9)
    assert receipt.energy.per_unit_j == pytest.approx(receipt.energy.gross_j / receipt.units.count)
    assert sum(step.energy_uj for step in receipt.energy.steps) == receipt.energy.gross_uj
    assert len(result.tokens) == once.units.count
    with pytest.raises(RequestError, match="expected 1 or more"):
        engine.repeat(0, **OPTIONS)


def test_the_idle_time_is_long_enough_for_a_slow_sensor(engine):
    slow = measured(engine).selection.meters[0]
    engine.selection = Selection(
        meters=(meters.Meter(**_fields(slow) | {"tick": Tick(0.005, "slow")}),), reason=None
    )
    assert engine.baseline().duration_s == pytest.approx(0.1)


def _fields(meter):
    return {name: getattr(meter, name) for name in meters.Meter.__dataclass_fields__}


def test_a_bench_plans_as_many_repeats_as_the_tick_takes(engine):
    receipt = measured(engine).generate(**OPTIONS).receipt
    plan = benchmark.plan(receipt, 0.05)
    assert plan["tick_s"] == TICK_S
    assert plan["repeats_per_window"] == meters.plan_repeats(receipt.latency.total_s, TICK_S, 0.05)
    assert plan["edges_relative_u"] <= 0.05
    assert plan["class_relative_u"] == pytest.approx(0.05)
    assert "in one window" in benchmark.told("m", plan)


def test_bench_shows_its_plan(bundle, capsys):
    command = ["bench", str(bundle.path), "--repeats", "2", "--max-new-tokens", "4"]
    assert main([*command, "--prompt", "a", "--precision", "1%", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["rows"]
    assert row["plan"]["wanted_relative_u"] == 0.01
    assert row["plan"]["repeats_per_window"] >= 1
    assert main([*command, "--prompt", "a"]) == 0
    assert "in one window" in capsys.readouterr().err
    assert main([*command, "--precision", "0"]) == 2
    assert "precision is 0" in capsys.readouterr().err
