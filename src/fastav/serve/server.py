"""The server process: a pipeline behind uvicorn."""

import asyncio
import ipaddress
import json
import os
import re
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fastav.errors import FastAVError
from fastav.pipelines import Pipeline
from fastav.serve.app import Served, create_app
from fastav.serve.content import MediaAccess
from fastav.serve.decoder import MediaDecoder
from fastav.serve.files import FileStore
from fastav.serve.guard import Guard, error_object
from fastav.serve.limits import Limits

HEADER_SECONDS = 20.0
"""How long a connection may take to send the headers of its first or next request."""

READ_SECONDS = 30.0
"""How long a client may read nothing of its response."""

CHECK_SECONDS = 2.0
"""Seconds between two looks at what a client reads."""

LINGER_SECONDS = 2.0
"""How long a client may go on to send what is refused."""

MAX_CONNECTIONS = 512
"""Connections at the same time; more are cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How a server is reached, and what it takes.

    host, port: to bind; port 0 for any. keys: API keys, one of which a client must send; none: no key is needed.
    hosts: names for the Host header besides those of `host`. root, domains, private: as for `MediaAccess`. batch:
    answers that run together at most. decoders: processes that decode media. limits: of each request.

    Raises: FastAVError for values that cannot be used, and for a server that others reach without a key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str
    keys: Sequence[str] = ()
    hosts: Sequence[str] = ()
    root: Path | None = None
    domains: frozenset[str] | None = None
    private: bool = False
    batch: int = 8
    decoders: int = 2
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not (self.keys or is_loopback(self.host)):
            raise FastAVError(
                f"on {self.host} other machines reach the server, and it has no API key",
                "set FASTAV_API_KEY, or --api-key",
            )
        if not 0 <= self.port < 2**16:
            raise FastAVError(f"a port is a number from 0 to 65535, got {self.port}")
        if any(not key or not key.isascii() or any(map(str.isspace, key)) for key in self.keys):
            raise FastAVError("an API key must be ASCII without spaces, and not empty")
        for domain in self.domains or ():
            if not re.fullmatch(r"[\w.-]+|\[?[0-9a-f:.]+\]?", domain):
                raise FastAVError(f"{domain!r} is not the name of a host", "such as media.example.org, without http://")
        if self.root is not None and not self.root.is_dir():
            raise FastAVError(f"{self.root} is not a folder", "--media-root names the folder that clients may read")

    @property
    def allowed_hosts(self) -> list[str] | None:
        """What the Host header may name: on this machine alone if the server is bound to it; None for all."""
        if not is_loopback(self.host):
            return [host.lower() for host in self.hosts] or None
        return ["localhost", "127.0.0.1", "::1", self.host.lower(), *(host.lower() for host in self.hosts)]


def is_loopback(host: str) -> bool:
    """Whether a host to bind is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def serve(
    pipe: Pipeline,
    options: ServerOptions,
    *,
    on_ready: Callable[[str], None] = lambda url: None,
    on_stopping: Callable[[int], None] = lambda answers: None,
) -> None:
    """Serve a pipeline until SIGINT or SIGTERM; what runs then is finished.

    pipe: of the engine transformers; it is closed at the end. on_ready: called with the server's URL. on_stopping:
    called at a signal, with the number of answers that are finished before the end; a second SIGINT ends the process.
    Raises: FastAVError if the address cannot be bound.
    """
    with bound_socket(options.host, options.port) as listening:
        server, _ = make_server(pipe, options, lambda: on_ready(url_of(listening)), on_stopping)
        server.run(sockets=[listening])


def make_server(
    pipe: Pipeline,
    options: ServerOptions,
    on_ready: Callable[[], None] = lambda: None,
    on_stopping: Callable[[int], None] = lambda answers: None,
) -> tuple[uvicorn.Server, Served]:
    """A server that does not run yet, and what its routes share.

    on_ready: called when it serves. on_stopping: as for `serve`.

    `run(sockets=[...])` serves until `should_exit` is set, and then closes what the routes share, the pipe included.
    """
    engine: Any = pipe.engine
    limits = options.limits
    decoder = MediaDecoder(pipe.adapter, engine.processor, limits, workers=options.decoders)
    access = MediaAccess(
        files=FileStore(limits.files_bytes),
        limits=limits,
        root=options.root,
        domains=options.domains,
        private=options.private,
    )
    served = Served(pipe, options.name, decoder, access, batch=options.batch)
    guard = Guard(
        create_app(served),
        limits,
        keys=options.keys,
        hosts=options.allowed_hosts,
        on_response=served.metrics.response,
    )
    config = uvicorn.Config(
        guard,
        log_level="error",  # warnings are about what clients send
        access_log=False,
        server_header=False,
        http=_TimedProtocol,
        ws="none",
        lifespan="on",
        timeout_keep_alive=int(HEADER_SECONDS),
        timeout_graceful_shutdown=int(limits.request_seconds) + 1,
        proxy_headers=False,
        h11_max_incomplete_event_size=32 * 1024,
    )
    return _Server(config, on_ready, lambda: on_stopping(served.scheduler.admitted)), served


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening socket.  Raises: FastAVError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise FastAVError(
            f"the server cannot use {host} port {port}: {error.strerror or error}", "choose another --port or --host"
        ) from None
    return listening


def url_of(listening: socket.socket) -> str:
    """The URL at which a socket is reached from this machine."""
    host, port = listening.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn's server, which tells when it is ready."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None], on_stopping: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready, self._on_stopping = on_ready, on_stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish what runs, and return from `run` as if nothing had happened; at a second SIGINT, end at once."""
        if self.should_exit and sig == signal.SIGINT:
            os._exit(128 + sig)  # a model in mid-answer stops in no other way; decoding processes end by themselves
        self.should_exit = True
        self._on_stopping()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then tell."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()


class _TimedProtocol(H11Protocol):
    """uvicorn's protocol, which ends connections of clients that do not send or read in time.

    A client must send the headers of its first and next requests in time. A response is closed once it is sent; if the
    client reads nothing of what waits to be sent, the connection is cut, with what runs for it.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Begin to wait for headers."""
        super().connection_made(cast(Any, _Lingering(transport, self)))
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
            return
        self._unsent, self._since = 0, self.loop.time()  # bytes that wait for the client, and since when it reads none
        self._watch = self.loop.call_later(CHECK_SECONDS, self._cut_if_unread)
        self._wait_for_headers()

    @property
    def is_sending(self) -> bool:
        """Whether the client still sends the body of a request that is answered."""
        return self.conn.their_state is h11.SEND_BODY

    def data_received(self, data: bytes) -> None:
        """Pass on what the client sends, unless the connection is being closed."""
        if not self.transport.is_closing():
            super().data_received(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        if (watch := getattr(self, "_watch", None)) is not None:
            watch.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Begin to wait for the next request's."""
        super().on_response_complete()
        self._wait_for_headers()

    def shutdown(self) -> None:
        """Begin to shut down: requests that have arrived are answered."""
        if self.cycle is not None and not self.cycle.response_complete and self.cycle.more_body:
            self.transport.abort()
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP, as an error of the API; in the middle of a response, the connection ends."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        body = json.dumps(error_object("this is not HTTP", "invalid_request", 400)).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _cut_if_unread(self) -> None:
        unsent, now = self.transport.get_write_buffer_size(), self.loop.time()
        if not unsent or unsent < self._unsent:
            self._since = now
        self._unsent = unsent
        if now - self._since >= READ_SECONDS:
            self.transport.abort()
        else:
            self._watch = self.loop.call_later(CHECK_SECONDS, self._cut_if_unread)

    def _wait_for_headers(self) -> None:
        self.loop.call_later(HEADER_SECONDS, self._close_if_idle, self.cycle)

    def _close_if_idle(self, cycle: Any) -> None:
        """Close, unless another request has begun since.  cycle: uvicorn's last request at that time."""
        if self.cycle is cycle and (cycle is None or cycle.response_complete) and not self.transport.is_closing():
            self.transport.close()


class _Lingering:
    """A transport whose `close` lets the client read the last response although it still sends its request.

    To close at once would reset the connection, by which the client can lose the response. What it sends is dropped.
    """

    def __init__(self, transport: asyncio.Transport, protocol: _TimedProtocol) -> None:
        self._transport, self._protocol, self._is_closing = transport, protocol, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Whether `close` was called, or the connection is lost."""
        return self._is_closing or self._transport.is_closing()

    def close(self) -> None:
        """Close once everything is sent, and the client has stopped to send or had its time."""
        if self._is_closing or not self._protocol.is_sending or self._transport.is_closing():
            self._transport.close()
            return
        self._is_closing = True
        self._transport.write_eof()
        self._transport.resume_reading()
        self._protocol.loop.call_later(LINGER_SECONDS, self._transport.close)
