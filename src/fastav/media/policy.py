"""Limits on the sources of clips, and download over HTTP."""

from dataclasses import dataclass
from http.client import HTTPException, HTTPMessage
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from fastav.errors import UnreadableMedia, reason_of
from fastav.media._public import host_name, public_handlers

CHUNK = 65_536
STEP_SECONDS = 20.0
"""Timeout for a single network operation, in seconds."""

WEB_PORTS = frozenset({80, 443})

MAX_REDIRECTS = 5
"""Redirects that are followed if only public addresses are allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaPolicy:
    """What `Clip.open` may read.

    On a server whose clients choose clips, use `MediaPolicy(files=False, urls=False)`, or `urls=True` with
    `public_only`, and with `hosts` if they are known.

    files: whether paths and `file://` are allowed. urls: whether `http://` and `https://` are allowed; their content is
    loaded into memory. hosts: the allowed hosts, also for redirects; None for all. ports: the allowed ports; None for
    all, or with public_only for 80 and 443.
    public_only: whether hosts must have public addresses, so that no URL reaches this machine or its network. A name is
    resolved once, and the connection is made to the address that was checked, also after each redirect, of which at
    most 5 are followed. URLs with a user's name or a password are refused, and proxies of the environment are not used.
    max_bytes, max_seconds: limits of a download; max_bytes also limits file objects.
    max_pixels: largest width times height of a picture or frame. formats: FFmpeg's names of the formats of files that
    are opened. None for all.
    """

    files: bool = True
    urls: bool = True
    hosts: frozenset[str] | None = None
    ports: frozenset[int] | None = None
    public_only: bool = False
    max_bytes: int = 2**30
    max_seconds: float | int = 120.0
    max_pixels: int | None = None
    formats: frozenset[str] | None = None

    def check_url(self, url: str) -> None:
        """Raise UnreadableMedia if the policy forbids this URL."""
        address = without_query(url)
        try:
            parts = urlsplit(url)
            scheme, host = parts.scheme.lower(), parts.hostname
            port = parts.port or (443 if scheme == "https" else 80)
        except ValueError as error:
            raise UnreadableMedia(f"{address} is not a URL: {error}", "check the address") from None
        if scheme not in ("http", "https") or not host:
            raise UnreadableMedia(f"{address} is not an http address", "use http:// or https://")
        if not self.urls:
            raise UnreadableMedia(f"{address} is not loaded: URLs are disabled here", "give a file")
        if self.public_only and "@" in parts.netloc:
            raise UnreadableMedia("a URL with a user or a password is not loaded", "leave them out")
        if self.public_only and "%" in parts.netloc:  # it would be decoded after these checks
            raise UnreadableMedia(f"{address} is not loaded: {parts.netloc} is no host", "write the host's name")
        if self.hosts is not None and host_name(host) not in map(host_name, self.hosts):
            raise UnreadableMedia(
                f"{address} is not loaded: {host} is not an allowed host",
                f"allowed: {', '.join(sorted(self.hosts)) or 'none'}",
            )
        if (ports := WEB_PORTS if self.public_only and self.ports is None else self.ports) is None:
            return
        if port not in ports:
            raise UnreadableMedia(
                f"{address} is not loaded: {port} is not an allowed port",
                f"allowed: {', '.join(map(str, sorted(ports))) or 'none'}",
            )


OPEN = MediaPolicy()


def fetch(url: str, policy: MediaPolicy) -> bytes:
    """The content of a URL.

    Raises: UnreadableMedia if the policy forbids it, the download fails or is incomplete, or it exceeds a limit.
    """
    policy.check_url(url)
    outcomes: SimpleQueue[bytes | Exception] = SimpleQueue()
    # a thread, because socket timeouts do not limit the total time of name lookup, handshake and slow headers
    Thread(target=lambda: outcomes.put(_download(url, policy)), daemon=True, name="fastav-fetch").start()
    try:
        outcome = outcomes.get(timeout=policy.max_seconds)
    except Empty:
        outcome = _timeout_error(url, policy)
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def without_query(url: str) -> str:
    """A URL for messages, without the parts after the path, which can have secrets."""
    return url.partition("?")[0].partition("#")[0]


def _download(url: str, policy: MediaPolicy) -> bytes | Exception:
    address, end = without_query(url), monotonic() + policy.max_seconds
    try:
        opener = build_opener(_Redirects(policy), *(public_handlers() if policy.public_only else ()))
        request = Request(url, headers={"User-Agent": "fastav", "Accept": "*/*", "Accept-Encoding": "identity"})
        with opener.open(request, timeout=min(STEP_SECONDS, policy.max_seconds)) as response:
            content_length = response.headers.get("Content-Length", "")
            size = int(content_length) if content_length.isdecimal() else None
            if size is not None and size > policy.max_bytes:
                return _too_large_error(url, policy)
            content = bytearray()
            while chunk := response.read1(CHUNK):
                content += chunk
                if len(content) > policy.max_bytes:
                    return _too_large_error(url, policy)
                if monotonic() > end:
                    return _timeout_error(url, policy)
        if size is not None and len(content) < size:
            reason = f"the connection ended after {len(content):,} of {size:,} bytes"
            return UnreadableMedia(f"{address} cannot be loaded: {reason}", "try again")
        return bytes(content)
    except UnreadableMedia as error:
        return error.with_traceback(None)
    except HTTPError as error:
        return UnreadableMedia(f"{address} cannot be loaded: HTTP {error.code} {error.reason}", "check the address")
    except (URLError, HTTPException, OSError, ValueError) as error:
        if isinstance(getattr(error, "reason", error), TimeoutError):
            return _timeout_error(url, policy)
        return UnreadableMedia(f"{address} cannot be loaded: {reason_of(error)}", "check the address")
    except Exception as error:  # the waiting thread raises it
        return error


class _Redirects(HTTPRedirectHandler):
    """Follows only redirects that the policy allows."""

    def __init__(self, policy: MediaPolicy) -> None:
        self._policy = policy
        self._left = MAX_REDIRECTS

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        self._policy.check_url(newurl)
        self._left -= 1
        if self._policy.public_only and self._left < 0:
            raise UnreadableMedia(f"{without_query(newurl)} is not loaded: too many redirects", "give its own address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _too_large_error(url: str, policy: MediaPolicy) -> UnreadableMedia:
    return UnreadableMedia(
        f"{without_query(url)} is larger than {policy.max_bytes:,} bytes", "save it to a file and open that"
    )


def _timeout_error(url: str, policy: MediaPolicy) -> UnreadableMedia:
    return UnreadableMedia(
        f"{without_query(url)} could not be loaded within {policy.max_seconds:g} s", "save it to a file and open that"
    )
