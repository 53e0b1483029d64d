"""The one place that reads clocks.

Durations come from the monotonic clock only. The wall clock is read once per receipt, for its
`started_at` stamp; it may jump, so nothing is ever subtracted from it.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime


def monotonic_ns() -> int:
    """Nanoseconds of the monotonic clock: never goes back, stands still during suspend."""
    return time.monotonic_ns()


def boottime_ns() -> int:
    """Nanoseconds since boot, suspend included; its gap to `monotonic_ns` shows a suspend.

    Falls back to the monotonic clock where the platform has no boot-time clock.
    """
    boottime = getattr(time, "CLOCK_BOOTTIME", None)
    return time.clock_gettime_ns(boottime) if boottime is not None else time.monotonic_ns()


def process_cpu_ns() -> int:
    """CPU nanoseconds that this process has used, over all its threads, user and system."""
    return time.process_time_ns()


def sleep(seconds: float) -> None:
    """Sleep at least `seconds` on the monotonic clock."""
    time.sleep(seconds)


def utc_now() -> str:
    """The wall clock as ISO 8601 in UTC with milliseconds: `2026-11-21T08:00:00.123Z`."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")  # noqa: TID251
