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

CHUNK = 65_536
STEP_SECONDS = 20.0
"""Timeout for a single network operation, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaPolicy:
    """What `Clip.open` may read.

    On a server whose clients choose clips, use `MediaPolicy(files=False, urls=False)`, or `urls=True` with `hosts`.

    files: whether paths and `file://` are allowed. urls: whether `http://` and `https://` are allowed; their content is
    loaded into memory. hosts: the allowed hosts, also for redirects; None for all.
    max_bytes, max_seconds: limits of a download; max_bytes also limits file objects.
    """

    files: bool = True
    urls: bool = True
    hosts: frozenset[str] | None = None
    max_bytes: int = 2**30
    max_seconds: float | int = 120.0

    def check_url(self, url: str) -> None:
        """Raise UnreadableMedia if the policy forbids this URL."""
        try:
            parts = urlsplit(url)
            scheme, host = parts.scheme.lower(), parts.hostname
        except ValueError as error:
            raise UnreadableMedia(f"{without_query(url)} is not a URL: {error}", "check the address") from None
        if scheme not in ("http", "https") or not host:
            raise UnreadableMedia(f"{without_query(url)} is not an http address", "use http:// or https://")
        if not self.urls:
            raise UnreadableMedia(f"{without_query(url)} is not loaded: URLs are disabled here", "give a file")
        if self.hosts is not None and host not in self.hosts:
            raise UnreadableMedia(
                f"{without_query(url)} is not loaded: {host} is not an allowed host",
                f"allowed: {', '.join(sorted(self.hosts)) or 'none'}",
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
        opener = build_opener(_Redirects(policy))
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

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        self._policy.check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _too_large_error(url: str, policy: MediaPolicy) -> UnreadableMedia:
    return UnreadableMedia(
        f"{without_query(url)} is larger than {policy.max_bytes:,} bytes", "save it to a file and open that"
    )


def _timeout_error(url: str, policy: MediaPolicy) -> UnreadableMedia:
    return UnreadableMedia(
        f"{without_query(url)} could not be loaded within {policy.max_seconds:g} s", "save it to a file and open that"
    )
