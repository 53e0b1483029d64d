"""Who may ask, and how much may be sent: checked before a request reaches a route.

A pure ASGI layer: it must see a client's disconnection as the routes do. Bodies are read here, up
to a size and within a time, so that a slow sender occupies nothing but its own connection.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import math
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from leangen import clock
from leangen.console import say
from leangen.errors import LeangenError, RequestError
from leangen.serve import problems
from leangen.serve.problems import (
    AuthError,
    DeadlineError,
    OverloadError,
    RateError,
    StoppingError,
    TooLargeError,
)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/", "/health", "/ready")
"""Need no key: they tell nothing of what is served to whom."""
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")
BODY_S = 30.0
LINGER_S = 10.0
"""What is still sent of a body that is too large is read so long: a client that were cut off in the
middle would not see the answer."""
MOST_CONNECTIONS = 512
UPLOAD_BYTES = {"/v1/audio/transcriptions": 26_000_000, "/v1/audio/translations": 26_000_000}
"""What sound may be sent, as to OpenAI; other bodies are JSON."""
LEAST_KEY = 16
MOST_CLIENTS = 10_000


def read_keys(path: Path) -> dict[str, bytes]:
    """Client name to the key's SHA-256. Raises RequestError for a file that holds no keys."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the API keys in {path}: {error}") from error
    keys: dict[str, bytes] = {}
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        name, _, key = line.rpartition(":")
        if len(key) < LEAST_KEY:
            raise RequestError(
                f"{path}, line {number}: a key has at least {LEAST_KEY} characters; "
                "`openssl rand -hex 24` makes one"
            )
        keys[name or f"key-{number}"] = hashlib.sha256(key.encode()).digest()
    if not keys:
        raise RequestError(f"{path} holds no API key: expected one a line, KEY or NAME:KEY")
    return keys


class Access:
    """Wraps the app: host names, keys, body sizes, and one line of log per request."""

    def __init__(
        self,
        app: App,
        *,
        keys: dict[str, bytes] | None,
        local: bool,
        max_body_bytes: int,
        per_minute: int | None,
        refused: Callable[[str], None],
    ) -> None:
        self._app = app
        self._keys = keys
        self._local = local
        self._max_body_bytes = max_body_bytes
        self._per_minute = per_minute
        self._seen: dict[str, tuple[float, int]] = {}
        self._refused = refused
        self.connections: Callable[[], int] = lambda: 0
        """How many there are, where the web server tells."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begin_ns = clock.monotonic_ns()
        told: dict[str, Any] = {"status": 0}
        scope["leangen"] = told
        headers = {name.lower(): value for name, value in scope["headers"]}

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                told["status"] = message["status"]
            await send(message)

        try:
            if self.connections() > MOST_CONNECTIONS:
                raise OverloadError("too many connections: try again in a few seconds")
            self._check_host(headers)
            told["client"] = self._client(scope, headers)
            if scope["method"] == "POST":
                self._count(told["client"])
            body = await self._body(headers, receive, scope["path"])
            await self._app(scope, _replay(body, receive), watched)
        except LeangenError as error:
            await _answer(error, watched, receive)
        except asyncio.CancelledError:
            # The web server gives up on what has not ended within its grace.
            if not told["status"]:
                stopping = StoppingError("the server is shutting down: ask again")
                await _answer(stopping, watched, receive)
        finally:
            if told["status"] >= 400:
                self._refused(str(told["status"]))
            _log(scope, told, clock.monotonic_ns() - begin_ns)

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """A page of another site may not spend this machine's energy.

        Neither by a name that it makes resolve to this machine (DNS rebinding), nor by a request
        whose answer the browser would not show it: a form with sound needs nobody's leave.
        """
        if not self._local:
            return
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if _name(host) not in LOCAL_NAMES:
            raise RequestError(
                f"host {host[:80]!r} is not this machine: use http://127.0.0.1 or localhost"
            )
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        if origin and _name(origin.partition("://")[2]) not in LOCAL_NAMES:
            raise RequestError(f"pages of {origin[:80]!r} may not ask this server")

    def _client(self, scope: Scope, headers: dict[bytes, bytes]) -> str:
        if self._keys is None or scope["path"] in OPEN_PATHS:
            peer = scope.get("client")
            return peer[0] if peer else ""
        kind, _, key = headers.get(b"authorization", b"").partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        # Every key is compared, each in constant time: the time tells nothing of the keys.
        found = [name for name, known in self._keys.items() if hmac.compare_digest(known, digest)]
        if kind.lower() != b"bearer" or not found:
            raise AuthError("the API key is missing or wrong: send `Authorization: Bearer KEY`")
        return found[0]

    def _count(self, client: str) -> None:
        """A bucket of `per_minute` requests that fills again evenly."""
        if self._per_minute is None:
            return
        now_ns = clock.monotonic_ns()
        left, before_ns = self._seen.pop(client, (float(self._per_minute), now_ns))
        left = min(self._per_minute, left + (now_ns - before_ns) / 60e9 * self._per_minute)
        self._seen[client] = (left - 1 if left >= 1 else left, now_ns)
        while len(self._seen) > MOST_CLIENTS:  # the one that was quiet for longest
            del self._seen[next(iter(self._seen))]
        if left < 1:
            wait_s = math.ceil((1 - left) * 60 / self._per_minute)
            raise RateError(
                f"more than {self._per_minute} requests a minute: try again in {wait_s} s", wait_s
            )

    async def _body(self, headers: dict[bytes, bytes], receive: Receive, path: str) -> bytes:
        limit = UPLOAD_BYTES.get(path, self._max_body_bytes)
        stated = headers.get(b"content-length", b"0")
        if stated.isdigit() and int(stated) > limit:
            raise TooLargeError(f"the body has {int(stated)} bytes, at most {limit} are taken")
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        break
                    body += message.get("body", b"")
                    if len(body) > limit:
                        raise TooLargeError(f"the body has more than the {limit} bytes taken")
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise DeadlineError(f"the body did not arrive within {BODY_S:g} s") from None
        return bytes(body)


def _name(host: str) -> str:
    """Without the port."""
    return host if host.endswith("]") else host.rsplit(":", 1)[0]


def _replay(body: bytes, receive: Receive) -> Receive:
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


async def _answer(error: LeangenError, send: Send, receive: Receive) -> None:
    content = json.dumps(problems.body(error)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(content)).encode()),
    ]
    if isinstance(error, TooLargeError | DeadlineError | OverloadError):
        headers.append((b"connection", b"close"))  # what was sent is not used
    if isinstance(error, RateError):
        headers.append((b"retry-after", str(error.retry_after_s).encode()))
    if isinstance(error, AuthError):
        headers.append((b"www-authenticate", b"Bearer"))
    await send(
        {"type": "http.response.start", "status": problems.status(error), "headers": headers}
    )
    await send({"type": "http.response.body", "body": content, "more_body": True})
    if isinstance(error, TooLargeError):
        await _discard(receive)
    await send({"type": "http.response.body"})


async def _discard(receive: Receive) -> None:
    """Read the rest of a body, for `LINGER_S` at most."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            more = True
            while more:
                more = (await receive()).get("more_body", False)


def _log(scope: Scope, told: dict[str, Any], elapsed_ns: int) -> None:
    """One JSON line; neither prompts nor keys."""
    line = {
        "time": clock.utc_now(),
        "method": scope["method"],
        "path": scope["path"][:200],
        "ms": round(elapsed_ns / 1e6, 1),
        **told,
    }
    say(json.dumps(line))
