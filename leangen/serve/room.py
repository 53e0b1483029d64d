"""Memory for models: who may be loaded, and who must leave for that."""

from __future__ import annotations

import threading
from typing import Protocol

from leangen import clock

TURN_S = 2.0
"""A model that has work may stay so long, once loaded, before it must make room for another."""


class Tenant(Protocol):
    """A model that takes up room."""

    @property
    def memory_bytes(self) -> int:
        """What it may come to hold: its weights, and the cache of a full batch."""
        ...

    @property
    def idle(self) -> bool:
        """Whether it has nothing to do."""
        ...

    @property
    def last_used_ns(self) -> int:
        """When it did something last."""
        ...

    def release(self) -> None:
        """Begin nothing new, and call `Room.leave` when what runs has ended."""
        ...

    def nudge(self) -> None:
        """Room may have become free: ask again."""
        ...


class Room:
    """So many bytes for all models together, or any number. Usable from many threads.

    Who asks first is let in first. A model that has nothing to do leaves at once, the one unused
    for longest first; one that has, when its turn is over: so all are served in the end.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._inside: dict[Tenant, int | None] = {}
        """With the time when its turn began; None while it is being loaded."""
        self._leaving: set[Tenant] = set()
        self._waiting: dict[Tenant, None] = {}

    def enter(self, tenant: Tenant) -> bool:
        """Whether the model may be loaded now; if not, it is nudged when it should ask again."""
        if self._limit_bytes is None:
            return True
        with self._lock:
            self._waiting.setdefault(tenant)
            if next(iter(self._waiting)) is not tenant:
                return False
            missing = sum(other.memory_bytes for other in self._inside) + tenant.memory_bytes
            missing -= self._limit_bytes
            if missing <= 0:
                del self._waiting[tenant]
                self._inside[tenant] = None
                return True
            missing -= sum(other.memory_bytes for other in self._leaving)
            for other in self._dispensable():
                if missing <= 0:
                    break
                missing -= other.memory_bytes
                self._leaving.add(other)
                other.release()
            return False

    def loaded(self, tenant: Tenant) -> None:
        """The model's turn begins now: on a busy machine loading alone may take longer than one."""
        with self._lock:
            if tenant in self._inside:
                self._inside[tenant] = clock.monotonic_ns()

    def leave(self, tenant: Tenant) -> None:
        """The model holds nothing any more, and does not wait either."""
        with self._lock:
            self._inside.pop(tenant, None)
            self._waiting.pop(tenant, None)
            self._leaving.discard(tenant)
            first = next(iter(self._waiting), None)
        if first is not None:
            first.nudge()

    def _dispensable(self) -> list[Tenant]:
        """Who may be asked to leave: the idle, then those whose turn is over."""
        staying = [tenant for tenant in self._inside if tenant not in self._leaving]
        idle = [tenant for tenant in staying if tenant.idle]
        over_ns = clock.monotonic_ns() - int(TURN_S * 1e9)
        began = {t: ns for t, ns in self._inside.items() if ns is not None and t in staying}
        busy = [t for t, ns in began.items() if t not in idle and ns <= over_ns]
        return sorted(idle, key=lambda t: t.last_used_ns) + sorted(busy, key=began.__getitem__)
