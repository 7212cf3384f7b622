"""Clips from bytes, file objects and URLs; what a policy forbids is not opened."""

import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pytest

from fastav.errors import UnreadableMedia
from fastav.media import Clip, MediaPolicy
from media_files import numbers, tone, write_clip

PICKED = [0, 39, 17]


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("film") / "a folder"
    folder.mkdir()
    return write_clip(folder / "a film?.mp4", audio="aac", sound=tone(4, 16_000))


class Server(ThreadingHTTPServer):
    content = b""


class Handler(BaseHTTPRequestHandler):
    """Gives the film in the ways that its paths name."""

    server: Server

    def do_GET(self) -> None:
        name, content = self.path.partition("?")[0], self.server.content
        if name == "/gone":
            self.send_error(404)
        elif name.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", name.removeprefix("/to/"))
            self.end_headers()
        elif name == "/endless":
            self.send_response(200)
            self.end_headers()
            self.pour()
        elif name == "/hangs":
            time.sleep(3)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if name == "/cut" else content)

    def pour(self) -> None:
        try:
            while True:
                self.wfile.write(bytes(10_000))
        except OSError:
            return

    def log_message(self, *_: Any) -> None:
        return


@pytest.fixture(scope="module")
def host(film: Path) -> Iterator[str]:
    server = Server(("127.0.0.1", 0), Handler)
    server.content = film.read_bytes()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def same(clip: Clip, name: str) -> None:
    assert clip.name == name
    assert numbers(clip.require_video().read(PICKED)) == PICKED
    assert len(clip.require_audio().read(16_000)) >= 64_000


def test_a_file_url_is_opened(film: Path) -> None:
    same(Clip.open(film.as_uri()), "a film?.mp4")
    same(Clip.open(film.as_uri().replace("file://", "file://localhost")), "a film?.mp4")
    with pytest.raises(UnreadableMedia, match="another machine"):
        Clip.open("file://elsewhere/a.mp4")


def test_bytes_and_file_objects_are_opened(film: Path) -> None:
    same(Clip.open(film.read_bytes()), "the clip")
    same(Clip.open(bytearray(film.read_bytes())), "the clip")
    same(Clip.open(BytesIO(film.read_bytes())), "the clip")
    with film.open("rb") as file:
        clip = Clip.open(file)
    same(clip, "a film?.mp4")  # also when the file is closed
    same(Clip.open("data:video/mp4;base64," + b64encode(film.read_bytes()).decode()), "the clip")


@pytest.mark.parametrize("name", ["a.mkv", "a.avi", "a.ts", "a.gif", "a.h264", "a.flv"])
def test_bytes_of_every_kind_are_read_like_files(name: str, tmp_path: Path) -> None:
    codec = {"a.gif": "gif", "a.avi": "mpeg4"}.get(name, "libx264")
    path = write_clip(tmp_path / name, codec, pixels="rgb8" if name == "a.gif" else "yuv420p")
    with path.open("rb") as file:
        assert numbers(Clip.open(file).require_video().read(PICKED)) == PICKED


def test_a_url_is_loaded(film: Path, host: str) -> None:
    same(Clip.open(f"{host}/films/a%20film.mp4?token=secret"), "a film.mp4")
    same(Clip.open(f"{host}/to/{host}/b.mp4"), "b.mp4")


@pytest.mark.parametrize(
    ("path", "options", "message"),
    [
        ("/gone", {}, "HTTP 404"),
        ("/cut", {}, "the connection ended after"),
        ("/large.mp4", {"max_bytes": 1000}, "is larger than 1,000 bytes"),
        ("/endless", {"max_bytes": 10**6}, r"is larger than 1,000,000 bytes"),
        ("/endless", {"max_bytes": 10**12, "max_seconds": 0.3}, r"could not be loaded within 0\.3 s"),
        ("/hangs?token=secret", {"max_seconds": 0.3}, r"could not be loaded within 0\.3 s"),
        ("/a.mp4", {"urls": False}, "URLs are disabled here"),
        ("/a.mp4", {"hosts": frozenset({"example.org"})}, "not an allowed host"),
        ("/to/http://example.org/a.mp4", {"hosts": frozenset({"127.0.0.1"})}, "example.org is not an allowed host"),
        ("/to/file:///etc/passwd", {}, "cannot be loaded|not an http address"),
    ],
)
def test_a_url_that_cannot_be_loaded_says_why(path: str, options: dict[str, Any], message: str, host: str) -> None:
    began = time.perf_counter()
    with pytest.raises(UnreadableMedia, match=message) as caught:
        Clip.open(host + path, policy=MediaPolicy(**options))
    assert "secret" not in str(caught.value)
    assert time.perf_counter() - began < 10


def test_a_policy_may_forbid_files(film: Path) -> None:
    policy = MediaPolicy(files=False)
    for given in (film, str(film), film.as_uri()):
        with pytest.raises(UnreadableMedia, match="files are disabled here"):
            Clip.open(given, policy=policy)
    same(Clip.open(film.read_bytes(), policy=policy), "the clip")
    with pytest.raises(UnreadableMedia, match="larger than 1,000 bytes"):
        Clip.open(BytesIO(film.read_bytes()), policy=MediaPolicy(max_bytes=1000))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b"", "is empty"),
        (b"no film", "not a media file"),
        (StringIO("text"), "gives str and not bytes"),
        (7, "cannot be opened from int"),
        ("s3://bucket/a.mp4", "s3:// cannot be opened"),
        ("data:video/mp4;base64,???", "has no clip"),
        ("http://", "is not an http address"),
        ("http://127.0.0.1:1/a.mp4", "cannot be loaded"),
    ],
)
def test_what_is_no_clip_says_so(given: Any, message: str) -> None:
    with pytest.raises(UnreadableMedia, match=message):
        Clip.open(given)


def test_what_is_in_memory_opens_no_other_file(film: Path) -> None:
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{film}\n#EXT-X-ENDLIST\n".encode()
    listing = f"ffconcat version 1.0\nfile '{film}'\n".encode()
    for given in (playlist, listing):
        with pytest.raises(UnreadableMedia):
            Clip.open(given)
