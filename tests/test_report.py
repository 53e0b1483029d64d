"""Reports: every figure is the ledger's, provenance shows, and the page needs nothing else."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from receipt_fakes import receipt

from leangen import budget, charts, clock, page, report
from leangen.cli import main
from leangen.errors import RequestError
from leangen.ledger import Ledger
from leangen.records import joules
from leangen.store import Store


@pytest.fixture
def ledger():
    with Ledger(Store().ledger_path) as opened:
        yield opened


def fill(ledger, *receipts):
    for entry in receipts:
        ledger.append(entry)
    ledger.flush()


@pytest.fixture
def busy(ledger):
    """Three days, two models, two units, every source, idle known for some."""
    fill(
        ledger,
        receipt("a", idle_j=1.5),
        receipt("b", gross_j=2.9, day="2026-11-20"),
        receipt("c", scheme="int8", gross_j=6.2, idle_j=2.0),
        receipt("d", scheme="int8", gross_j=None),
        receipt("e", gross_j=9.3, source="estimated", u_systematic_j=5.6, day="2026-11-17"),
        receipt(
            *("f",),
            model="<b>piper & co</b>",
            family="flow",
            unit="audio-second",
            units=3.2,
            gross_j=7.0,
            source="integrated",
        ),
        receipt("g", model="terrain", unit="image", units=1.0, gross_j=None),
    )
    return ledger


@pytest.mark.parametrize(
    "units, unit, said",
    [(1, "image", "1 image in"), (12345, "token", "12345 tokens in")]
    + [(3.2, "audio-second", "3.2 audio-seconds in"), (0, "token", "0 tokens in")],
)
def test_a_line_counts_units_as_people_do(units, unit, said):
    assert report.summary(receipt("a", unit=unit, units=units)).startswith(said)


@pytest.mark.parametrize(
    "intensity, said",
    [(473, "0.13 gCO2e"), (47.3, "13 mgCO2e"), (0, "0 mgCO2e"), (900_000, "0.25 kgCO2e")],
)
def test_a_line_says_carbon_in_a_unit_that_fits(intensity, said):
    grams = 1000 / 3.6e6 * intensity
    one = receipt("a", gross_j=1000.0)
    one = replace(one, carbon=replace(one.carbon, g=grams))
    assert f" {said} " in report.summary(one)


class Page(HTMLParser):
    """What a test asks of a page: elements, figures by row, text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.rows, self.cards = [], "", {}, {}
        self._values = None
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append((tag, found))
        if tag == "tr":
            self._values = self.rows.setdefault(
                (found.get("data-group"), found.get("data-source")), []
            )
        if tag == "section":
            self._values = self.cards.setdefault(found["data-source"], [])
        if tag == "h2":
            self._values = None
        if tag == "data" and self._values is not None:
            self._values.append(float(found["value"]))

    def handle_data(self, data):
        self.text += data


def written(tmp_path, view):
    path = tmp_path / "report.html"
    page.write_overview(path, view)
    return Page(path)


def test_every_figure_of_the_page_is_the_ledgers_sum(busy, tmp_path):
    found = written(tmp_path, report.overview(busy))
    sums = busy.summary()
    assert len(found.rows) == len(sums) + 1, "the heading, and one row per sum"
    for row in sums:
        values = found.rows[f"{row.group['model']}:{row.group['scheme']}", row.source]
        expected = [row.receipts, row.units, row.duration_s]
        if row.gross_uj is not None:
            expected += [joules(row.gross_uj), row.per_unit_j]
            expected += [] if row.idle_share is None else [row.idle_share]
            expected += [row.carbon_g, row.gross_uj / 1e6 / row.duration_s * 86_400 / 1.8e6]
        assert values == pytest.approx(expected)
    for source, values in found.cards.items():
        of_source = [row for row in sums if row.source == source]
        assert values[0 if source != "unavailable" else -1] == pytest.approx(
            sum(row.gross_uj for row in of_source) / 1e6
            if source != "unavailable"
            else sum(row.duration_s for row in of_source)
        )


def test_sources_are_never_added_up(busy):
    view = report.overview(busy)
    by_source = {row.source: row.gross_uj for row in view.totals}
    assert by_source == {
        "measured": 4_100_000 + 2_900_000 + 6_200_000,
        "integrated": 7_000_000,
        "estimated": 9_300_000,
        "unavailable": None,
    }


def test_the_page_is_self_contained_and_escapes(busy, tmp_path):
    found = written(tmp_path, report.overview(busy))
    for tag, attributes in found.tags:
        assert tag not in ("script", "link", "iframe", "object", "img")
        assert not {"src", "href", "onclick", "onload"} & set(attributes)
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|@import|url\(", raw)
    assert "<b>piper" not in raw
    assert "<b>piper & co</b>" in found.text, "as text, not as markup"
    assert "why it is unavailable <here>" in found.text


def test_provenance_shows_in_every_bar(busy, tmp_path):
    found = written(tmp_path, report.overview(busy))
    styles = [a["class"].split()[1] for t, a in found.tags if a.get("class", "").startswith("bar ")]
    assert set(styles) == set(report.SOURCES)
    raw = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.search(r"\.estimated \{[^}]*repeating-linear-gradient", raw), "hatched"
    assert re.search(r"\.unavailable \{[^}]*background: none[^}]*dashed", raw), "outlined"
    assert "prefers-color-scheme: dark" in raw
    for text in page.HOW.values():
        assert text in found.text


def test_the_trend_has_every_day_and_long_ones_go_by_month(busy, ledger, tmp_path):
    view = report.overview(busy)
    assert (view.period, view.first, view.last) == ("day", "2026-11-17", "2026-11-21")
    found = written(tmp_path, view)
    assert [a["class"] for t, a in found.tags if a.get("class") == "column"] == ["column"] * 5
    fill(ledger, receipt("old", day="2026-01-31", gross_j=1.0))
    view = report.overview(ledger)
    assert view.period == "month"
    assert {row.group["month"] for row in view.trend} == {"2026-01", "2026-11"}
    found = written(tmp_path, view)
    assert [a["class"] for t, a in found.tags if a.get("class") == "column"] == ["column"] * 11
    measured = [row for row in view.trend if row.source == "measured"]
    assert sum(row.gross_uj for row in measured) == view.totals[0].gross_uj


def test_since_leaves_older_days_out(busy, monkeypatch):
    monkeypatch.setattr(clock, "utc_now", lambda: "2026-11-21T10:00:00.000Z")
    view = report.overview(busy, since=report.since_day("2d"))
    assert (view.first, view.since) == ("2026-11-20", "2026-11-20")
    assert "estimated" not in {row.source for row in view.totals}
    assert report.overview(busy, since="2027-01-01") is None
    for text in ("yesterday", "d", "-", "99999999d", "2026-13-01"):
        with pytest.raises(RequestError, match="expected a day such as 2026-11-01, or 30d"):
            report.since_day(text)


def test_another_grouping_and_an_unknown_one(busy, tmp_path):
    view = report.overview(busy, by=("tag",))
    found = written(tmp_path, view)
    assert {name for name, _ in found.rows if name} == {"no tag"}
    with pytest.raises(RequestError, match="the ledger has no 'colour'"):
        report.overview(busy, by=("colour",))


def test_idle_share_is_of_the_generations_that_know_it(busy):
    groups = {
        (row.group["scheme"], row.source): row
        for row in busy.summary()
        if row.group["model"] == "smollm2-135m"
    }
    share, u = report.idle_share(groups["int4", "measured"])
    assert share == pytest.approx(1.5 / 4.1), "not of the 2.9 J whose idle part is unknown"
    assert 0 < u < share
    assert report.idle_share(groups["int4", "estimated"]) == (None, 0.0)
    assert groups["int8", "measured"].idle_uj == 2_000_000


def test_totals_keep_the_uncertainty_rule(ledger):
    """Random parts in quadrature, systematic ones linearly, over groups as within one."""
    fill(
        ledger,
        *(
            receipt(f"r{n}", scheme=scheme, u_random_j=0.3, u_systematic_j=0.1)
            for n, scheme in enumerate(("int4", "int4", "int8", "fp32"))
        ),
    )
    (total,) = report.overview(ledger).totals
    assert total.u_j == pytest.approx(((4 * 0.3**2) + (4 * 0.1) ** 2) ** 0.5)
    assert total.u_j == pytest.approx(ledger.summary(())[0].u_j)


def test_the_yardstick_is_mean_power_all_day(ledger):
    fill(ledger, receipt("a", gross_j=10.0, duration_s=0.48))
    figures = report.yardstick(ledger.summary()[0])
    assert figures["power_w"] == pytest.approx(10 / 0.48)
    assert figures["kwh_per_day"] == pytest.approx(0.5)
    assert figures["brains"] == pytest.approx(1.0)
    assert figures["g_per_day"] == pytest.approx(10e-4 / 0.48 * 86_400)
    fill(ledger, receipt("b", scheme="fp32", gross_j=None))
    assert set(report.yardstick(ledger.summary()[0]).values()) == {None}


def test_budgets_show_how_far_they_are_used(busy, tmp_path):
    limit = budget.Budget(per="month", limit=20.0, on_exceed="refuse")
    spent = budget.spent(limit, busy, "2026-11-21T10:00:00Z")
    found = written(tmp_path, report.overview(busy, budgets=[spent.to_json()]))
    assert "month-J" in found.text
    assert "29.5 of 20 J" in re.sub(r"\s+", " ", found.text)
    assert "used up, refuses" in found.text
    assert ("span", {"class": "value over"}) in found.tags


def test_the_command_writes_prints_and_refuses(busy, tmp_path, capsys):
    path = tmp_path / "out" / "r.html"
    assert main(["report", "-o", str(path)]) == 0
    assert path.read_text().startswith("<!doctype html>")
    assert str(path) in capsys.readouterr().err
    assert main(["report"]) == 0
    out = capsys.readouterr().out
    assert "7 generations" in out
    assert re.search(r"2026-11-17 .*▒+ +estimated", out), "an estimate is drawn shaded"
    assert re.search(r"2026-11-20 .*█+ +measured", out)
    assert main(["report", "--json", "--by", "model"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {row["source"] for row in document["totals"]} == set(report.SOURCES)
    assert main(["report", "--since", "2090-01-01"]) == 2
    assert "holds no generation since 2090-01-01" in capsys.readouterr().err


def test_an_empty_ledger_is_said(capsys):
    assert main(["report"]) == 2
    assert "the ledger holds no generation: `leangen generate`" in capsys.readouterr().err


@given(st.floats(1e-9, 1e12))
def test_axis_ticks_are_few_even_and_reach_the_top(high):
    ticks = charts.round_ticks(high)
    assert 3 <= len(ticks) <= 6
    assert ticks[0] == 0
    assert ticks[-1] >= high * (1 - 1e-9)
    assert ticks[-2] < high
    steps = {round((b - a) / ticks[1], 6) for a, b in zip(ticks, ticks[1:], strict=False)}
    assert steps == {1.0}


@given(
    st.lists(st.tuples(st.none() | st.floats(0, 1e6), st.none() | st.floats(0, 1e6)), min_size=1)
)
@example([(0.0, 5e-324)])
def test_bars_and_whiskers_stay_inside_the_track_in_proportion(figures):
    rows = [charts.Bar(name="x", value=value, u=u, source="measured") for value, u in figures]
    drawn = charts.bars("t", "J", rows)["rows"]
    top = max((v + (u or 0) for v, u in figures if v is not None), default=0)
    for (value, _), bar in zip(figures, drawn, strict=True):
        if value is None:
            assert bar["style"] == "unavailable"
            assert bar["low"] is None
            assert bar["text"] == "not measured"
        elif top:
            assert bar["length"] == pytest.approx(100 * value / top, abs=0.01)
        if bar["low"] is not None:
            assert 0 <= bar["low"] <= bar["low"] + bar["spread"] <= 100.01


def chromium():
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        pytest.skip("no chromium is installed")
    return found


FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


def browse(tmp_path, *arguments):
    return subprocess.run(
        [chromium(), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


MEASURE = """
<script>
addEventListener("load", () => {
  const wide = [...document.querySelectorAll("body *")].filter(
    (e) => !e.closest(".scroll, .labels") && e.getBoundingClientRect().right > innerWidth + 1
  );
  const bars = [...document.querySelectorAll(".bars .bar")].map((e) => [
    e.className, e.getBoundingClientRect().width, e.parentElement.getBoundingClientRect().width,
    getComputedStyle(e).backgroundImage, getComputedStyle(e).borderTopStyle]);
  const slots = [...document.querySelectorAll(".slot .bar")].map(
    (e) => [e.getBoundingClientRect().width, e.getBoundingClientRect().height]);
  const dark = getComputedStyle(document.body).backgroundColor;
  document.body.innerHTML = "<pre>" + JSON.stringify(
    {wide: wide.map((e) => e.outerHTML.slice(0, 80)), bars, slots, dark}) + "</pre>";
});
</script>
"""


@pytest.mark.slow
@pytest.mark.parametrize("width", [500, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_chromium_lays_it_out(busy, tmp_path, width, scheme):
    """Nothing sticks out, bars have their lengths and patterns, dark follows the system."""
    path = tmp_path / "report.html"
    page.write_overview(path, report.overview(busy))
    shot = tmp_path / "report.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    size = f"--window-size={width},1600"
    browse(tmp_path, *dark, size, f"--screenshot={shot}", path.as_uri())
    assert shot.stat().st_size > 20_000
    path.write_text(path.read_text().replace("</body>", MEASURE + "</body>"))
    done = browse(tmp_path, *dark, size, "--dump-dom", path.as_uri())
    seen = json.loads(
        re.search(r"<pre>(.*)</pre>", done.stdout, re.S)[1]
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&amp;", "&")
    )
    assert seen["wide"] == []
    channels = [int(c) for c in re.findall(r"\d+", seen["dark"])[:3]]
    assert (max(channels) < 64) == (scheme == "dark")
    for name, bar_px, track_px, image, border in seen["bars"]:
        assert 2 <= bar_px <= track_px + 0.5
        assert ("gradient" in image) == ("estimated" in name)
        assert (border == "dashed") == ("unavailable" in name)
    assert all(w >= 2 and h >= 2 for w, h in seen["slots"])
