"""Group commit: receipts are queued at once and written together by a thread of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from leangen.errors import LeangenError, StorageError
from leangen.ledger.rows import Row, Window

STOPPED = StorageError("the ledger's writer stopped unexpectedly")


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

    The thread lives while there is something to write. It is no daemon, so an interpreter that ends
    waits for it: what was queued is written also when nobody waits. A fork's child leaves to its
    parent what the parent queued.
    """

    def __init__(self, commit: Callable[[Sequence[Ticket]], None]) -> None:
        self._commit = commit
        self.forget()

    def forget(self) -> None:
        """Start empty, as a fork's child must."""
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._queue: list[Ticket] = []
        self._failed: list[Ticket] = []
        self._busy = False

    def submit(self, ticket: Ticket) -> Ticket:
        """Queue a receipt."""
        with self._lock:
            self._queue.append(ticket)
            start, self._busy = not self._busy, True
        if start:
            try:
                threading.Thread(target=self._run, name="leangen-ledger").start()
            except RuntimeError:  # the interpreter is ending and starts no more threads
                self._run()
        return ticket

    def drain(self) -> None:
        """Wait until nothing is queued or being written; failures stay with their tickets."""
        with self._idle:
            self._idle.wait_for(lambda: not self._busy)

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
            while self._write_group():
                pass
        except BaseException:  # a mistake in leangen: nobody may wait for ever because of it
            with self._lock:
                self._busy = False
                for ticket in self._queue:
                    ticket.settle(STOPPED)
                self._queue.clear()
                self._idle.notify_all()
            raise

    def _write_group(self) -> bool:
        """Write what is queued; False when that was nothing."""
        with self._lock:
            group, self._queue = self._queue, []
            if not group:
                self._busy = False
                self._idle.notify_all()
                return False
        error: LeangenError = STOPPED
        try:
            self._commit(group)
        except LeangenError as known:
            error = known
        finally:
            for ticket in group:
                ticket.settle(error)  # those that `commit` has settled stay as they are
            with self._lock:
                self._failed += [ticket for ticket in group if ticket.untold is not None]
        return True
