"""External meters: lines in, joules out, whatever happens to the lines."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import tiny_bundles
from hypothesis import given
from hypothesis import strategies as st

from leangen import clock, meters
from leangen.engine import Engine
from leangen.errors import RequestError
from leangen.meters import MeterFault, Selection, external
from leangen.meters.external import open_external
from leangen.meters.series import ENERGIES_J, POWERS_W, Series
from leangen.session import Session


def fed(text, *, unit=None):
    series = Series()
    if unit:
        series.header(f"unit={unit}")
    series.add(text)
    return series


def log(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return f"file:{path}"


def append(path, *lines, end="\n"):
    with path.open("a") as file:
        file.write("".join(f"{line}\n" for line in lines[:-1]) + lines[-1] + end)


@given(
    st.lists(st.floats(0.5, 2), min_size=2, max_size=30),
    st.floats(0, 1e4),
    st.sampled_from(list(POWERS_W)),
    st.lists(st.integers(1, 40), max_size=20),
)
def test_constant_power_is_power_times_time_however_the_text_is_cut(steps, power, unit, cuts):
    times = [1e9 + sum(steps[: i + 1]) for i in range(len(steps))]
    text = "".join(f"{t!r} {power!r} {unit}\n" for t in times)
    series = Series()
    position = 0
    for cut in cuts:
        series.add(text[position : position + cut])
        position += cut
    series.add(text[position:])
    expected = power * POWERS_W[unit] * (times[-1] - times[0])
    assert series.energy_j == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert series.samples == len(steps)
    assert series.sampling.variance_j2 == 0


def test_power_between_lines_is_a_trapezoid_on_the_meters_own_clock():
    series = fed("0 10\n1 20\n3 0\n", unit="W")
    assert series.energy_j == 15 + 20
    assert series.sampling.variance_j2 > 0


@pytest.mark.parametrize(("unit", "joules"), list(ENERGIES_J.items()))
def test_energy_units_are_cumulative_counters(unit, joules):
    series = fed(f"0;5;{unit}\n1;5.5;{unit}\n2;7;{unit}\n")
    assert series.energy_j == pytest.approx(2 * joules)


def test_a_counter_that_falls_is_a_reset():
    series = fed("0 5 J\n1 6 J\n")
    with pytest.raises(MeterFault, match="reset"):
        series.add("2 1 J\n")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "nonsense",
        "2",
        "2 x W",
        "2 nan W",
        "2 inf W",
        "nan 5 W",
        "0.5 5 W",
        "2 5 V",
        "2 5 J",
        "2 -5 W",
    ],
)
def test_lines_that_make_no_sense_are_skipped(line):
    series = fed(f"0 10 W\n1 10 W\n{line}\n3 10 W\n")
    assert series.energy_j == 30
    assert series.nonsense == (1 if line else 0)


def test_comment_lines_and_the_end_of_the_spec_describe_the_meter(tmp_path):
    file = tmp_path / "power.log"
    spec = log(file, "# unit=mW u=2% scope=wall", *(f"{t} 5000" for t in range(4)))
    meter = open_external(spec)
    assert (meter.scope, meter.u_systematic, meter.source) == ("wall", 0.02, "integrated")
    plain = log(file, *(f"{t},5.0" for t in range(4)))
    meter = open_external(f"{plain}#unit=Wh,u=0.01,scope=bench")
    assert (meter.scope, meter.u_systematic, meter.source) == ("bench", 0.01, "measured")
    assert meter.tick.seconds == 1.0
    log(file, *(f"{t} 5.0 W" for t in range(4)))
    meter = open_external(spec)
    assert meter.u_systematic == external.DEFAULT_U
    assert "not stated" in meter.note


def test_a_growing_file_is_followed_and_a_partial_line_waits(tmp_path):
    file = tmp_path / "power.log"
    meter = open_external(log(file, *(f"{t} 5 W" for t in range(4))))
    start = meter.read().count
    append(file, "4 5 W", "5 5", end="")
    assert meter.read().count - start == 5_000_000
    append(file, " W")
    assert meter.read().count - start == 10_000_000


def test_the_end_of_a_long_file_is_read_and_its_header_known(tmp_path):
    file = tmp_path / "power.log"
    spec = log(file, "# unit=W scope=plug", *(f"{t} 5" for t in range(20_000)))
    meter = open_external(spec)
    assert meter.scope == "plug"
    start = meter.read().count
    append(file, "20000 5")
    assert meter.read().count - start == 5_000_000


def test_what_happens_to_a_file_is_a_fault(tmp_path):
    file = tmp_path / "power.log"
    lines = [f"{t} 5 W" for t in range(4)]
    meter = open_external(log(file, *lines))
    log(file, lines[0])
    with pytest.raises(MeterFault, match="reset"):
        meter.read()
    meter = open_external(log(file, *lines))
    file.unlink()
    with pytest.raises(MeterFault, match="vanished"):
        meter.read()


def test_garbage_and_silence_are_faults(tmp_path):
    file = tmp_path / "power.log"
    lines = [f"{t / 100} 5 W" for t in range(4)]
    meter = open_external(log(file, *lines))
    append(file, "0.04 5 W", "###", "???", "!!!", "...")
    with pytest.raises(MeterFault) as caught:
        meter.read()
    assert caught.value.fault == "garbage"
    meter = open_external(log(file, *lines))
    meter.sampler._news_ns -= 3_000_000_000
    with pytest.raises(MeterFault) as caught:
        meter.read()
    assert caught.value.fault == "stuck"


PRINTER = """
import sys, time
while True:
    print(f"{time.monotonic():.6f} 5.0 W", flush=True)
    time.sleep(0.005)
"""


def command(tmp_path, source):
    script = tmp_path / "meter.py"
    script.write_text(source)
    return f"exec:{sys.executable} {script}"


def pid_of(meter):
    return meter.sampler._source._process.pid


def test_a_command_measures_a_window_and_ends_with_its_meter(tmp_path):
    meter = open_external(command(tmp_path, PRINTER))
    window = meters.begin(Selection(meters=(meter,), reason=None))
    clock.sleep(0.3)
    [closed] = meters.end(window)
    expected_j = 5.0 * window.tracks[0].elapsed_s
    error_j = abs(closed.energy_uj / 1e6 - expected_j)
    assert error_j <= 2 * 5.0 * 0.1  # the edges wait for the next line
    assert closed.coverage > 0.5
    pid = pid_of(meter)
    os.kill(pid, 0)
    del meter, window, closed
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_generation_is_measured_by_the_meter_that_was_asked_for(tmp_path):
    bundle = tiny_bundles.language(tmp_path)
    spec = command(tmp_path, PRINTER)
    engine = Engine(Session(bundle, threads=1), meter=spec, baseline_s=0.3)
    result = engine.repeat(30, **tiny_bundles.OPTIONS["language"])
    energy = result.receipt.energy
    assert (energy.source, energy.scope) == ("integrated", ("external",))
    assert energy.reason.startswith(f"--meter {spec}")
    assert energy.meters[0].sensor == "external:external"
    if energy.gross_j is not None:  # a very quick machine may not see two lines
        assert abs(energy.gross_j - 5.0 * result.receipt.duration_ns / 1e9) <= energy.u_j + 0.5
    meters._external.clear()


def test_a_command_that_ends_is_a_fault(tmp_path):
    source = "for t in range(4): print(t, 5, 'W')\n"
    meter = open_external(command(tmp_path, source))
    meter.sampler._source._process.wait(timeout=30)
    with pytest.raises(MeterFault, match="vanished"):
        for _ in range(100):
            meter.read()
            clock.sleep(0.01)


def test_a_command_that_ignores_termination_is_killed(tmp_path):
    source = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + PRINTER
    meter = open_external(command(tmp_path, source))
    pid = pid_of(meter)
    del meter
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_same_spec_is_opened_once(tmp_path):
    spec = command(tmp_path, PRINTER)
    first = meters.select(meter=spec).meters[0]
    assert meters.select(meter=spec).meters[0] is first
    meters._external.clear()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("exec:", "expected exec:COMMAND or file:PATH"),
        ("exec:/no/such/command", "No such file"),
        ("exec:'unclosed", "No closing quotation"),
        ("exec:true", "the command ended"),
        ("exec:echo hello", "the last nonsense was 'hello'"),
        ("file:/no/such/file", "No such file"),
        ("file:/no/such/file#unit=BTU", "unit 'BTU', expected one of W, mW"),
        ("exec:sleep 9#unit=W", "no three samples within 0.2 s"),
        ("file:/dev/null#u=7", "u=7, expected a fraction"),
        ("file:/dev/null", "not a regular file: use --meter 'exec:cat /dev/null'"),
    ],
)
def test_a_meter_that_gives_nothing_is_refused_with_a_reason(spec, message):
    with pytest.raises(RequestError, match=message):
        open_external(spec, wait_s=0.2 if "0.2 s" in message else 20)


def test_no_thread_is_left(tmp_path):
    meter = open_external(command(tmp_path, PRINTER))
    del meter
    for _ in range(200):
        if not [t for t in threading.enumerate() if t.name == "leangen-meter"]:
            return
        clock.sleep(0.005)
    raise AssertionError("the thread that empties the pipe is still there")
