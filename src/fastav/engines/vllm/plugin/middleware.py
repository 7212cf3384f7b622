"""ASGI middleware for vLLM's server: the usage of a response says what the plan kept.

vLLM takes it by `--middleware`, for which it is documented. It changes responses of two routes: `usage.fastav` of a
whole response, and of the last chunk of a stream whose client asks for the usage.
"""

import json
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from fastav.engines.vllm.plugin.requests import require_plugin
from fastav.engines.vllm.plugin.usage import PromptUsage, collecting, merged

PATHS = ("/v1/chat/completions", "/v1/completions")
Message = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]


class UsageMiddleware:
    """Adds `usage.fastav`.  Raises: FastAVError when the server starts, if vLLM has not loaded the plugin."""

    def __init__(self, app: Any) -> None:
        require_plugin()
        self._app = app

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http" or not scope["path"].endswith(PATHS):
            await self._app(scope, receive, send)
            return
        with collecting() as usages:
            await self._app(scope, receive, _Response(send, usages).send)


class _Response:
    """A response on its way out.  usages: of the prompts that the request brought."""

    def __init__(self, send: Send, usages: list[PromptUsage]) -> None:
        self._send, self._usages = send, usages
        self._start: Message | None = None  # held back until the length of a whole response is known
        self._is_stream = False
        self._rest = b""  # a whole response so far; of a stream, a line that has not ended

    async def send(self, message: Message) -> None:
        """Pass on a message of the response."""
        if message["type"] == "http.response.start":
            kind = dict(message["headers"]).get(b"content-type", b"")
            self._is_stream = kind.startswith(b"text/event-stream")
            if not self._is_stream and kind.startswith(b"application/json"):
                self._start = message
                return
        elif message["type"] == "http.response.body":
            if self._is_stream:
                message = {**message, "body": self._edited_lines(message)}
            elif self._start is not None:
                self._rest += message.get("body", b"")
                if message.get("more_body", False):
                    return
                await self._send_whole()
                return
        await self._send(message)

    async def _send_whole(self) -> None:
        assert self._start is not None
        body = self._with_usage(self._rest)
        headers = [(name, value) for name, value in self._start["headers"] if name.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await self._send({**self._start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    def _edited_lines(self, message: Message) -> bytes:
        """The lines that have ended with this message."""
        *lines, self._rest = (self._rest + message.get("body", b"")).split(b"\n")
        if not message.get("more_body", False):
            lines, self._rest = [*lines, self._rest], b""
            return b"\n".join(map(self._edited_line, lines))
        return b"".join(self._edited_line(line) + b"\n" for line in lines)

    def _edited_line(self, line: bytes) -> bytes:
        """A line of a stream; its usage stands in a chunk without choices."""
        if not line.startswith(b"data: {") or b'"choices":[]' not in line:
            return line
        return b"data: " + self._with_usage(line.removeprefix(b"data: "))

    def _with_usage(self, body: bytes) -> bytes:
        """A JSON object with `usage.fastav`, if it has a usage."""
        if (ours := merged(self._usages)) is None:
            return body
        response = json.loads(body)
        if not isinstance(response, dict) or not isinstance(response.get("usage"), dict):
            return body
        response["usage"]["fastav"] = ours
        return json.dumps(response, ensure_ascii=False, separators=(",", ":")).encode()
