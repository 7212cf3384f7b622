"""What every request must pass before it reaches the application: host, origin, key, size and time."""

import asyncio
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from fastav.serve.limits import Limits

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
OnResponse = Callable[[str, int, float], None]

BODY_SECONDS = 30.0
"""How long a client may send nothing while its body is expected."""

BODIES = 8
"""The largest bodies that are held at the same time."""

EXTRA_REQUESTS = 64
"""Requests beside those that wait for answers: of the page, of health checks, and of clients that are refused."""

HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' data: blob:; media-src 'self' data: blob:; style-src 'self' "
        b"'unsafe-inline'; script-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        b"frame-ancestors 'none'",
    ),
)
OPEN_PATHS = ("/health", "/", "/favicon.ico")  # without a key; and all below /static/

_log = logging.getLogger(__name__)


class Guard:
    """An ASGI application around another.

    keys: one of these must be sent as a bearer token; none: no key is needed. hosts: names that the Host header may
    have, lower case, without port; None for all. on_response: called with the route, the status and the seconds of each
    response.

    A page of another site can reach a server on this machine through the
    visitor's browser; so requests of other origins are refused.
    """

    def __init__(
        self,
        app: App,
        limits: Limits,
        *,
        keys: Collection[str] = (),
        hosts: Collection[str] | None = None,
        on_response: OnResponse = lambda path, status, seconds: None,
    ) -> None:
        self._app, self._limits, self._on_response = app, limits, on_response
        self._bodies, self._running = _Bodies(BODIES * limits.body_bytes), 0
        self._keys = [key.encode() for key in keys]
        self._hosts = None if hosts is None else frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or refuse it."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, exchange = time.monotonic(), _Exchange(receive, send, self._limits, self._bodies)
        self._running += 1
        try:
            await self._serve(scope, exchange)
        finally:
            self._running -= 1
            exchange.close()
            route = scope.get("route")  # unlike the paths that clients make up, routes are few
            self._on_response(getattr(route, "path", "other"), exchange.status, time.monotonic() - start)

    async def _serve(self, scope: Scope, exchange: "_Exchange") -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if (refusal := self._refusal(scope, headers)) is not None:
            await exchange.refuse(*refusal)
            return
        try:
            async with asyncio.timeout(2 * self._limits.request_seconds):
                await self._app(scope, exchange.receive, exchange.send)
        except _Refused:
            return  # the client has been told
        except TimeoutError:
            await exchange.refuse(504, "the request took too long", "timeout")
        except Exception as error:
            if exchange.is_refused:
                return
            _log.error("an internal error", exc_info=error)
            await exchange.refuse(500, "internal error", "internal_error")

    def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, str, str] | None:
        """Status, message and code of an error, if the request must not be served."""
        if self._running > self._limits.queue + EXTRA_REQUESTS:
            return 503, "the server has too many requests: try again later", "busy"
        host = _host_of(headers.get(b"host", b"").decode("latin-1"))
        if self._hosts is not None and host not in self._hosts:
            return 403, f"this server does not answer for the host {host[:80]!r}", "host_not_allowed"
        if (origin := headers.get(b"origin")) is not None and not _is_same(origin, headers.get(b"host", b"")):
            return 403, "requests from pages of other origins are refused", "cross_origin"
        if headers.get(b"sec-fetch-site") in (b"cross-site", b"same-site") and scope["method"] != "GET":
            return 403, "requests from pages of other sites are refused", "cross_origin"
        path = scope["path"]
        is_open = path in OPEN_PATHS or path.startswith("/static/")
        if self._keys and not is_open and not self._has_key(headers.get(b"authorization", b"")):
            return 401, "the API key is missing or wrong", "invalid_api_key"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            return 400, "Content-Length is not a number", "invalid_request"
        if int(length) > self._limits.body_bytes:
            return 413, _too_large(self._limits), "too_large"
        return None

    def _has_key(self, value: bytes) -> bool:
        scheme, _, given = value.partition(b" ")
        matches = [hmac.compare_digest(given.strip(), key) for key in self._keys]  # all, so that time tells nothing
        return scheme.lower() == b"bearer" and any(matches)


class _Refused(Exception):
    """A body is not read to its end, and the client has an error.  What the application sends is dropped."""


class _Bodies:
    """The bytes of the bodies of all requests.  most: that are held at the same time."""

    def __init__(self, most: int) -> None:
        self.total, self.most = 0, most


class _Exchange:
    """The messages of one request: bodies are bounded in size and time, responses get the headers of a safe page."""

    def __init__(self, receive: Receive, send: Send, limits: Limits, bodies: "_Bodies") -> None:
        self._receive, self._send, self._limits, self._bodies = receive, send, limits, bodies
        self._bytes, self._has_body = 0, False
        self.status = 0  # none was sent yet
        self.is_refused = False

    async def receive(self) -> Message:
        """The next message of the client."""
        if self._has_body:
            return await self._receive()  # that it has left
        try:
            async with asyncio.timeout(BODY_SECONDS):
                message = await self._receive()
        except TimeoutError:
            await self.refuse(408, "the body did not arrive in time", "timeout")
            raise _Refused from None
        self._bytes += (size := len(message.get("body", b"")))
        self._bodies.total += size
        self._has_body = message["type"] != "http.request" or not message.get("more_body", False)
        if self._bytes > self._limits.body_bytes:
            await self.refuse(413, _too_large(self._limits), "too_large")
            raise _Refused
        if self._bodies.total > self._bodies.most:
            await self.refuse(503, "too many large requests at the same time: try again later", "busy")
            raise _Refused
        return message

    def close(self) -> None:
        """Forget the body."""
        self._bodies.total -= self._bytes
        self._bytes = 0

    async def refuse(self, status: int, message: str, code: str) -> None:
        """Send an error, unless a response has begun; that one stays incomplete, and the connection is closed."""
        if not self.status:
            self.status, self.is_refused = status, True
            await _respond(self._send, status, message, code)

    async def send(self, message: Message) -> None:
        """Pass on a message of the application."""
        if self.is_refused:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            present = {name.lower() for name, _ in message.get("headers", ())}
            extra = [(name, value) for name, value in HEADERS if name not in present]
            message = {**message, "headers": [*message.get("headers", ()), *extra]}
        await self._send(message)


def error_object(message: str, code: str, status: int, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's API has it.  param: the field of the request that is wrong."""
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _respond(send: Send, status: int, message: str, code: str) -> None:
    body = json.dumps(error_object(message, code, status)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *HEADERS]
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    headers += [(b"retry-after", b"5")] if status == 503 else []
    headers += [(b"connection", b"close")] if status == 408 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _host_of(value: str) -> str:
    """The host of a Host header, lower case, without port and brackets."""
    try:
        return (urlsplit(f"//{value}").hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_same(origin: bytes, host: bytes) -> bool:
    try:
        place = urlsplit(origin.decode("latin-1")).netloc.lower()
    except ValueError:
        return False
    return bool(place) and place == host.decode("latin-1").lower()


def _too_large(limits: Limits) -> str:
    return f"a body may have {limits.body_bytes:,} bytes here"
