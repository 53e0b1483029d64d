"""RAPL again, through perf events: for those who may not read powercap.

    /sys/bus/event_source/devices/power/type                    number of the PMU
                                       /cpumask                 one CPU of each package: `0,18`
                                       /events/energy-pkg       `event=0x02`
                                       /events/energy-pkg.scale joules per count: 2^-32
    /proc/sys/kernel/perf_event_paranoid                        0 or less lets anyone count

The same registers as `rapl`, so the same tick, class uncertainties and overlaps; never both in one
total. The kernel extends the registers to 64 bits, so these never wrap in practice. A counter
starts at 0 when it is opened and costs one file descriptor (perf_event_open(2)).
"""

from __future__ import annotations

import errno
import os
import platform
import struct
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from leangen import clock
from leangen.meters import rapl, sysfs
from leangen.meters.meter import Meter, MeterFault, Tick, Unavailable
from leangen.records import Reading

if TYPE_CHECKING:
    from fractions import Fraction

PMU = "sys/bus/event_source/devices/power"
PARANOID = "proc/sys/kernel/perf_event_paranoid"
EVENTS = {
    "energy-pkg": "package",
    "energy-ram": "dram",
    "energy-cores": "core",
    "energy-gpu": "uncore",
    "energy-psys": "psys",
}
SYSCALL = {"x86_64": 298, "aarch64": 241}
_CLOEXEC = 8

Opener = Callable[[bytes, int], int]
"""From the bytes of a `perf_event_attr` and a CPU to a file descriptor; raises OSError."""


def open(root: Path = Path("/"), *, opener: Opener | None = None) -> list[Meter | Unavailable]:
    """A meter, or why there is none, for every energy event on every package.

    `opener` opens an event: perf_event_open(2) when None. Under a `root` other than / the events
    belong to another system, so they are listed as unavailable.
    """
    folder = root / PMU
    kind = sysfs.text(folder / "type")
    cpus = _cpus(sysfs.text(folder / "cpumask") or "")
    events = [event for event in EVENTS if sysfs.text(folder / "events" / event)]
    if kind is None or not kind.isdecimal() or not cpus or not events:
        reason = f"there is no /{PMU} with energy events"
        return [Unavailable("perf_event", reason, "", in_total=False)]
    found: list[Meter | Unavailable] = []
    for event in events:
        for cpu in cpus[:1] if event == "energy-psys" else cpus:
            found.append(_open_event(root, event, int(kind), cpu, opener))
    return found


def _open_event(
    root: Path, event: str, pmu: int, cpu: int, opener: Opener | None
) -> Meter | Unavailable:
    from fractions import Fraction  # 3 ms of the start of those who have no such events

    domain = EVENTS[event]
    topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id"
    scope = domain if domain == "psys" else f"{domain}-{sysfs.text(topology) or cpu}"
    name = f"perf_event:{scope}"
    in_total = domain in ("package", "dram")
    paranoid = sysfs.text(root / PARANOID) or "unknown"
    if opener is None:
        if root != Path("/"):
            reason = f"perf events count only on the running system; {_level(paranoid)}"
            return Unavailable(name, reason, _remedy(paranoid), in_total)
        opener = _perf_event_open
    try:
        config = _config(sysfs.text(root / PMU / "events" / event) or "")
        scale = Fraction(sysfs.text(root / PMU / "events" / f"{event}.scale") or "")
        unit = sysfs.text(root / PMU / "events" / f"{event}.unit")
        if unit != "Joules" or scale <= 0:
            raise ValueError(f"a scale of {scale} {unit}")
    except (ValueError, ZeroDivisionError) as error:
        return Unavailable(name, f"event {event} cannot be understood: {error}", "", in_total)
    try:
        fd = opener(_attr(pmu, config), cpu)
    except OSError as error:
        reason = f"perf_event_open: {error.strerror}; {_level(paranoid)}"
        denied = error.errno in (errno.EACCES, errno.EPERM)
        return Unavailable(name, reason, _remedy(paranoid) if denied else "", in_total)
    return Meter(
        name=name,
        source="measured",
        scope=scope,
        in_total=in_total,
        unit="uJ",
        tick=Tick(1e-3, "documented: RAPL updates about every 1 ms"),
        u_systematic=rapl.u_systematic(domain, intel=rapl.is_intel(root)),
        max_power_w=rapl.MAX_POWER_W[domain],
        wraps_at=None,
        coverage=1.0,
        read=_reader(fd, scale * 1_000_000),
        note=rapl.OVERLAPS.get(domain, ""),
    )


def _reader(fd: int, uj_per_count: Fraction) -> Callable[[], Reading]:
    def read() -> Reading:
        try:
            raw = os.read(fd, 8)
        except OSError as error:
            raise MeterFault("unreadable", error.strerror) from None
        t_ns = clock.monotonic_ns()
        if len(raw) != 8:  # what perf gives when the CPU went offline
            raise MeterFault("vanished", "the event gives no more counts")
        return Reading(int(struct.unpack("=Q", raw)[0] * uj_per_count), "uJ", t_ns)

    weakref.finalize(read, os.close, fd)
    return read


def _attr(pmu: int, config: int) -> bytes:
    """The first version of `struct perf_event_attr` (64 bytes): type, size, config, zeros."""
    return struct.pack("=IIQ", pmu, 64, config).ljust(64, b"\0")


def _perf_event_open(attr: bytes, cpu: int) -> int:
    import ctypes

    number = SYSCALL.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"perf_event_open is not known for {platform.machine()}")
    libc = ctypes.CDLL(None, use_errno=True)
    # pid -1: all processes, on one CPU of the package.
    arguments = (ctypes.c_int(-1), ctypes.c_int(cpu), ctypes.c_int(-1), ctypes.c_ulong(_CLOEXEC))
    fd = int(libc.syscall(ctypes.c_long(number), ctypes.create_string_buffer(attr), *arguments))
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return fd


def _config(text: str) -> int:
    """`event=0x02` as a number; ValueError for anything else."""
    name, _, value = text.partition("=")
    if name != "event":
        raise ValueError(f"{text!r} is not event=NUMBER")
    return int(value, 0)


def _cpus(mask: str) -> list[int]:
    """A list of CPUs as the kernel writes it: `0,18` or `0-1`; empty when it is not one."""
    cpus: list[int] = []
    for part in mask.split(","):
        first, _, last = part.partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            return []
        cpus += range(int(first), int(last or first) + 1)
    return cpus


def _level(paranoid: str) -> str:
    return f"perf_event_paranoid is {paranoid}"


def _remedy(paranoid: str) -> str:
    return (
        f"`sudo sysctl kernel.perf_event_paranoid=0` (now {paranoid}) until the next boot, or give "
        'Python the capability: `sudo setcap cap_perfmon=ep "$(readlink -f "$(which python3)")"`'
    )
