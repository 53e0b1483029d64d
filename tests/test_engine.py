"""Laws of every family: a generation comes back whole, with a receipt that adds up."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tiny_bundles import BUILDERS, OPTIONS

from leangen import carbon, families
from leangen.bundle import open_bundle
from leangen.engine import Engine
from leangen.errors import BundleError, RequestError
from leangen.ledger import Ledger
from leangen.session import Session


def test_every_family_has_a_tiny_bundle():
    assert set(BUILDERS) == set(OPTIONS) == set(families.FAMILIES)


@pytest.fixture(scope="module", params=sorted(families.FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def bundle(family, tmp_path_factory):
    return BUILDERS[family](tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def engine(bundle, tmp_path):
    return Engine(Session(bundle, threads=1), ledger=Ledger(tmp_path / "ledger.sqlite"), tag="law")


def options_of(engine):
    return OPTIONS[families.key(engine.bundle)]


def same(a, b):
    return a.text == b.text and a.tokens == b.tokens and np.array_equal(a.array, b.array)


def test_the_receipt_adds_up(engine):
    stream = engine.stream(**options_of(engine))
    steps = list(stream)
    receipt = stream.result.receipt
    energy = receipt.energy
    assert receipt.units.count == sum(step.units for step in steps) > 0
    assert sum(step.energy_uj for step in energy.steps) == energy.gross_uj
    assert {step.kind for step in energy.steps} == {step.kind for step in steps}
    assert energy.gross_uj == energy.idle_uj + energy.marginal_uj
    assert energy.per_unit_j == pytest.approx(energy.gross_j / receipt.units.count)
    assert energy.u_j == pytest.approx(math.hypot(energy.u_random_j, energy.u_systematic_j))
    assert 0 < receipt.latency.ttft_s <= receipt.latency.total_s
    assert receipt.latency.step_p50_s <= receipt.latency.step_p95_s
    assert (receipt.model, receipt.scheme, receipt.tag) == (engine.bundle.name, "fp32", "law")
    assert receipt.bundle == engine.bundle.digest


def test_an_estimate_says_so_and_why(engine):
    energy = engine.generate(**options_of(engine)).receipt.energy
    if energy.source != "estimated":
        pytest.skip("this machine has an energy counter")
    assert "estimated, not measured" in energy.reason
    assert energy.u_j >= 0.5 * energy.gross_j


def test_the_receipt_is_json_without_the_prompt(engine):
    receipt = engine.generate(**options_of(engine)).receipt
    document = json.loads(json.dumps(receipt.to_json(), allow_nan=False))
    assert document["schema"] == "leangen.receipt/1"
    for reason in ("threads", "provider", "kernels"):
        assert document["runtime"]["reasons"][reason]
    given = set(options_of(engine)) & set(engine.family.INPUTS) - {"count"}
    assert not given & set(document["request"])


def test_the_ledger_keeps_what_came_back(engine):
    receipts = [engine.generate(**options_of(engine)).receipt for _ in range(2)]
    kept = engine.ledger.entries()
    assert [entry["id"] for entry in kept] == [r.id for r in reversed(receipts)]
    assert kept[0] == json.loads(json.dumps(receipts[1].to_json()))


def test_the_same_seed_gives_the_same_output(engine):
    options = options_of(engine)
    first, again = (engine.generate(**options, seed=3).output for _ in range(2))
    assert same(first, again)


def test_a_new_session_gives_the_same_output(engine, bundle):
    other = Engine(Session(bundle, threads=1))
    options = options_of(engine)
    assert same(engine.generate(**options).output, other.generate(**options).output)


def test_a_stream_that_is_closed_early_is_accounted_for(engine):
    stream = engine.stream(**options_of(engine))
    next(stream)
    with pytest.raises(RequestError, match="not finished"):
        _ = stream.result
    stream.close()
    assert engine.ledger.entries()[0]["id"] == stream.receipt.id
    assert same(*(engine.generate(**options_of(engine)).output for _ in range(2)))


def test_a_stream_that_the_process_leaves_open_is_accounted_for(tmp_path):
    code = f"""
from pathlib import Path
from leangen.bundle import open_bundle
from leangen.engine import Engine
from leangen.ledger import Ledger
from leangen.session import Session
bundle = open_bundle(Path({str(BUILDERS["language"](tmp_path / "bundle").path)!r}))
engine = Engine(Session(bundle), ledger=Ledger(Path({str(tmp_path / "ledger.sqlite")!r})))
stream = engine.stream("a", max_new_tokens=3, ignore_eos=True)
next(stream)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    (kept,) = Ledger(tmp_path / "ledger.sqlite").entries()
    assert kept["units"]["count"] == 1


def test_an_interrupt_is_accounted_for(engine):
    stream = engine.stream(**options_of(engine))
    with pytest.raises(KeyboardInterrupt):
        for _ in stream:
            raise KeyboardInterrupt
    stream.close()
    assert len(engine.ledger.entries()) == 1


def test_an_unknown_option_names_those_there_are(engine):
    with pytest.raises(RequestError, match=r"takes no option 'temprature': it takes .*seed"):
        engine.generate(**options_of(engine), temprature=1)


def test_the_example_needs_no_input(engine):
    fields = engine.or_example(None, {"seed": 5})
    assert fields["seed"] == 5
    assert set(engine.family.EXAMPLE) <= set(fields)
    engine.request(**fields)


def test_a_region_changes_the_carbon_and_nothing_else(bundle):
    engine = Engine(Session(bundle, threads=1), footprint=carbon.footprint("FR"))
    receipt = engine.generate(**options_of(engine)).receipt
    assert receipt.carbon.region == "fr"
    assert receipt.carbon.g == pytest.approx(
        receipt.energy.gross_j / 3.6e6 * receipt.carbon.intensity_g_per_kwh
    )


def test_a_graph_opened_ahead_is_the_one_that_is_opened_when_asked_for(bundle):
    role = next(iter(bundle.graphs))
    ahead, asked = Session(bundle, threads=1), Session(bundle, threads=1)
    ahead.open_ahead(role)
    names = [[given.name for given in s.graph(role).get_inputs()] for s in (ahead, asked)]
    assert names[0] == names[1]
    assert (ahead.kernels, ahead.reasons) == (asked.kernels, asked.reasons)
    opened = ahead.graph(role)
    ahead.open_ahead(role)
    assert ahead.graph(role) is opened


def test_without_memory_for_a_thread_the_graph_opens_when_asked_for(bundle, monkeypatch):
    def refused(thread):
        raise RuntimeError("can't start new thread")

    session, role = Session(bundle, threads=1), next(iter(bundle.graphs))
    with monkeypatch.context() as patched:
        patched.setattr("threading.Thread.start", refused)
        session.open_ahead(role)
    assert session.graph(role).get_inputs()


def test_what_fails_ahead_is_raised_when_the_graph_is_asked_for(bundle, tmp_path):
    shutil.copytree(bundle.path, tmp_path / "damaged")
    damaged = open_bundle(tmp_path / "damaged")
    role = next(iter(damaged.graphs))
    damaged.graph(role).write_bytes(b"no graph")
    session = Session(damaged, threads=1, kernels="ort")
    session.open_ahead(role)
    with pytest.raises(BundleError, match="cannot load"):
        session.graph(role)


def test_text_that_utf8_cannot_hold_is_refused_before_any_work(bundle, tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        engine = Engine(Session(bundle, threads=1), ledger=ledger)
        for name in ("prompt", "text", "phonemes"):
            if name in engine.family.INPUTS:
                with pytest.raises(RequestError, match=rf"{name} has '\\udcff' in it, .*UTF-8"):
                    engine.stream(**{name: "a\udcffb"})
        with pytest.raises(RequestError, match="tag has"):
            Engine(engine.session, tag="\udcff")
        with pytest.raises(RequestError, match="tag is 5, expected text"):
            Engine(engine.session, tag=5)
        assert ledger.entries() == []


@pytest.mark.parametrize("threads", [0, -2, 100_000, "2", 1.5])
def test_thread_counts_that_make_no_sense_are_refused(bundle, threads):
    with pytest.raises(RequestError, match="threads is .*, expected a whole number, 1 to 1024"):
        Session(bundle, threads=threads)


def test_numpys_numbers_are_taken_as_pythons(engine):
    options = options_of(engine)
    if "seed" not in {field.name for field in dataclasses.fields(engine.family.Request)}:
        pytest.skip("draws nothing")
    options = {**options, "seed": 3}
    plain = engine.generate(**options)
    assert same(engine.generate(**{**options, "seed": np.int64(3)}), plain)
