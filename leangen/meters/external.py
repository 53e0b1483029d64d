"""A meter outside the machine: a wall plug, a USB power meter, a bench supply. `--meter SPEC`.

    exec:COMMAND    lines that a command prints; it is ended with the process that started it
    file:PATH       lines that something else appends to a file

One sample per line, TIME VALUE [UNIT], separated by blanks, commas or semicolons:

    1763718000.10 5.43 W        TIME: seconds of any clock that only goes forward

The unit is W, mW or uW (power: trapezoids over the meter's own time stamps, source `integrated`)
or J, mJ, uJ, kJ, Wh or kWh (a cumulative counter, source `measured`). It stands on every line, or
once in a comment line, or at the end of SPEC; so may what is known of the meter:

    # unit=W u=0.02 scope=wall                    file:/run/meter.log#unit=W,u=0.02,scope=wall

`u` is the class uncertainty, k=2, as a fraction. Where it is not given, 5% is assumed (type B: an
uncalibrated meter of no stated class; household plugs claim 1-3%) and the note says so.

A half-written last line waits for its rest. Lines that make no sense are skipped; when most do, or
nothing came for 5 of the meter's own intervals (2 s at least), the window has a fault and no
figure. A look sees the lines that are there, so the tick is the interval between lines.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import threading
import weakref
from collections import deque
from collections.abc import Callable

from leangen import clock
from leangen.errors import RequestError
from leangen.meters.meter import Meter, MeterFault, Sampling, Tick
from leangen.meters.series import GAP, POWERS_W, Series
from leangen.records import Reading

DEFAULT_U = 0.05
FIRST_LINES_S = 5.0
_SPEC = re.compile(r"(exec|file):(.+?)(?:#((?:(?:unit|u|scope)=[^,#]+,?)+))?", re.DOTALL)


def open_external(spec: str, *, wait_s: float = FIRST_LINES_S) -> Meter:
    """The meter of `exec:COMMAND` or `file:PATH`, once it has given three lines.

    Raises RequestError for a SPEC that is not one, a command or file that is not there, and when no
    three lines with a unit come within `wait_s`.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise RequestError(f"--meter {spec!r}: expected exec:COMMAND or file:PATH")
    kind, target, options = match.groups()
    series = Series()
    series.header(options or "")
    source: _File | _Command = _File(target) if kind == "file" else _Command(target)
    give_up_ns = clock.monotonic_ns() + int(wait_s * 1e9)
    while series.samples < 3:
        try:
            series.add(source.new_lines())
        except MeterFault as fault:
            raise RequestError(f"--meter {spec}: {fault.detail}; {series.complaint()}") from None
        if clock.monotonic_ns() > give_up_ns:
            raise RequestError(
                f"--meter {spec}: no three samples within {wait_s:g} s; {series.complaint()}"
            )
        clock.sleep(0.01)
    return _meter(spec, series, source)


def _meter(spec: str, series: Series, source: _File | _Command) -> Meter:
    look = _Look(series, source)
    stated = f"stated: {series.u:.2g}" if series.u is not None else f"not stated: {DEFAULT_U:.0%}"
    return Meter(
        name=f"external:{series.scope}",
        source="integrated" if series.unit in POWERS_W else "measured",
        scope=series.scope,
        in_total=True,
        unit="uJ",
        tick=Tick(series.interval_s, "the interval between the meter's lines"),
        u_systematic=DEFAULT_U if series.u is None else series.u,
        max_power_w=1e5,
        wraps_at=None,
        coverage=None if series.unit in POWERS_W else 1.0,
        read=look.read,
        note=f"{spec}; class uncertainty {stated}",
        sampler=look if series.unit in POWERS_W else None,
    )


class _Look:
    """Reads of a window; as a sampler it has nothing to start: the meter goes on by itself."""

    def __init__(self, series: Series, source: _File | _Command) -> None:
        self._series = series
        self._source = source
        self._seen = series.samples
        self._nonsense = series.nonsense
        self._news_ns = clock.monotonic_ns()

    def read(self) -> Reading:
        series = self._series
        series.add(self._source.new_lines())
        now_ns = clock.monotonic_ns()
        if series.samples > self._seen:
            nonsense = series.nonsense - self._nonsense
            if nonsense > series.samples - self._seen:
                raise MeterFault("garbage", f"most lines make no sense: {series.example!r}")
            self._seen, self._nonsense, self._news_ns = series.samples, series.nonsense, now_ns
        elif now_ns - self._news_ns > max(2.0, GAP * series.interval_s) * 1e9:
            silent_s = (now_ns - self._news_ns) / 1e9
            raise MeterFault("stuck", f"no line for {silent_s:.1f} s")
        return Reading(round(series.energy_j * 1e6), "uJ", now_ns)

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def sampling(self) -> Sampling:
        return self._series.sampling


class _File:
    """A file that grows. Reading begins with its last lines."""

    TAIL = 8192

    def __init__(self, path: str) -> None:
        self._path = path
        if os.path.exists(path) and not os.path.isfile(path):  # reading it would wait for ever
            raise RequestError(
                f"--meter file:{path} is not a regular file: use --meter 'exec:cat {path}' for a "
                "device or a pipe"
            )
        try:
            size = os.path.getsize(path)
            with open(path, "rb") as file:
                head = file.readline(4096).decode("utf-8", "replace")
        except OSError as error:
            raise RequestError(f"--meter file:{path}: {error.strerror}") from None
        self._offset = max(0, size - self.TAIL)
        # A comment at the top tells the unit even when the tail begins after it.
        self._before = head if self._offset and head.startswith("#") else ""
        self._skip = self._offset > 0

    def new_lines(self) -> str:
        try:
            with open(self._path, "rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    raise MeterFault("reset", "the meter's file became shorter")
                file.seek(self._offset)
                raw = file.read()
        except FileNotFoundError as error:
            raise MeterFault("vanished", error.strerror) from None
        except PermissionError as error:
            raise MeterFault("permission", error.strerror) from None
        except OSError as error:
            raise MeterFault("unreadable", error.strerror) from None
        self._offset += len(raw)
        text = raw.decode("utf-8", "replace")
        if self._skip:  # the tail begins within a line
            text = text.partition("\n")[2]
            self._skip = False
        before, self._before = self._before, ""
        return before + text


class _Command:
    """A command that prints lines; a thread keeps its pipe empty, and its end ends it."""

    def __init__(self, command: str) -> None:
        try:
            words = shlex.split(command)
            self._process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C is for us
            )
        except (ValueError, OSError, IndexError) as error:
            raise RequestError(f"--meter exec:{command}: {error}") from None
        lines: deque[str] = deque()
        self._lines = lines
        self._drain = threading.Thread(
            target=_drain, args=(self._process, lines), name="leangen-meter", daemon=True
        )
        self._drain.start()
        self.close: Callable[[], object] = weakref.finalize(self, _end, self._process)

    def new_lines(self) -> str:
        ended = self._process.poll() is not None
        if ended:
            self._drain.join(1.0)
        came = "".join(self._lines.popleft() for _ in range(len(self._lines)))
        if ended and not came:
            raise MeterFault("vanished", f"the command ended ({self._process.returncode})")
        return came


def _drain(process: subprocess.Popen[bytes], lines: deque[str]) -> None:
    assert process.stdout is not None  # asked for above
    with process.stdout as pipe:
        for raw in iter(pipe.readline, b""):
            lines.append(raw.decode("utf-8", "replace"))


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the command and what it started: they are a process group of their own."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, number)
        try:
            process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            continue
