"""Apple silicon's own energy counters, through libIOReport, which needs no root.

The channels of the group "Energy Model" count since boot: `CPU Energy`, `GPU Energy`, `DRAM`,
`ANE` and their parts, in mJ, uJ or nJ as each says. The total is CPU + DRAM, which are disjoint;
parts such as `ECPU0` lie inside. The figures come from Apple's power model, not from a shunt:
class uncertainty, k=2, type B: 20%, judged.

The library is private and undocumented, and this module was written without a Mac at hand: only
its reading of channels is tested. What fails says so as `Unavailable`.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from leangen import clock
from leangen.meters.meter import Meter, MeterFault, Tick, Unavailable
from leangen.records import Reading

LIBRARY = "/usr/lib/libIOReport.dylib"
GROUP = b"Energy Model"
UJ = {"mJ": 1000.0, "uJ": 1.0, "nJ": 1e-3}
DOMAINS = {"CPU Energy": "cpu", "DRAM": "dram", "GPU Energy": "gpu", "ANE": "ane"}
IN_TOTAL = ("cpu", "dram")

Channels = Callable[[], dict[str, tuple[int, str]]]
"""Value and unit by channel, of one sample; raises MeterFault."""


def open(root: Path = Path("/"), *, channels: Channels | None = None) -> list[Meter | Unavailable]:
    """A meter for each energy domain, or why there is none; `channels` replaces the library."""
    if channels is None:
        if platform.system() != "Darwin":
            return [Unavailable("apple", "this is not macOS", "", in_total=False)]
        if root != Path("/"):
            reason = f"IOReport sees only the running system, not {root}"
            return [Unavailable("apple", reason, "", in_total=False)]
        try:
            channels = _library()
        except (OSError, AttributeError) as error:
            return [Unavailable("apple", f"libIOReport cannot be used: {error}", "")]
    try:
        found = channels()
    except MeterFault as fault:
        return [Unavailable("apple", fault.detail, "")]
    domains = {
        channel: domain
        for channel, domain in DOMAINS.items()
        if channel in found and found[channel][1] in UJ
    }
    if not domains:
        return [Unavailable("apple", "IOReport has no energy channel that is known", "")]
    return [_meter(channels, channel, domain) for channel, domain in domains.items()]


def _meter(channels: Channels, channel: str, domain: str) -> Meter:
    def read() -> Reading:
        try:
            value, unit = channels()[channel]
        except KeyError:
            raise MeterFault("vanished", f"channel {channel} is gone") from None
        t_ns = clock.monotonic_ns()
        if unit not in UJ or value < 0:
            raise MeterFault("garbage", f"{value} {unit} is not an energy")
        return Reading(int(value * UJ[unit]), "uJ", t_ns)

    return Meter(
        name=f"apple:{domain}",
        source="measured",
        scope=domain,
        in_total=domain in IN_TOTAL,
        unit="uJ",
        tick=Tick(0.1, "assumed"),
        u_systematic=0.20,
        max_power_w=500.0,
        wraps_at=None,
        coverage=None,
        read=read,
        note="Apple's own power model",
    )


def _library() -> Channels:
    """One subscription to the group; each call takes one sample of it."""
    import ctypes

    report: Any = ctypes.CDLL(LIBRARY)
    core: Any = ctypes.CDLL("/System/Library/Frameworks/CoreFoundation.framework/CoreFoundation")
    pointer = ctypes.c_void_p
    signatures: tuple[tuple[Any, str, Any, list[Any]], ...] = (
        (core, "CFStringCreateWithCString", pointer, [pointer, ctypes.c_char_p, ctypes.c_uint32]),
        (
            core,
            "CFStringGetCString",
            ctypes.c_bool,
            [pointer, ctypes.c_char_p, ctypes.c_long, ctypes.c_uint32],
        ),
        (core, "CFDictionaryGetValue", pointer, [pointer, pointer]),
        (core, "CFArrayGetCount", ctypes.c_long, [pointer]),
        (core, "CFArrayGetValueAtIndex", pointer, [pointer, ctypes.c_long]),
        (core, "CFRelease", None, [pointer]),
        (
            report,
            "IOReportCopyChannelsInGroup",
            pointer,
            [pointer, pointer] + 3 * [ctypes.c_uint64],
        ),
        (
            report,
            "IOReportCreateSubscription",
            pointer,
            [pointer, pointer, pointer, ctypes.c_uint64, pointer],
        ),
        (report, "IOReportCreateSamples", pointer, [pointer, pointer, pointer]),
        (report, "IOReportChannelGetChannelName", pointer, [pointer]),
        (report, "IOReportChannelGetUnitLabel", pointer, [pointer]),
        (report, "IOReportSimpleGetIntegerValue", ctypes.c_int64, [pointer, ctypes.c_int32]),
    )
    for library, name, result, arguments in signatures:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    utf8 = 0x08000100

    def string(text: bytes) -> Any:
        return core.CFStringCreateWithCString(None, text, utf8)

    def decoded(reference: Any) -> str:
        buffer = ctypes.create_string_buffer(128)
        known = reference and core.CFStringGetCString(reference, buffer, len(buffer), utf8)
        return buffer.value.decode("utf-8", "replace").strip() if known else ""

    wanted = report.IOReportCopyChannelsInGroup(string(GROUP), None, 0, 0, 0)
    subscribed = pointer()
    subscription = wanted and report.IOReportCreateSubscription(
        None, wanted, ctypes.byref(subscribed), 0, None
    )
    if not subscription:
        raise OSError("it refused a subscription to the energy counters")
    key = string(b"IOReportChannels")

    def channels() -> dict[str, tuple[int, str]]:
        sample = report.IOReportCreateSamples(subscription, subscribed, None)
        if not sample:
            raise MeterFault("unreadable", "IOReport gave no sample")
        try:
            array = core.CFDictionaryGetValue(sample, key)
            rows = [
                core.CFArrayGetValueAtIndex(array, index)
                for index in range(core.CFArrayGetCount(array) if array else 0)
            ]
            return {
                decoded(report.IOReportChannelGetChannelName(row)): (
                    report.IOReportSimpleGetIntegerValue(row, 0),
                    decoded(report.IOReportChannelGetUnitLabel(row)),
                )
                for row in rows
            }
        finally:
            core.CFRelease(sample)

    return channels
