"""Connections that send a request's head slowly, or nonsense, are closed.

A body is read by `access`, within a time of its own; a connection that is kept open and silent is
closed by uvicorn. What remains is the request line and the headers: who takes longer than `HEAD_S`
for them occupies a connection only to occupy it.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from leangen.serve import problems

HEAD_S = 10.0

_Base: Any = AutoHTTPProtocol


class Connection(_Base):  # type: ignore[misc]
    """uvicorn's protocol, with a deadline for each request's head."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """A client has connected: its first request's time begins."""
        super().connection_made(transport)
        self._begin()

    def data_received(self, data: bytes) -> None:
        """A part of a request."""
        before = self.cycle
        if self._deadline is None and (before is None or before.response_complete):
            self._begin()
        super().data_received(data)
        if self.cycle is not before:  # the head is complete
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._end()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, in the shape of every other error."""
        content = json.dumps(problems.shaped(msg, "invalid_request_error", "invalid_http")).encode()
        head = (
            "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\n"
            f"content-length: {len(content)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + content)
        self.transport.close()

    def _begin(self) -> None:
        self._deadline = self.loop.call_later(HEAD_S, self._expire)

    def _end(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expire(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            self.transport.close()
