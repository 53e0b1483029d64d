"""What the command line shows while it works: notes, progress bars, tables, JSON.

Results go to standard output, everything else to standard error, so that a pipe gets only results.
rich is imported when something is drawn: a generation that only prints text never loads it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what is being done); total 0 when it is not known."""


def say(text: str) -> None:
    """A note for the person, on standard error."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON document on standard output, escaped where that takes ASCII alone."""
    unicode = (sys.stdout.encoding or "").lower().startswith("utf")
    print(json.dumps(value, ensure_ascii=not unicode, allow_nan=False))


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress callback that draws a bar on a terminal, and nothing when there is none."""
    if not sys.stderr.isatty():
        yield lambda done, total, what: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def update(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total or None, description=what)

        yield update


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """A table on standard output; figures are right-aligned, nothing is cut off in a pipe."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for index, column in enumerate(columns):
        numeric = any(row[index][:1].isdigit() and len(row[index]) < 40 for row in rows)
        drawn.add_column(
            column, justify="right" if numeric else "left", overflow="fold", no_wrap=False
        )
    for row in rows:
        drawn.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, markup=False)
    # On a narrow terminal lines run on, where else words would be cut or columns vanish.
    least = console.measure(drawn, options=console.options.update(width=1000)).minimum
    console.width = max(console.width, least)
    console.print(drawn)


def human_bytes(size_bytes: float) -> str:
    """Bytes in the largest decimal unit that keeps the figure above 1.

    >>> human_bytes(98_362_432), human_bytes(512)
    ('98.4 MB', '512 B')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000 or unit == "GB":
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    raise AssertionError("unreachable")


def figure(value: float) -> str:
    """A number at four digits, or at all those before the point.

    >>> figure(12345.6), figure(0.0123456), figure(3.0)
    ('12346', '0.01235', '3')
    """
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def counted(count: float, kind: str) -> str:
    """A number of things.

    >>> counted(1.0, "image"), counted(12345, "token"), counted(1.25, "audio-second")
    ('1 image', '12345 tokens', '1.25 audio-seconds')
    """
    told = figure(count)
    return f"{told} {kind}{'' if told == '1' else 's'}"


def seconds(duration_s: float) -> str:
    """A duration, in milliseconds where seconds would be all noughts.

    >>> seconds(0.00421), seconds(0.27), seconds(273.06)
    ('4.2 ms', '0.27 s', '273.1 s')
    """
    if duration_s < 0.095:
        return f"{duration_s * 1e3:.2g} ms"
    return f"{duration_s:.{2 if duration_s < 100 else 1}f} s"


_MOST_DIGITS = 7
"""After the point; figures that need more are written with a power of ten."""


def with_u(value: float | None, u: float | None, unit: str) -> str:
    """A value with its uncertainty, at the digits that the uncertainty supports.

    >>> with_u(4.1234, 0.21, "J"), with_u(0.0631, 0.038, "J"), with_u(None, None, "J")
    ('4.12 ± 0.21 J', '0.063 ± 0.038 J', 'not measured')
    >>> with_u(5.88e-14, 1.4e-15, "nats")
    '(5.88 ± 0.14)e-14 nats'
    """
    if value is None:
        return "not measured"
    if not u:
        return f"{value:.0f} {unit}" if abs(value) >= 1000 else f"{value:.3g} {unit}"
    from math import floor, log10

    digits = max(0, 1 - floor(log10(u)))
    if digits > _MOST_DIGITS:
        power = floor(log10(max(abs(value), u)))
        half = power // 2  # the whole of a subnormal's power of ten would be zero
        value, u = (x / 10.0**half / 10.0 ** (power - half) for x in (value, u))
        digits += power
        return f"({value:.{digits}f} ± {u:.{digits}f})e{power:03d} {unit}"
    return f"{value:.{digits}f} ± {u:.{digits}f} {unit}"
