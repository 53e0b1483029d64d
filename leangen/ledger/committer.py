"""Group commit: receipts are queued at once and written together by a thread of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from leangen import clock
from leangen.errors import LeangenError, StorageError
from leangen.ledger.rows import Row, Window

STOPPED = StorageError("the ledger's writer stopped unexpectedly")
NO_MEMORY = StorageError("the ledger had no memory to write a receipt: it is lost")
NO_MEMORY_S = 0.05
"""How long the thread waits for some."""


class Ticket:
    """Stands for one receipt on its way to the disk."""

    def __init__(self, document: str, row: Row, windows: Sequence[Window]) -> None:
        self.document = document
        self.row = row
        self.windows = windows
        self._event = threading.Event()
        self._error: LeangenError | None = None
        self._told = False

    @property
    def done(self) -> bool:
        """Whether it is on the disk, or has failed."""
        return self._event.is_set()

    def wait(self, timeout_s: float | None = None) -> None:
        """Return when the receipt is on the disk.

        Raises the StorageError that kept it from there, and TimeoutError after `timeout_s`.
        """
        if not self._event.wait(timeout_s):
            raise TimeoutError(f"the ledger did not write the receipt within {timeout_s:g} s")
        if self._error is not None:
            self._told = True
            raise self._error

    def settle(self, error: LeangenError | None = None) -> None:
        """Say how it ended; what was said first holds."""
        if not self._event.is_set():
            self._error = error
            self._event.set()

    @property
    def untold(self) -> LeangenError | None:
        """The failure that nobody has met yet."""
        return None if self._told else self._error


class Committer:
    """Hands queued tickets in groups to `commit`, which writes and settles them.

    The thread lives while there is something to write, or as long as `held`. It is no daemon, so an
    interpreter that ends waits for it: what was queued is written also when nobody waits. A fork's
    child leaves to its parent what the parent queued.
    """

    def __init__(self, commit: Callable[[Sequence[Ticket]], None]) -> None:
        self._commit = commit
        self.forget()

    def forget(self) -> None:
        """Start empty, as a fork's child must."""
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._queue: list[Ticket] = []
        self._failed: list[Ticket] = []
        self._held = self._running = self._writing = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep one thread meanwhile.

        For servers: when memory is short, Python may wait for ever for a thread that could not
        begin.
        """
        with self._lock:
            start, self._held, self._running = not self._running, True, True
        try:
            if start:
                self._start()
            yield
        finally:
            with self._lock:
                self._held = False
                self._changed.notify_all()

    def submit(self, ticket: Ticket) -> Ticket:
        """Queue a receipt."""
        with self._lock:
            self._queue.append(ticket)
            start, self._running = not self._running, True
            self._changed.notify_all()
        if start:
            try:
                self._start()
            except (RuntimeError, MemoryError):  # the interpreter is ending, or there is no thread
                self._run()
        return ticket

    def _start(self) -> None:
        threading.Thread(target=self._run, name="leangen-ledger").start()

    def drain(self) -> None:
        """Wait until nothing is queued or being written; failures stay with their tickets."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queue and not self._writing)

    def flush(self) -> None:
        """Wait as `drain` does, then raise the first failure that nobody has met yet."""
        if failures := self.failures():
            raise failures[0]

    def failures(self) -> list[LeangenError]:
        """Wait as `drain` does; the failures that nobody has met, which are then met."""
        self.drain()
        with self._lock:
            failed, self._failed = self._failed, []
        return [error for ticket in failed if (error := ticket.untold) is not None]

    def _run(self) -> None:
        try:
            while True:
                try:
                    if not self._write_group():
                        return
                except MemoryError:  # there may be some again in a moment
                    clock.sleep(NO_MEMORY_S)
        except BaseException:  # a mistake in leangen: nobody may wait for ever because of it
            with self._lock:
                self._running = False
                for ticket in self._queue:
                    ticket.settle(STOPPED)
                self._queue.clear()
                self._changed.notify_all()
            raise

    def _write_group(self) -> bool:
        """Write what is queued, wait for it while held; False when there is nothing."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or not self._held)
            group, self._queue = self._queue, []
            self._writing = self._running = bool(group)
        if not group:
            return False
        error: LeangenError = STOPPED
        try:
            self._commit(group)
        except LeangenError as known:
            error = known
        except MemoryError:
            error = NO_MEMORY
        finally:
            for ticket in group:
                ticket.settle(error)  # those that `commit` has settled stay as they are
            with self._lock:
                self._writing = False  # first: the list below may find no memory
                self._changed.notify_all()
                self._failed += [ticket for ticket in group if ticket.untold is not None]
        return True
