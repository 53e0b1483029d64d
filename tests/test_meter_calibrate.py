"""The estimate's fit: least squares that finds what was put in, kept per host, used and named."""

from __future__ import annotations

import json
import stat
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leangen import cli, clock, meters
from leangen.errors import RequestError, StorageError
from leangen.meters import Meter, Selection, Tick, calibrate, estimate, fit
from leangen.records import Reading

FIT = fit.Fit(
    idle_w=3.0,
    core_w=7.0,
    residual=0.02,
    reference=("rapl:package-0",),
    reference_u=0.05,
    cpus=estimate.usable_cpus(),
    windows=9,
    date="2026-11-21T08:00:00.000Z",
)


@given(
    st.floats(0.1, 200),
    st.floats(0.1, 50),
    st.lists(st.tuples(st.floats(1, 20), st.floats(0, 1)), min_size=3, max_size=12),
)
def test_the_fit_is_the_least_squares_of_numpy(idle_w, core_w, windows):
    rng = np.random.default_rng(0)
    rows = [(w, w * busy * 4, 0.0) for w, busy in windows] + [(10.0, 0.0, 0.0), (10.0, 20.0, 0.0)]
    rows = [(w, c, (idle_w * w + core_w * c) * rng.uniform(0.95, 1.05)) for w, c, _ in rows]
    found_idle, found_core, residual = fit.solve(rows)
    matrix = np.array([(w, c) for w, c, _ in rows])
    joules = np.array([e for _, _, e in rows])
    expected, *_ = np.linalg.lstsq(matrix, joules, rcond=None)
    assert (found_idle, found_core) == pytest.approx(tuple(expected), rel=1e-6, abs=1e-6)
    rms = np.sqrt(np.sum((matrix @ expected - joules) ** 2) / (len(rows) - 2))
    assert residual == pytest.approx(rms / joules.mean(), rel=1e-5, abs=1e-9)


def test_windows_that_are_equally_busy_cannot_be_fitted():
    with pytest.raises(ValueError, match="equally busy"):
        fit.solve([(1, 1, 5), (2, 2, 10), (3, 3, 15)])
    with pytest.raises(ValueError, match="3 at least"):
        fit.solve([(1, 0, 5), (1, 1, 10)])


class World:
    """A machine whose busy cores and energy follow one law exactly; time passes as it does."""

    def __init__(self, idle_w, core_w, monkeypatch):
        self.idle_w, self.core_w = idle_w, core_w
        self.cores = 0
        self.start_ns = self.at_ns = clock.monotonic_ns()
        self.cpu_ns = 0
        monkeypatch.setattr(calibrate.clock, "process_cpu_ns", self.process_cpu_ns)

    def process_cpu_ns(self):
        now = clock.monotonic_ns()
        self.cpu_ns += self.cores * (now - self.at_ns)
        self.at_ns = now
        return self.cpu_ns

    @contextmanager
    def load(self, cores):
        self.process_cpu_ns()
        self.cores = cores
        yield
        self.process_cpu_ns()
        self.cores = 0

    def read(self):
        cpu_ns = self.process_cpu_ns()
        joules = (self.idle_w * (self.at_ns - self.start_ns) + self.core_w * cpu_ns) / 1e9
        return Reading(int(joules * 1e6), "uJ", self.at_ns)

    @property
    def selection(self):
        meter = Meter(
            name="fake:package-0",
            source="measured",
            scope="package-0",
            in_total=True,
            unit="uJ",
            tick=Tick(0.001, "given"),
            u_systematic=0.05,
            max_power_w=1000.0,
            wraps_at=None,
            coverage=1.0,
            read=self.read,
        )
        return Selection(meters=(meter,), reason=None)


def test_calibrate_finds_the_powers_of_a_machine(monkeypatch):
    world = World(4.0, 6.5, monkeypatch)
    found = calibrate.calibrate(world.selection, 0.05, load=world.load)
    assert found.idle_w == pytest.approx(4.0, rel=0.03)
    assert found.core_w == pytest.approx(6.5, rel=0.03)
    assert found.residual < 0.02
    assert found.reference == ("fake:package-0",)
    assert found.windows >= 6
    assert 0.15 < found.u_systematic < 0.3


def test_calibrate_against_nothing_or_too_shortly_is_refused(monkeypatch, tmp_path):
    world = World(4.0, 6.5, monkeypatch)
    with pytest.raises(RequestError, match="too short for fake:package-0, which moves every 0.001"):
        calibrate.calibrate(world.selection, 0.001, load=world.load)
    with pytest.raises(RequestError, match="nothing to calibrate against: no counter"):
        calibrate.calibrate(meters.select(tmp_path), 1.0)
    for seconds in (float("nan"), float("inf"), 1e9):
        with pytest.raises(RequestError, match="--seconds is .*, expected at most 3600"):
            calibrate.calibrate(world.selection, seconds, load=world.load)


def test_a_fit_that_makes_no_sense_is_refused(monkeypatch):
    world = World(20.0, -2.0, monkeypatch)
    with pytest.raises(RequestError, match="makes no sense"):
        calibrate.calibrate(world.selection, 0.02, load=world.load)


def cpu_share(cores):
    with calibrate.busy(cores):
        start, cpu = clock.monotonic_ns(), clock.process_cpu_ns()
        clock.sleep(0.3)
        return (clock.process_cpu_ns() - cpu) / (clock.monotonic_ns() - start)


def test_the_load_keeps_cores_busy():
    idle, busy = cpu_share(0), cpu_share(1)
    assert busy > 0.1  # of a core; the machine may be shared
    assert busy > 2 * idle


def test_a_stored_fit_is_used_and_named(home):
    path = fit.save(FIT)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert fit.load() == FIT
    [meter] = estimate.open()
    assert meter.idle_power_w == 3.0
    assert meter.u_systematic == FIT.u_systematic < estimate.U_SYSTEMATIC
    assert "fitted to rapl:package-0 on 2026-11-21 with a residual of 2.0%" in meter.note
    before, busy = meter.read(), sum(range(300_000))
    after = meter.read()
    assert busy and after.count - before.count >= int(3.0 * (after.t_ns - before.t_ns) / 1e3)


def test_a_fit_for_other_cpus_is_not_used_and_said_so(home):
    fit.save(replace(FIT, cpus=FIT.cpus + 3))
    [meter] = estimate.open()
    assert meter.u_systematic == estimate.U_SYSTEMATIC
    assert "run `leangen meters calibrate` again" in meter.note


def test_fits_of_several_hosts_share_a_home(home, tmp_path):
    other = tmp_path / "other"
    (other / "etc").mkdir(parents=True)
    (other / "etc/machine-id").write_text("0123456789abcdef\n")
    fit.save(FIT)
    fit.save(replace(FIT, idle_w=9.0), root=other)
    assert fit.load().idle_w == 3.0
    assert fit.load(other).idle_w == 9.0
    assert len(json.loads((home / "calibration.json").read_text())["hosts"]) == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"schema": "leangen.calibration/2", "hosts": {}}', '{"hosts": 5}'],
)
def test_a_damaged_file_is_no_fit(home, text):
    home.mkdir()
    (home / "calibration.json").write_text(text)
    assert fit.load() is None
    assert estimate.open()[0].u_systematic == estimate.U_SYSTEMATIC


@pytest.mark.parametrize("field", ["idle_w", "core_w", "residual", "cpus"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), "three", None])
def test_a_fit_with_impossible_figures_is_not_used(home, field, value):
    path = fit.save(FIT)
    document = json.loads(path.read_text())
    [row] = document["hosts"].values()
    row[field] = value
    path.write_text(json.dumps(document))
    assert fit.load() is None


def test_an_alien_file_is_not_overwritten(home):
    home.mkdir()
    (home / "calibration.json").write_text('{"hosts": 5}')
    with pytest.raises(StorageError, match="not a calibration file"):
        fit.save(FIT)


def test_the_command_calibrates_to_an_external_meter(tmp_path, home, capsys, monkeypatch):
    """Against a plug that shows 5 W + 5 W per busy core, as far as it is told."""
    world = World(5.0, 5.0, monkeypatch)
    monkeypatch.setattr(meters, "select", lambda **_: world.selection)
    monkeypatch.setattr(calibrate, "busy", world.load)
    assert cli.main(["meters", "calibrate", "--seconds", "0.05", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["idle_w"] == pytest.approx(5.0, rel=0.05)
    assert fit.load().core_w == pytest.approx(5.0, rel=0.05)
    assert cli.main(["meters", "calibrate", "--root", str(tmp_path)]) == 2
    assert "takes no --root" in capsys.readouterr().err
