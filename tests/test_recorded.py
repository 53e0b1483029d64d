"""Recorded plans: they name real treatments, and give the bytes that measuring gave."""

import json
from importlib.resources import files

import pytest
import test_quantize_laws as laws

from leangen import recorded
from leangen.precision import parse
from leangen.quantize import quantize
from leangen.treatments import read


def test_the_file_names_real_precisions_and_treatments():
    plans = json.loads(files("leangen").joinpath(recorded.PLANS).read_text(encoding="utf-8"))
    assert plans
    for by_precision in plans.values():
        for precision, treatments in by_precision.items():
            assert str(parse(precision)) == precision
            assert all(name == "fp32" or read(name) for name in treatments)
            nodes = [node for group in treatments.values() for node in group]
            assert len(nodes) == len(set(nodes)) > 0


def test_a_model_that_is_not_recorded_is_measured(tmp_path):
    assert recorded.plan(laws.diffusion(tmp_path), parse("int4")) is None


@pytest.mark.parametrize("family", ["diffusion", "flow/speech"])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_recorded_plan_gives_what_measuring_gave(family, scheme, tmp_path, monkeypatch):
    exact = laws.BUILDERS[family](tmp_path / "exact")
    low = quantize(exact, scheme, tmp_path / "measured")
    nodes = low.quantization["nodes"]
    plan = {node: entry["treatment"] for node, entry in nodes.items()}
    monkeypatch.setattr(recorded, "plan", lambda bundle, precision: plan)
    again = quantize(exact, scheme, tmp_path / "again")
    # The graph's small constants may be numbered otherwise; weights and outputs are the same.
    assert all(again.files[name] == low.files[name] for name in low.files if ".data" in name)
    for key in ("bits_per_weight", "calibration"):
        assert again.quantization[key] == low.quantization[key]
    for node, entry in again.quantization["nodes"].items():
        assert entry["treatment"] == plan[node]
        assert "recorded" in entry["reason"] or plan[node] == "fp32"


def test_another_weight_is_another_model(tmp_path):
    one = laws.diffusion(tmp_path / "one")
    before = recorded.digest(one)
    name = next(name for name in one.files if name.endswith(".data"))
    one.files[name]["sha256"] = "0" * 64
    assert recorded.digest(one) != before
