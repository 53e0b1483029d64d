"""Comparisons: paired statistics, honest sentences, models in processes of their own, the page."""

from __future__ import annotations

import csv
import json
import random
import re
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from receipt_fakes import receipt
from test_report import browse
from tiny_bundles import BUILDERS

from leangen import compare
from leangen.cli import main
from leangen.compare import paired, show, worker
from leangen.errors import BundleError, RequestError
from leangen.quality import Measure
from leangen.session import Session


@pytest.mark.parametrize("freedom", [1, 2, 5, 8, 9, 12, 30, 200])
def test_students_quantile_is_scipys(freedom):
    stats = pytest.importorskip("scipy.stats")
    assert paired.student_95(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=3e-4)


def test_the_interval_holds_the_truth_in_95_of_100_worlds():
    """A ratio of 1.2 under 5% scatter and a drift that both models share."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(2000):
        drift = np.exp(rng.normal(0, 0.5, 6).cumsum())
        base = drift * np.exp(rng.normal(0, 0.05, 6))
        other = 1.2 * drift * np.exp(rng.normal(0, 0.05, 6))
        found = paired.ratio("a", "b", other, base)
        held += found.low <= 1.2 <= found.high
    assert 0.935 < held / 2000 < 0.965


def test_the_random_part_of_a_window_widens_it():
    costs = [1.0, 2.0, 4.0]
    alone = paired.ratio("a", "b", costs, costs)
    assert (alone.low, alone.high) == (1, 1)
    wide = paired.ratio("a", "b", costs, costs, own_relative_u=0.1)
    assert wide.high == pytest.approx(np.exp(0.1 / np.sqrt(3)))
    assert not wide.significant


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1))
def test_the_front_is_what_no_other_beats(points):
    costs, losses = zip(*points, strict=True)
    on = paired.front(costs, losses)
    assert any(on)
    for (c, q), stays in zip(points, on, strict=True):
        beaten = any(a <= c and b <= q and (a, b) != (c, q) for a, b in points)
        assert stays != beaten


def bundle(label, bits):
    return SimpleNamespace(
        name="m", scheme=label, digest=label, size_bytes=int(bits * 1e6),
        quantization={"bits_per_weight": bits},
    )  # fmt: skip


BUNDLES = {"fp32": bundle("fp32", 32.0), "int8": bundle("int8", 8.5), "nf4": bundle("nf4", 4.5)}
LOSSES = (None, 0.002, 0.05)


def judged():
    return [
        []
        if loss is None
        else [
            Measure("KL divergence", loss, loss / 10, 500, "tokens", "nats"),
            Measure("log-perplexity change", 0.001, 0.01, 500, "tokens", "nats"),
        ]
        for loss in LOSSES
    ]


def rounds(joules, source="measured", seconds=(0.5, 0.4, 0.3)):
    rng = np.random.default_rng(0)
    return {
        label: [
            receipt(
                f"{label}{n}", scheme=label, source=source, duration_s=s * rng.uniform(0.99, 1.01),
                gross_j=None if j is None else j * rng.uniform(0.99, 1.01), u_random_j=0.01,
            )
            for n in range(6)
        ]
        for label, j, s in zip(BUNDLES, joules, seconds, strict=True)
    }  # fmt: skip


def test_lower_precision_that_costs_more_is_said_plainly():
    found = compare.conclude(BUNDLES, rounds((6.0, 4.0, 7.5)), judged())
    assert found.cost == "energy"
    text = "\n".join(found.findings)
    assert re.search(r"int8 takes 3[34]% less energy per token than fp32", text)
    said = r"takes \d+% MORE energy per token than {}, though its precision is lower"
    assert re.search(rf"nf4 {said.format('fp32')}", text)
    assert re.search(rf"nf4 {said.format('int8')}", text)
    assert "int8 and fp32: no significant log-perplexity change" in text
    assert [row.on_front for row in found.rows] == [True, True, False]


def test_a_difference_within_the_noise_is_none():
    found = compare.conclude(BUNDLES, rounds((6.0, 6.0, 6.001)), judged())
    assert all("no significant" in line for line in found.findings)
    for pair in ("int8 and fp32", "nf4 and fp32", "nf4 and int8"):
        assert any(f"{pair}: no significant difference in energy" in f for f in found.findings)


@pytest.mark.parametrize("seed", range(5))
def test_all_take_every_place_equally_often(seed):
    order = compare.orders(["a", "b", "c"], 9, random.Random(seed))
    for place in range(3):
        assert sorted(names[place] for names in order) == sorted("abc" * 3)
    assert all(sorted(names) == ["a", "b", "c"] for names in order)
    assert len(compare.orders(["a", "b", "c"], 4, random.Random(seed))) == 4


@pytest.mark.parametrize("source", ["estimated", None])
def test_joules_that_prove_nothing_are_not_compared(source):
    joules = (None, None, None) if source is None else (6.0, 4.0, 9.0)
    found = compare.conclude(BUNDLES, rounds(joules, source or "measured"), judged())
    assert found.cost == "time"
    assert "time is compared" in found.cost_reason
    assert ("proves nothing" in found.cost_reason) == (source == "estimated")
    assert any("nf4 takes 40% less time per token than fp32" in line for line in found.findings)
    assert not any("energy" in line for line in found.findings)


def test_files_hold_every_figure(tmp_path):
    found = compare.conclude(BUNDLES, rounds((6.0, 4.0, 7.5)), judged(), notes=["<busy>"])
    show.write_csv(tmp_path / "c.csv", found)
    rows = list(csv.DictReader((tmp_path / "c.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["scheme"] for row in rows] == list(BUNDLES)
    for row, kept in zip(rows, found.rows, strict=True):
        assert float(row["j_per_unit"]) == kept.summary["j_per_unit"]
        assert row["KL divergence"] == ("" if not kept.quality else str(kept.loss))
    show.write_html(tmp_path / "c.html", found)
    raw = (tmp_path / "c.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(|<script|<img|<link", raw)
    assert "&lt;busy&gt;" in raw
    for row in found.rows:
        assert show.cells(row)[3] in raw
    for line in found.findings:
        assert line in raw
    json.dumps(found.to_json(), allow_nan=False)


def test_the_plot_keeps_order_and_stays_inside():
    found = compare.conclude(BUNDLES, rounds((6.0, 4.0, 7.5)), judged())
    plot = show.pareto_plot(found)
    by_label = {p["label"]: p for p in plot["points"]}
    assert by_label["int8"]["x"] < by_label["fp32"]["x"] < by_label["nf4"]["x"]
    assert by_label["fp32"]["y"] < by_label["int8"]["y"] < by_label["nf4"]["y"]
    for p in plot["points"]:
        assert 0 <= p["x_low"] <= p["x"] <= p["x_high"] <= 100
        assert 0 <= p["y_low"] <= p["y"] <= p["y_high"] <= 100
    stairs = [tuple(map(float, point.split(","))) for point in plot["stairs"].split()]
    assert stairs[0] == (by_label["int8"]["x"], 100 - by_label["int8"]["y"])
    assert stairs[-1] == (by_label["fp32"]["x"], 100 - by_label["fp32"]["y"])


@pytest.mark.slow
def test_chromium_lays_it_out(tmp_path):
    """Points lie where the axes say, and nothing sticks out of a narrow window."""
    found = compare.conclude(BUNDLES, rounds((6.0, 4.0, 7.5)), judged())
    path = tmp_path / "c.html"
    show.write_html(path, found)
    script = """<script>addEventListener("load", () => {
      const box = document.querySelector(".field").getBoundingClientRect();
      const points = [...document.querySelectorAll(".point")].map((e) => {
        const r = e.getBoundingClientRect();
        return [(r.left + r.width / 2 - box.left) / box.width,
                (box.bottom - r.top - r.height / 2) / box.height]; });
      const wide = [...document.querySelectorAll("body *")].filter(
        (e) => !e.closest(".scroll, .labels, svg")
          && e.getBoundingClientRect().right > innerWidth + 1
      ).map((e) => e.outerHTML.slice(0, 80));
      document.body.innerHTML = "<pre>" + JSON.stringify({points, wide}) + "</pre>"; });</script>"""
    path.write_text(path.read_text().replace("</body>", script + "</body>"))
    done = browse(tmp_path, "--window-size=500,1600", "--dump-dom", path.as_uri())
    seen = json.loads(re.search(r"<pre>(.*)</pre>", done.stdout, re.S)[1])
    assert seen["wide"] == []
    for (x, y), point in zip(seen["points"], show.pareto_plot(found)["points"], strict=True):
        assert x == pytest.approx(point["x"] / 100, abs=0.01)
        assert y == pytest.approx(point["y"] / 100, abs=0.01)


@pytest.fixture
def folder(tmp_path):
    return BUILDERS["oneshot"](tmp_path / "tiny").path


def start(folder, options=None):
    return worker.Worker("tiny", folder, loading={}, prompt=None, options=options or {})


def test_a_worker_is_another_process_and_tells_its_errors(folder):
    with start(folder) as running:
        warm, count, _ = running.warm_up()
        assert 3 <= count <= 8
        found = running.repeat(3)
        assert found.units.count == 3
        assert found.model == warm.model
        running._process.kill()
        with pytest.raises(RequestError, match="the process of tiny ended with code -9"):
            running.repeat(1)
    with (
        pytest.raises(RequestError, match="takes no option 'colour'"),
        start(folder, {"colour": 1}) as running,
    ):
        running.warm_up()
    (folder / "leangen.json").unlink()
    with pytest.raises(BundleError, match="is not a bundle"):
        start(folder)


def test_what_is_judged_runs_as_what_is_timed(folder, tmp_path, capsys, monkeypatch):
    assert main(["quantize", str(folder), "--scheme", "int8", "-o", str(tmp_path / "int8")]) == 0
    made = []

    def open_session(bundle, **options):
        made.append(options)
        return Session(bundle, **options)

    monkeypatch.setattr("leangen.compare.Session", open_session)
    schemes = f"{folder},{tmp_path / 'int8'}"
    command = ["compare", str(folder), "--schemes", schemes, "--rounds", "3", "--seeds", "1"]
    assert main([*command, "--kernels", "ort", "--activations", "fp32", "--json"]) == 0
    assert len(made) == 2
    assert all((one["kernels"], one["activations"]) == ("ort", "fp32") for one in made)


def test_the_command(folder, tmp_path, capsys):
    assert main(["quantize", str(folder), "--scheme", "int8", "-o", str(tmp_path / "int8")]) == 0
    capsys.readouterr()
    page, table = tmp_path / "o" / "c.html", tmp_path / "o" / "c.csv"
    command = [
        "compare",
        str(folder),
        "--schemes",
        f"{folder},{tmp_path / 'int8'}",
        "--rounds",
        "3",
    ]
    command += ["--seeds", "2"]
    assert main([*command, "--json", "-o", str(page), "--csv", str(table)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in document["rows"]] == ["fp32", "int8"]
    assert len(document["order"]) == 3
    assert all(sorted(names) == ["fp32", "int8"] for names in document["order"])
    assert all(len(row["costs"]) == 3 for row in document["rows"])
    assert document["rows"][1]["quality"][0]["name"] == "relative RMSE"
    assert page.read_text().startswith("<!doctype html>")
    assert table.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--rounds", "2"], "expected 3 or more"),
        (["--precision", "0"], "expected a share"),
        (["--schemes", "FOLDER"], "expected two or more schemes"),
        (["--schemes", "FOLDER,FOLDER"], "name it once"),
        (["--schemes", "FOLDER,./nowhere"], "there is no bundle at"),
        (["--seeds", "0"], "seeds is 0"),
    ],
)
def test_bad_input_is_refused_before_any_work(folder, tmp_path, capsys, change, message):
    schemes = f"{folder},{BUILDERS['oneshot'](tmp_path / 'b').path}"
    command = ["compare", str(folder), "--schemes", schemes]
    if "--schemes" not in change:
        other = tmp_path / "int8"
        assert main(["quantize", str(folder), "--scheme", "int8", "-o", str(other)]) == 0
        command[-1] = f"{folder},{other}"
    change = [part.replace("FOLDER", str(folder)) for part in change]
    assert main([*command, *change]) == 2
    assert message in capsys.readouterr().err
