"""What a server is started with."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from leangen.budget import Budget, Per
from leangen.errors import RequestError
from leangen.serve.worker import Limits

DEFAULT_PORT = 8000


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Settings of a server; RequestError for those that would not be safe or make no sense."""

    models: Sequence[str]
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    api_key_file: Path | None = None
    """One key a line, `NAME:KEY` or `KEY`; without it any client on this machine is served."""
    limits: Limits = field(default_factory=Limits)
    memory_bytes: int | None = None
    max_body_bytes: int = 2_000_000
    per_minute: int | None = None
    """Requests of one client; None is as many as it likes."""
    timeout_s: float = 600.0
    """Of one request, its time in the queue included; a deferred one's counts from its hour."""
    grace_s: float = 30.0
    """What runs at SIGTERM may take so long."""
    budgets: Sequence[Budget] = ()
    power_cap_w: float | None = None
    cheaper: bool = False
    """Answer from a smaller precision of the same model when a budget is nearly used up."""
    threads: int | None = None
    region: str | None = None
    intensity: str | None = None
    defer_s: float = 86_400.0
    """A deferred request waits no longer than this for a cleaner hour."""
    meter: str | None = None
    tag: str | None = None
    otel: bool = False
    """Tell OpenTelemetry of each receipt."""

    def __post_init__(self) -> None:
        if not self.models:
            raise RequestError("no model is given: name at least one, as smollm2-135m:int4")
        if not 0 <= self.port <= 65535:
            raise RequestError(f"port is {self.port}, expected 0 to 65535")
        if not self.local and self.api_key_file is None:
            raise RequestError(
                f"host {self.host} can be reached from other machines: give --api-key-file, "
                "or serve on 127.0.0.1"
            )
        for name, value, least in (
            ("max batch", self.limits.max_batch, 1),
            ("context", self.limits.context, 2),
            ("queue", self.limits.queue, 1),
            ("idle release", self.limits.idle_release_s, 0),
            ("max body", self.max_body_bytes, 1),
            ("rate", 1 if self.per_minute is None else self.per_minute, 1),
            ("timeout", self.timeout_s, 0),
            ("grace", self.grace_s, 0),
        ):
            if not value >= least:
                raise RequestError(f"{name} is {value}, expected {least} or more")

    @property
    def local(self) -> bool:
        """Whether only this machine can connect."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def budget(text: str) -> Budget:
    """A budget that refuses, from `day=5000J` or `month=20g` (gCO2e).

    >>> budget("day=5000J").limit
    5000.0
    """
    per, _, amount = text.partition("=")
    unit = amount[-1:]
    try:
        limit = float(amount[:-1])
    except ValueError:
        limit = float("nan")
    if per not in ("day", "month") or unit not in ("J", "g") or not limit >= 0:
        raise RequestError(f"budget is {text!r}, expected for example day=5000J or month=20g")
    kind: Per = "day" if per == "day" else "month"
    return Budget(per=kind, limit=limit, unit="J" if unit == "J" else "gCO2e", on_exceed="refuse")


def size(text: str) -> int:
    """Bytes, from `2GB`, `500MB`, `64kB` or a plain number.

    >>> size("1.5GB")
    1500000000
    """
    units = {"GB": 10**9, "MB": 10**6, "kB": 10**3, "B": 1, "": 1}
    number = text.rstrip("BkMG")
    try:
        return int(float(number) * units[text[len(number) :]])
    except (ValueError, KeyError, OverflowError):
        raise RequestError(f"size is {text!r}, expected for example 2GB or 500MB") from None
