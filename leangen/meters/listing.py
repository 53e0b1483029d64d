"""What `leangen meters` shows of every sensor: there or not, what it covers, and the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from leangen import meters
from leangen.meters.meter import Meter, Unavailable
from leangen.meters.probing import probe

COVERS = {
    "package": "one processor: cores, caches, memory controller, graphics on the chip",
    "dram": "the memory of one processor",
    "core": "the cores of one processor",
    "uncore": "the graphics on one processor's chip",
    "psys": "the platform, as far as its maker wired it",
    "gpu": "one graphics card",
    "socket": "one processor with its graphics",
    "cpu": "the CPU cores",
    "ane": "the neural engine",
    "process": "this process and the idle power of its CPUs",
    "pmic-rails": "the board's converter rails",
    "VDD_IN": "the module's input",
    "POM_5V_IN": "the board's 5 V input",
    "BAT": "the whole machine with its screen",
}


def describe(
    root: Path = Path("/"), *, device: str = "cpu", meter: str | None = None
) -> list[dict[str, Any]]:
    """Every sensor, probed, or why not and what would enable it.

    One dict per domain with `sensor`, `status` (`in total`, `available`, `unavailable`, or `absent`
    for hardware that is not there), `source`, `scope`, `covers`, `tick_s`, `tick_how`,
    `u_systematic` (k=2, a fraction), `coverage`, `reason` and `remedy`; None where one does not
    apply. Probing ticks takes 10 ms a RAPL domain, 1 s a GPU.

    Raises RequestError as `select` does.
    """
    found = {name: meters.open_sensor(name, root) for name in meters.SENSORS}
    if meter is None:
        selection = meters.choose(device, root, found)
    else:
        selection = meters.select(root, device=device, meter=meter)
    chosen = {m.name for m in selection.meters}
    entries = [entry for entries in found.values() for entry in entries]
    if meter is not None and meters.is_external(meter):
        entries = [*selection.meters, *entries]
    return [
        _unavailable(entry)
        if isinstance(entry, Unavailable)
        else _available(entry, in_total=entry.name in chosen)
        for entry in entries
    ]


def _unavailable(entry: Unavailable) -> dict[str, Any]:
    return {
        "sensor": entry.sensor,
        "status": "unavailable" if entry.in_total or entry.remedy else "absent",
        "source": "unavailable",
        "scope": None,
        "covers": None,
        "tick_s": None,
        "tick_how": None,
        "u_systematic": None,
        "coverage": None,
        "reason": entry.reason,
        "remedy": entry.remedy or None,
    }


def _available(entry: Meter, *, in_total: bool) -> dict[str, Any]:
    meter = probe(entry)
    reason = meter.note
    if not in_total and meter.source == "estimated":
        reason = f"not used, as there is a sensor: {reason}"
    elif not in_total and meter.in_total:
        wider = "joins the total when a model runs on it" if meters.is_gpu(meter) else "not needed"
        reason = f"{wider}: {reason}".removesuffix(": ")
    return {
        "sensor": meter.name,
        "status": "in total" if in_total else "available",
        "source": meter.source,
        "scope": meter.scope,
        "covers": covers(meter.scope),
        "tick_s": meter.tick.seconds,
        "tick_how": meter.tick.how,
        "u_systematic": meter.u_systematic,
        "coverage": meter.coverage,
        "reason": reason or None,
        "remedy": None,
    }


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The rows of `describe` as text: what there is first, equal refusals and remedies once."""
    for status in ("in total", "available"):
        some = [row for row in rows if row["status"] == status]
        if some:
            yield f"{status}:"
        width = max((len(row["sensor"]) for row in some), default=0)
        for row in some:
            what = row["covers"] or row["scope"]
            yield (
                f"  {row['sensor']:{width}}  {row['source']:10}  tick {_duration(row['tick_s']):>7}"
                f"  ±{row['u_systematic']:.0%}  {what}"
            )
            if row["reason"] and row["reason"] != what:
                yield f"  {'':{width}}  {row['reason']}"
    refused: dict[tuple[str, str | None], list[str]] = {}
    for row in rows:
        if row["status"] == "unavailable":
            refused.setdefault((row["reason"], row["remedy"]), []).append(row["sensor"])
    if refused:
        yield "unavailable:"
    for (reason, remedy), sensors in refused.items():
        yield f"  {', '.join(sensors)}: {reason}"
        if remedy:
            yield f"    remedy: {remedy}"
    absent = [f"{row['sensor']} ({row['reason']})" for row in rows if row["status"] == "absent"]
    if absent:
        yield f"absent: {'; '.join(absent)}"


def _duration(seconds: float) -> str:
    """`1 ms`, `5 s`, `6.12 us`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def covers(scope: str) -> str | None:
    """A scope in plain words: `package-0` is one processor. None where only its name is known."""
    words = scope.rstrip("0123456789").rstrip("-")
    return COVERS.get(scope) or COVERS.get(words) or COVERS.get(scope.partition("-")[0])
