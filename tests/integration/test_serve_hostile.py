"""What clients must not be able to do to the server, to each other and to files, and what they are told instead."""

import asyncio
import base64
import http.client
import json
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fastav.serve import content, server
from fastav.serve.files import FileStore
from fastav.serve.limits import Limits
from support.serving import MODEL, Serving, serving, started

EXAMPLE, JSON = "example-triangle", ("Content-Type", "application/json")
BODY_BYTES = 2**20
KEY = "a-key"
INSIDE = re.compile(r"Traceback|site-packages|\.py\b|/tmp/|/usr/|/root|/home|0x[0-9a-f]{6}")

Reply = tuple[int, dict[str, str], bytes]  # status, headers by lower-case name, body


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder that clients may read, and what must not be read through it."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "text.txt").write_text("hi")
    (folder / "inner").mkdir()
    os.symlink("loop-2", folder / "loop-1")
    os.symlink("loop-1", folder / "loop-2")
    os.symlink("/etc/passwd", folder / "out")
    os.symlink("/etc", folder / "etc")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.fixture(scope="module")
def target(root):
    """A server with tight limits, which looks often at whether clients read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "READ_SECONDS", 2.0)
        patch.setattr(server, "CHECK_SECONDS", 0.5)
        limits = Limits(body_bytes=BODY_BYTES, request_seconds=20, new_tokens=1000, queue=8)
        with serving(root=root, limits=limits) as running:
            yield running


@pytest.fixture(autouse=True)
def _nothing_left(request):
    """After a test no place in the queue, connection or task is left."""
    yield
    if "target" in request.fixturenames:
        rest(request.getfixturevalue("target"))


def rest(running: Serving, seconds: float = 15.0) -> None:
    """Wait until a server has nothing to do."""
    scheduler, state = running.served.scheduler, running.server.server_state
    end = time.monotonic() + seconds

    def left() -> dict[str, int]:
        return {
            "admitted": scheduler.admitted,
            "waiting": scheduler.waiting,
            "connections": len(state.connections),
            "tasks": len(state.tasks),
        }

    while any(left().values()):
        assert time.monotonic() < end, left()
        time.sleep(0.02)


def exchange(running: Serving, data: bytes, seconds: float = 20.0) -> bytes:
    """All bytes that the server sends until it closes the connection."""
    with socket.create_connection(running.address, timeout=seconds) as connection:
        connection.sendall(data)
        return read(connection)


def read(connection: socket.socket) -> bytes:
    parts = []
    try:
        while part := connection.recv(65_536):
            parts.append(part)
    except ConnectionResetError:  # the server has closed without reading the rest of a body
        pass
    return b"".join(parts)


def message(method: str, path: str, *headers: tuple[str, str], body: bytes | None = None, close: bool = True) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    lines += ["Host: localhost"] * (not any(name == "Host" for name, _ in headers))
    lines += [] if body is None else [f"Content-Length: {len(body)}"]
    lines += ["Connection: close"] if close else []
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def split(data: bytes) -> Reply:
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(first.split()[1]), headers, body


def ask(running: Serving, method: str, path: str, *headers: tuple[str, str], body: bytes | None = None) -> Reply:
    return split(exchange(running, message(method, path, *headers, body=body)))


def error_of(reply: Reply) -> tuple[int, str]:
    """Status and code of an error in OpenAI's form, whose message tells nothing of the server's inside."""
    status, headers, body = reply
    assert headers["content-type"].startswith("application/json"), body
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    kind = "server_error" if status >= 500 else "rate_limit_error" if status == 429 else "invalid_request_error"
    assert error["type"] == kind
    assert 0 < len(error["message"]) < 1000
    assert not INSIDE.search(error["message"]), error
    return status, error["code"]


def chat(text: str | list[Any] = "which color moves?", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": 8} | fields


def clip(question: str = "describe the clip.", **fields: Any) -> dict[str, Any]:
    return chat([{"type": "file", "file": {"file_id": EXAMPLE}}, {"type": "text", "text": question}], **fields)


def post(running: Serving, body: Any, path: str = "/v1/chat/completions", *headers: tuple[str, str]) -> Reply:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return ask(running, "POST", path, JSON, *headers, body=data)


def texts(reply: Reply) -> list[str]:
    status, _, body = reply
    assert status == 200, body
    return [choice["message"]["content"] for choice in json.loads(body)["choices"]]


def unchunked(body: bytes) -> bytes:
    parts = []
    while body:
        size, _, body = body.partition(b"\r\n")
        parts.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]
    return b"".join(parts)


def streamed(reply: Reply) -> list[str]:
    """The texts of a stream, by choice."""
    status, _, body = reply
    assert status == 200, body
    events = [line.removeprefix("data: ") for line in unchunked(body).decode().split("\n\n") if line]
    assert events[-1] == "[DONE]"
    found: dict[int, str] = {}
    for event in map(json.loads, events[:-1]):
        for choice in event["choices"]:
            piece = choice["delta"].get("content") or ""
            found[choice["index"]] = found.get(choice["index"], "") + piece
    return [found[index] for index in sorted(found)]


# --- HTTP


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("HEAD", "/", 200),
        ("HEAD", "/v1/models", 200),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("PUT", "/v1/files", 405),
        ("TRACE", "/", 405),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/nowhere", 404),
        ("GET", "/health/", 404),
        ("GET", "/static/../../etc/passwd", 404),
        ("GET", "/static/%2e%2e/%2e%2e/etc/passwd", 404),
        ("GET", "/static/..%2f..%2fapp.py", 404),
        ("GET", "/v1/files/..%2f..%2fetc%2fpasswd", 404),
        ("GET", "/v1/files/%00", 404),
        ("GET", "/v1/examples/..%2fquestions.json", 404),
        ("GET", "/v1/examples/questions.json", 404),
        ("GET", "/v1/models/%0d%0aSet-Cookie:a", 404),
        ("GET", "//elsewhere/", 404),
    ],
)
def test_methods_and_paths(target, method, path, status):
    reply = ask(target, method, path)
    assert reply[0] == status
    assert not {"set-cookie", "location"} & set(reply[1])
    if method == "HEAD":
        assert reply[2] == b""
    elif status != 200:
        error_of(reply)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("Content-Length", "99999999999999999999")], 413),
        ([("Content-Length", str(BODY_BYTES + 1))], 413),
        ([("Content-Length", "-1")], 400),
        ([("Content-Length", "1"), ("Content-Length", "2")], 400),
        ([("Content-Length", "0x10")], 400),
        ([("Transfer-Encoding", "gzip")], 400),
    ],
)
def test_sizes_that_are_told(target, headers, status):
    assert error_of(ask(target, "POST", "/v1/chat/completions", JSON, *headers))[0] == status


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/inspect", "/v1/files"])
def test_a_body_without_a_size_is_too_large_once_it_is(target, path):
    kind = "multipart/form-data; boundary=x" if path == "/v1/files" else "application/json"
    start = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' if "files" in path else b'"'
    head = message("POST", path, ("Content-Type", kind), ("Transfer-Encoding", "chunked"), close=False)
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (start, *[b"a" * 65_536] * 17))
    reply = split(exchange(target, head + chunks + b"0\r\n\r\n" + message("GET", "/health")))
    length = int(reply[1]["content-length"])
    assert error_of((*reply[:2], reply[2][:length])) == (413, "too_large")
    assert reply[2][length:].startswith(b"HTTP/1.1 200")  # the connection still serves


@pytest.mark.parametrize("connection", ["close", "keep-alive"])
def test_a_client_that_sends_too_much_at_once_reads_why(target, connection):
    headers = {"Content-Type": "text/plain", "Connection": connection}
    connection = http.client.HTTPConnection(*target.address, timeout=20)
    connection.request("POST", "/v1/files", bytes(8 * BODY_BYTES), headers)
    with connection.getresponse() as response:
        assert response.status == 413
    connection.close()


@pytest.mark.parametrize(
    "data",
    [
        b"\x00\x01\x02\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"A: " + b"a" * 200_000,
        b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    ],
)
def test_what_is_not_http(target, data):
    assert error_of(split(exchange(target, data))) == (400, "invalid_request")


def test_what_is_not_http_after_a_response_has_begun(target, caplog):
    start = message("POST", "/nowhere", ("Transfer-Encoding", "chunked"), close=False) + b"5\r\nhello\r\n"
    with socket.create_connection(target.address, timeout=20) as connection:
        connection.sendall(start)
        begun = b""
        while not begun.endswith(b"}}"):
            begun += connection.recv(65_536)
        assert begun.startswith(b"HTTP/1.1 404")
        connection.sendall(b"ZZ\r\n")
        assert read(connection) == b""
    assert not caplog.records


def test_pipelined_requests_are_answered_in_turn(target):
    body = json.dumps(chat()).encode()
    one = message("POST", "/v1/chat/completions", JSON, body=body, close=False)
    found = exchange(target, one * 3 + message("GET", "/health"))
    assert found.count(b"HTTP/1.1 200") == 4
    assert found.endswith(b'{"status":"ok"}')


# --- pages of other sites, and keys


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("Origin", "http://localhost")], 200),
        ([("Origin", "http://localhost:1")], 403),
        ([("Origin", "http://evil.example")], 403),
        ([("Origin", "null")], 403),
        ([("Origin", "http://[")], 403),
        ([("Origin", "")], 403),
        ([("Sec-Fetch-Site", "cross-site")], 403),
        ([("Sec-Fetch-Site", "same-origin")], 200),
        ([("Host", "evil.example")], 403),
        ([("Host", "localhost.evil.example")], 403),
        ([("Host", "localhost@evil.example")], 403),
        ([("Host", "[::1")], 403),
        ([("Host", "")], 403),
        ([("Host", "LOCALHOST:99")], 200),
        ([("Host", "[::1]:80")], 200),
    ],
)
def test_pages_of_other_sites_are_refused(target, headers, status):
    reply = ask(target, "POST", "/v1/chat/completions", JSON, *headers, body=json.dumps(chat()).encode())
    assert reply[0] == status
    assert not [name for name in reply[1] if name.startswith("access-control")]
    if status != 200:
        error_of(reply)


def test_a_preflight_allows_nothing(target):
    headers = [("Origin", "http://evil.example"), ("Access-Control-Request-Method", "POST")]
    reply = ask(target, "OPTIONS", "/v1/chat/completions", *headers)
    assert error_of(reply) == (403, "cross_origin")
    assert not [name for name in reply[1] if name.startswith("access-control")]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_a_form_of_a_page_is_no_request(target, kind):
    body = json.dumps(chat()).encode()
    assert error_of(ask(target, "POST", "/v1/chat/completions", ("Content-Type", kind), body=body))[0] == 400


def test_every_route_wants_the_key():
    with serving(keys=[KEY, "another"], decoders=1) as guarded:
        for path, methods in routes(guarded):
            for method in methods:
                status = ask(guarded, method, path.replace("{identifier}", "x"))[0]
                is_open = path in ("/", "/health") or path.startswith("/static/")
                assert (status == 401) != is_open, (method, path, status)
        refused = ["", "Bearer", "Bearer ", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", "Bearer \xff"]
        for value in refused:
            reply = ask(guarded, "GET", "/v1/models", ("Authorization", value))
            assert error_of(reply) == (401, "invalid_api_key")
            assert reply[1]["www-authenticate"] == "Bearer"
        for value in (f"Bearer {KEY}", "bearer another"):
            assert ask(guarded, "GET", "/v1/models", ("Authorization", value))[0] == 200
        rest(guarded)


def routes(running: Serving) -> list[tuple[str, set[str]]]:
    app: Any = running.server.config.app
    found = [(route.path.replace(":path", ""), route.methods) for route in app._app.routes]
    assert len(found) > 12
    return found


# --- bodies of JSON


def nested(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


LONE = '"\\ud800"'
SAID = '{"role": "user", "content": "a"}'


@pytest.mark.parametrize(
    "fields",
    [
        "[" * 100_000,
        '"messages": [], "temperature": NaN',
        f'"messages": [{SAID}], "temperature": 1e999',
        f'"messages": [{SAID}], "seed": {"9" * 5000}',
        f'"messages": [{SAID}], "fastav": {nested(500)}',
        f'"messages": [{SAID}], "tools": [{nested(500)}]',
        f'"messages": [{SAID[:-1]}, "name": {nested(500)}}}]',
        f'"messages": [{SAID}], "metadata": {nested(900)}',
        f'"messages": [{",".join(["{}"] * 300_000)}]',
        f'"messages": [{SAID}], {LONE}: 1',
        f'"messages": [{SAID}], "fastav": {LONE}',
        f'"messages": [{SAID}], "stop": {LONE}',
        f'"messages": [{SAID}], "metadata": {{{LONE}: {LONE}}}',
        f'"messages": [{{"role": "user", "content": {LONE}}}]',
        f'"messages": [{{"role": "user", "content": [{{"type": "image_url", "image_url": "http://{LONE[1:]}}}]}}]',
        f'"messages": [{SAID}], "{"x" * 100_000}": 1',
        f'"messages": [{SAID}], "model": "{"x" * 100_000}"',
    ],
    ids=lambda text: text[-40:],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/inspect"])
def test_json_that_is_refused(target, fields, path):
    status, _ = error_of(post(target, f'{{"model": "{MODEL}", {fields}}}'.encode(), path))
    assert status in (400, 404)


def test_other_encodings_are_no_json(target):
    for encoding in ("utf-16", "utf-32", "utf-8-sig"):
        assert error_of(post(target, json.dumps(chat()).encode(encoding)))[0] == 400


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{}],
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": {"type": "text"}}],
        [{"role": 5, "content": "x"}],
        [{"role": ["user"], "content": "x"}],
        [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": [None]}],
        [{"role": "user", "content": [{"type": ["text"]}]}],
        [{"role": "user", "content": [{"type": {"text": 1}}]}],
        [{"role": "user", "content": [{"type": "text"}]}],
        [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}],
        [{"role": "user", "content": [{"type": "video", "path": "/etc/passwd"}]}],
        [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": 5}}]}],
        [{"role": "user", "content": [{"type": "video_url", "video_url": ["data:,"]}]}],
        [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "!", "format": "wav"}}]}],
        [{"role": "user", "content": [{"type": "file", "file": {"file_id": 5}}]}],
        # what would be dropped without a word
        [{"role": "user", "content": [{"type": "text", "text": "a", "video_url": {"url": "data:,"}}]}],
        [{"role": "user", "content": [{"type": "video_url", "video_url": {"url": "data:,", "fps": 2}}]}],
        [{"role": "user", "content": "a", "images": ["data:,"]}],
        [{"role": "user", "content": "a", "audio": {"id": "x"}}],
    ],
)
def test_messages_that_are_refused(target, messages):
    assert error_of(post(target, chat(messages=messages)))[0] == 400


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"n": 0}, 400),
        ({"n": 9}, 400),
        ({"stop": [""]}, 400),
        ({"stop": ["a"] * 17}, 400),
        ({"max_tokens": "5"}, 400),
        ({"max_tokens": True}, 400),
        ({"max_tokens": 1001}, 400),
        ({"max_tokens": 10**30}, 400),
        ({"min_tokens": 9}, 400),
        ({"min_tokens": 10**30}, 400),
        ({"stream": "yes"}, 400),
        ({"seed": -1}, 400),
        ({"temperature": 1e-300}, 400),
        ({"temperature": 1e-4, "seed": 1}, 200),
        ({"repetition_penalty": 1e300}, 200),
        ({"top_k": 10**30, "temperature": 1.0}, 200),
        ({"logprobs": True, "top_logprobs": 21}, 400),
        ({"fastav": 5}, 400),
        ({"fastav": {}}, 400),
        ({"fastav": "/etc/passwd"}, 400),
        ({"fastav": "/etc/passwd.json"}, 400),
        ({"fastav": "fastv@1e308"}, 400),
        ({"fastav": "fastv@nan"}, 400),
        ({"fastav": "fastv@" + "9" * 5000}, 400),
        ({"fastav": "{" * 20_000}, 400),
        ({"fastav": "fastv", "vllm_xargs": {"fastav": "none"}}, 400),
        ({"tools": [5]}, 400),
        ({"response_format": {"type": "json_object"}}, 400),
        ({"mm_processor_kwargs": {"fps": 1}}, 400),
        ({"user": "a", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "logit_bias": {}}, 200),
    ],
    ids=lambda fields: repr(fields)[:50],
)
@pytest.mark.parametrize("stream", [False, True])
def test_settings(target, fields, status, stream):
    reply = post(target, chat(**{"stream": stream} | fields))
    assert reply[0] == status, reply
    if status != 200:
        error_of(reply)


def test_a_plan_of_many_steps_is_refused(target):
    step = {"layers": "3", "method": "position", "keep": {"media": 0.9}}
    plan = {"fastav_plan": 1, "name": "many", "steps": [step] * 400}
    assert error_of(post(target, chat(fastav=plan)))[0] == 400


def test_more_answers_than_places_is_no_reason_to_try_again():
    with serving(limits=Limits(queue=2, new_tokens=3), decoders=1) as small:
        assert error_of(post(small, chat(n=3, max_tokens=1))) == (400, "invalid_request")
        free = json.loads(post(small, chat("describe", max_tokens=None, min_tokens=3))[2])
        assert free["usage"]["completion_tokens"] == 3  # the model's own default is more than the server's limit
        rest(small)


# --- media


def url_part(url: str, kind: str = "video_url") -> list[Any]:
    return [{"type": kind, kind: {"url": url}}, {"type": "text", "text": "what?"}]


@pytest.mark.parametrize(
    "name",
    [
        "{root}/missing",
        "{root}/out",
        "{root}/etc/passwd",
        "{root}/loop-1",
        "{root}/pipe",
        "{root}/inner",
        "{root}",
        "{root}/../text.txt",
        "{root}/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "{root}/%2e%2e/x",
        "{root}/text.txt%00",
        "{root}/" + "a" * 5000,
        "{root}-other/x",
        "/etc/passwd",
        "/proc/self/environ",
        "/dev/zero",
        "//evil.example/etc/passwd",
        "//[/x",
        "",
    ],
)
def test_files_outside_the_media_root_look_like_missing_ones(target, root, name):
    replies = [
        post(target, chat(url_part(f"file:{slashes}{name.format(root=root)}"))) for slashes in ("//", "", "//localhost")
    ]
    assert {error_of(reply) for reply in replies} == {(400, "invalid_request")}
    messages = {json.loads(reply[2])["error"]["message"] for reply in replies}
    assert messages == {
        "messages[0].content[0]: this file:// URL is not loaded (the server reads files below its --media-root alone)"
    }


def test_a_file_in_the_media_root_is_read(target, root):
    clips = Path(content.__file__).parents[1] / "assets" / "clips"
    (root / "inner" / "a clip.mp4").write_bytes((clips / "triangle.mp4").read_bytes())
    os.symlink("inner", root / "link")
    expected = texts(post(target, clip()))
    for name in ("inner/a%20clip.mp4", "link/a%20clip.mp4"):
        parts = [url_part(f"file://{root}/{name}")[0], {"type": "text", "text": "describe the clip."}]
        assert texts(post(target, chat(parts))) == expected


def test_a_folder_that_becomes_a_link_after_the_check_is_not_followed(root, monkeypatch):
    (root / "swap").mkdir()
    (root / "swap" / "passwd").write_text("harmless")
    access = content.MediaAccess(files=FileStore(10), limits=Limits(), root=root)
    opened = content._open_below

    def swap(*arguments: Any) -> int:
        os.rename(root / "swap", root / "swapped")
        os.symlink("/etc", root / "swap")
        return opened(*arguments)

    monkeypatch.setattr(content, "_open_below", swap)
    with pytest.raises(content.UnreadableMedia, match="is not loaded"):
        access._read(f"file://{root}/swap/passwd")


def png(width: int, height: int) -> bytes:
    """A picture of one colour, which is small as a file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, rows = zlib.compressobj(9), []
    for _ in range(height):
        rows.append(packer.compress(bytes(1 + width)))
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = b"".join([*rows, packer.flush()])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def data_url(data: bytes) -> str:
    return f"data:;base64,{base64.b64encode(data).decode()}"


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:,",
        "data:;base64,!!!",
        "data:video/mp4;base64,AAAA",
        "data:text/html,<script>",
        data_url(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"),
        data_url(b"ffconcat version 1.0\nfile /etc/passwd\n"),
        data_url(b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>"),
        data_url(b"\x89PNG\r\n\x1a\n"),
        data_url(b"PK\x03\x04" + bytes(100)),
        data_url(zlib.compress(bytes(2**24))),
        data_url(png(20_000, 20_000)),
        "http://127.0.0.1:1/",
        "https://localhost/",
        "http://[::1",
        "ftp://localhost/a",
        "concat:/etc/passwd",
        "/etc/passwd",
        "\0",
        "",
    ],
    ids=lambda url: url[:30],
)
@pytest.mark.parametrize("kind", ["image_url", "video_url", "audio_url"])
def test_media_that_are_refused(target, url, kind):
    start = time.monotonic()
    assert error_of(post(target, chat(url_part(url, kind)))) == (400, "invalid_request")
    assert time.monotonic() - start < 10


def test_media_are_counted_over_all_messages_before_any_is_loaded(target):
    part = url_part("file:///dev/null")[0]
    messages = [{"role": "user", "content": [part] * 9}, {"role": "user", "content": [part] * 8}]
    reply = post(target, chat(messages=messages))
    assert error_of(reply)[0] == 400
    assert "a request may have 16 media, and this one has 17" in json.loads(reply[2])["error"]["message"]


def test_urls_share_a_limit_of_bytes(target, root):
    (root / "half").write_bytes(bytes(BODY_BYTES * 6 // 10))
    parts = [url_part(f"file://{root}/half")[0]] * 2
    reply = post(target, chat(parts))
    assert error_of(reply)[0] == 400
    assert "together" in json.loads(reply[2])["error"]["message"]


@pytest.fixture
def web():
    """A web server on this machine that counts requests; it redirects, and it hangs on /slow."""
    seen: list[str] = []
    listening = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()

    def serve_one(connection: socket.socket) -> None:
        with connection:
            path = connection.recv(4096).split(b" ")[1].decode()
            seen.append(path)
            if path == "/slow":
                stop.wait(20)
            location = "file:///etc/passwd" if path == "/file" else "http://localhost:1/"
            connection.sendall(f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode())

    def accept() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=serve_one, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listening.getsockname()[1], seen
    stop.set()
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()


HOSTS = ("127.0.0.1", "localhost", "2130706433", "0x7f.1", "a@127.0.0.1", "127.0.0.1%2f", "[::ffff:127.0.0.1]")


def test_urls_lead_to_allowed_hosts_alone(web):
    port, seen = web
    domains = frozenset({"127.0.0.1", "localhost"})
    for private, paths in ((False, ["/a"]), (True, ["/redirect", "/file"])):
        access = content.MediaAccess(files=FileStore(10), limits=Limits(), domains=domains, private=private)
        for host in HOSTS:
            for path in paths:
                with pytest.raises(content.UnreadableMedia):
                    asyncio.run(access.messages([{"role": "user", "content": url_part(f"http://{host}:{port}{path}")}]))
        assert set(seen) == (set() if not private else {"/redirect", "/file"})


def test_a_slow_host_does_not_hold_up_other_requests(web):
    port, _ = web
    access = content.MediaAccess(
        files=FileStore(10), limits=Limits(decode_seconds=60), domains=frozenset({"127.0.0.1"}), private=True
    )
    object.__setattr__(access, "policy", access.policy.__class__(urls=True, files=False))

    async def both() -> float:
        slow = [
            asyncio.ensure_future(
                access.messages([{"role": "user", "content": url_part(f"http://127.0.0.1:{port}/slow")}])
            )
            for _ in range(40)
        ]
        await asyncio.sleep(0.3)
        start = time.monotonic()
        await access.messages([{"role": "user", "content": url_part("data:,x")}])
        for one in slow:
            one.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        return time.monotonic() - start

    assert asyncio.run(both()) < 2


# --- uploads


def form(disposition: bytes, data: bytes = b"abc", end: bytes = b"--x--\r\n") -> bytes:
    return b"--x\r\nContent-Disposition: form-data; " + disposition + b"\r\n\r\n" + data + b"\r\n" + end


FILE = b'name="file"; filename="a.mp4"'


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"nothing"),
        ("multipart/form-data", form(FILE)),
        ("multipart/form-data; boundary=x", form(FILE, end=b"")),
        ("multipart/form-data; boundary=x", form(b'name="file"')),
        ("multipart/form-data; boundary=x", form(b"filename=a")),
        ("multipart/form-data; boundary=x", form(FILE, end=b"") * 2 + b"--x--\r\n"),
        ("multipart/form-data; boundary=x", form(b'name="a"', end=b"") * 9 + b"--x--\r\n"),
        ("multipart/form-data; boundary=x", form(b'name="purpose"', b"a" * 100_000)),
        ("multipart/form-data; boundary=x", form(b'name="file"; filename="' + b"a" * 200_000 + b'"')),
        ("multipart/form-data; boundary=" + "x" * 10_000, form(FILE)),
        *[
            (f"multipart/form-data; boundary=x; charset={name}", form(b'name="file"; filename="\\\\ud800+2AA-"'))
            for name in (
                "unicode_escape",
                "raw_unicode_escape",
                "utf-7",
                "punycode",
                "idna",
                "zlib",
                "undefined",
                '"utf-7"',
            )
        ],
        ("application/x-www-form-urlencoded", b"file=x"),
        ("application/json", b"{}"),
        ("", b"x"),
    ],
    ids=lambda value: repr(value)[-30:],
)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the file of a form without an end
def test_uploads_that_are_refused(target, kind, body):
    assert error_of(ask(target, "POST", "/v1/files", ("Content-Type", kind), body=body))[0] == 400
    assert ask(target, "GET", "/v1/files")[0] == 200


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a\\r\\nSet-Cookie: b=c", "ü€\u202e.mp4", "nul\0", "x" * 1000, ""]
)
def test_names_of_uploads_are_for_the_client_alone(target, name):
    kind = ("Content-Type", "multipart/form-data; boundary=x")
    body = form(f'name="file"; filename="{name}"'.encode(), b"<script>")
    status, _, data = ask(target, "POST", "/v1/files", kind, body=body)
    assert status == 200
    stored = json.loads(data)
    assert re.fullmatch(r"file-[0-9a-f]{32}", stored["id"])
    assert len(stored["filename"]) <= 255
    status, headers, data = ask(target, "GET", f"/v1/files/{stored['id']}/content")
    assert (status, data) == (200, b"<script>")
    assert headers["content-type"] == "application/octet-stream"
    assert headers["content-disposition"] == "attachment"
    assert headers["x-content-type-options"] == "nosniff"
    assert "set-cookie" not in headers
    assert ask(target, "DELETE", f"/v1/files/{stored['id']}")[0] == 200
    assert error_of(ask(target, "DELETE", f"/v1/files/{stored['id']}"))[0] == 404


# --- clients that leave, wait, or do not read


def leave(running: Serving, data: bytes, seconds: float, reset: bool) -> None:
    connection = socket.create_connection(running.address, timeout=20)
    connection.sendall(data)
    time.sleep(seconds)
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_at_any_time(target, stream, reset, caplog):
    body = json.dumps(clip(max_tokens=900, min_tokens=800, stream=stream, fastav="none")).encode()
    data = message("POST", "/v1/chat/completions", JSON, body=body, close=False)
    leave(target, data[:20], 0.05, reset)
    leave(target, data[:-5], 0.05, reset)
    with ThreadPoolExecutor(7) as pool:
        list(pool.map(lambda seconds: leave(target, data, seconds, reset), (0, 0.02, 0.1, 0.4, 0.8, 1.2, 1.6)))
    start = time.monotonic()
    rest(target)
    assert texts(post(target, chat()))
    assert time.monotonic() - start < 6
    assert not [record for record in caplog.records if record.levelname in ("ERROR", "CRITICAL")]


def test_inspections_that_nobody_waits_for_do_not_pile_up(target):
    data = message("POST", "/v1/inspect", JSON, body=json.dumps(clip()).encode())
    before = threading.active_count()
    for _ in range(12):
        leave(target, data, 0.15, reset=True)
    assert threading.active_count() - before <= 4
    rest(target)
    assert post(target, clip(), "/v1/inspect")[0] == 200


def test_a_full_queue(target):
    body = json.dumps(clip(max_tokens=900, min_tokens=890)).encode()
    waiting = [socket.create_connection(target.address, timeout=20) for _ in range(8)]
    for connection in waiting:
        connection.sendall(message("POST", "/v1/chat/completions", JSON, body=body))
    while target.served.scheduler.admitted < 8:
        time.sleep(0.01)
    for path in ("/v1/chat/completions", "/v1/inspect"):
        reply = post(target, chat(), path)
        assert error_of(reply) == (429, "queue_full")
        assert 1 <= int(reply[1]["retry-after"]) <= 60
    assert ask(target, "GET", "/health")[0] == 200
    for connection in waiting:
        connection.close()
    rest(target)
    assert texts(post(target, chat()))


def test_a_client_that_reads_nothing_loses_its_connection(target):
    connections = []
    body = json.dumps(chat(n=8, max_tokens=1000, min_tokens=990, stream=True, logprobs=True, top_logprobs=20)).encode()
    unread = message("POST", "/v1/chat/completions", JSON, body=body, close=False)
    for data in (unread, message("GET", "/v1/examples/example-half-minute", close=False) * 30):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect(target.address)
        connection.sendall(data)
        connections.append(connection)
    time.sleep(0.5)
    assert len(target.server.server_state.connections) == 2
    rest(target, 60)
    for connection in connections:
        connection.close()


def test_the_deadline():
    with serving(limits=Limits(request_seconds=1, new_tokens=2000), decoders=1) as hurried:
        long = chat(max_tokens=1900, min_tokens=1890, temperature=1.0, seed=1)
        assert error_of(post(hurried, long)) == (504, "timeout")
        status, _, body = post(hurried, long | {"stream": True})
        events = unchunked(body).decode().split("\n\n")
        assert status == 200
        assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "timeout"
        assert events[-2:] == ["data: [DONE]", ""]
        rest(hurried)
        assert texts(post(hurried, chat()))
        rest(hurried)


def test_slow_headers_and_bodies(monkeypatch):
    monkeypatch.setattr(server, "HEADER_SECONDS", 0.5)
    monkeypatch.setattr("fastav.serve.guard.BODY_SECONDS", 0.5)
    with serving(decoders=1) as strict:
        assert exchange(strict, b"GET / HT") == b""
        head = message("POST", "/v1/chat/completions", JSON, ("Content-Length", "10"), close=False)
        assert error_of(split(exchange(strict, head + b"{"))) == (408, "timeout")
        answered = exchange(strict, message("GET", "/health", close=False))
        assert answered.startswith(b"HTTP/1.1 200")  # and then closed, as no other request comes
        rest(strict)


# --- answers


STOPS = [None, "e", ["ri", "xyz"], ["e ", " t"], "\n"]


def mixed() -> list[dict[str, Any]]:
    cases = [chat(), chat("hello", fastav="none"), chat(max_tokens=30, min_tokens=25, repetition_penalty=1.1)]
    cases += [clip(max_tokens=20, stop=stop) for stop in STOPS]
    cases += [clip(max_tokens=20, fastav=plan) for plan in ("none", "fastav-plus", "fastv@0.5")]
    cases += [chat(max_tokens=20, min_tokens=15, temperature=1.2, seed=seed, n=2) for seed in (0, 1)]
    cases += [chat(max_tokens=12, min_tokens=10, logprobs=True, top_logprobs=2, n=2)]
    return cases


def test_answers_are_the_same_alone_together_and_streamed(target):
    cases = mixed()
    alone = [texts(post(target, case)) for case in cases]
    work: list[tuple[int, Callable[[], list[str]]]] = []
    for number, case in enumerate(cases):
        work.append((number, lambda case=case: texts(post(target, case))))
        work.append((number, lambda case=case: streamed(post(target, case | {"stream": True}))))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda one: (one[0], one[1]()), work))
    assert [(number, answer) for number, answer in found if answer != alone[number]] == []


def test_log_probabilities_are_those_of_the_text(target):
    case = clip(max_tokens=20, logprobs=True, top_logprobs=1)
    choice = json.loads(post(target, case)[2])["choices"][0]
    steps = choice["logprobs"]["content"]
    assert "".join(step["token"] for step in steps).strip() == choice["message"]["content"]
    body = unchunked(post(target, case | {"stream": True})[2]).decode()
    events = [json.loads(event.removeprefix("data: ")) for event in body.split("\n\n")[:-2]]
    told = [step for event in events for step in (event["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert told == steps


# --- numbers


def test_made_up_paths_and_methods_make_no_new_numbers(target):
    for number in range(5):
        ask(target, "GET", f"/made-up-{number}")
        ask(target, f"METHOD{number}", "/")
        ask(target, "GET", f"/v1/files/made-up-{number}")
        ask(target, "GET", f"/v1/models/made/up/{number}")
    found = ask(target, "GET", "/metrics")[2].decode()
    assert not re.search("made|METHOD", found)
    known = {path.replace("/v1/models/{identifier}", "/v1/models/{identifier:path}") for path, _ in routes(target)}
    assert set(re.findall(r'path="([^"]*)"', found)) <= known | {"other"}


# --- the whole process


def children(parent: int) -> list[int]:
    """All processes below one."""
    pairs = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                pairs.append((int(folder.name), int((folder / "stat").read_text().rpartition(")")[2].split()[1])))
            except OSError:
                continue  # it has ended
    found = [parent]
    for one in found:
        found += [number for number, above in pairs if above == one]
    return found[1:]


def is_running(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def fetched(url: str, body: dict[str, Any]) -> bytes:
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), dict([JSON]))
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
@pytest.mark.slow
def test_killed_processes_and_signals():
    with started("--decoders", "1") as (process, url):
        port = int(url.rpartition(":")[2])
        for one in reversed(children(process.pid)):  # of the decoder, the one that forks last
            os.kill(one, signal.SIGKILL)
            gone([one])
            assert fetched(url, clip())
        below = children(process.pid)
        assert below
        os.kill(process.pid, signal.SIGKILL)
        process.wait(20)
        gone(below)

    with (
        started("--decoders", "1", port=port) as (process, url),
        socket.create_connection(("127.0.0.1", port)),
        socket.create_connection(("127.0.0.1", port)) as partial,
        ThreadPoolExecutor(3) as pool,
    ):
        below = children(process.pid)
        partial.sendall(message("POST", "/v1/chat/completions", JSON, ("Content-Length", "9"), close=False) + b"{")
        long = clip(max_tokens=300, min_tokens=290)
        running = [pool.submit(fetched, url, long | {"stream": stream}) for stream in (False, True, False)]
        time.sleep(1)
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.5)
        with pytest.raises(urllib.error.URLError, match="refused"):
            fetched(url, chat())
        answers = [one.result() for one in running]
        assert json.loads(answers[0])["usage"]["completion_tokens"] >= 290
        assert answers[1].endswith(b"data: [DONE]\n\n")
        assert b'"error"' not in answers[1]
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""
        gone(below)


def gone(numbers: list[int]) -> None:
    end = time.monotonic() + 10
    while any(map(is_running, numbers)):
        assert time.monotonic() < end
        time.sleep(0.05)
