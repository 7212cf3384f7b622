"""Decoding processes are confined, killed when they must be, and replaced; nothing is left of them."""

import asyncio
import logging
import os
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

import fastav
from fastav.errors import (
    EngineStopped,
    FastAVError,
    FastAVWarning,
    MediaError,
    MissingTrack,
    UnreadableMedia,
)
from fastav.media import MediaWarning
from fastav.request import Request
from fastav.serve.decoder import MediaDecoder
from fastav.serve.limits import Limits
from media_files import tone, write_clip
from support import decoding
from unit.test_media_fuzz import FILMS, PICTURES, mutated, seed

CLIPS = Path(fastav.__file__).parent / "assets" / "clips"
KNOCK = (CLIPS / "knock.mp4").read_bytes()
LIMITS = Limits(
    decode_seconds=4, decode_memory=1 << 29, pixels=2048 * 2048, media=4, media_seconds=120, decoded_bytes=1 << 28
)

pytestmark = pytest.mark.filterwarnings("ignore::fastav.errors.FastAVWarning")


@pytest.fixture(scope="module")
def tiny() -> Any:
    return fastav.pipeline("tiny-long").engine


@pytest.fixture(scope="module")
def decoder(tiny: Any) -> Iterator[MediaDecoder]:
    """Two processes, with small limits, of a model that does what the last word of a question says."""
    with decoding.started(tiny.processor, LIMITS, workers=2) as decoder:
        yield decoder


def _descendants() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]


def _forker(decoder: MediaDecoder) -> psutil.Process:
    return psutil.Process(decoder._forker._process.pid)


def _asked(question: str, *media: bytes, kind: str = "video") -> list[dict[str, Any]]:
    content = [{"type": kind, kind: one} for one in media]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def _still_works(decoder: MediaDecoder) -> None:
    for _ in range(3):
        assert decoder.decode_now(_asked("What is shown?", KNOCK)).prepared.layouts


# --- what comes back


def test_the_answer_is_what_prepare_gives_here(decoder: MediaDecoder, tiny: Any) -> None:
    messages = _asked("What is shown?", (CLIPS / "half-minute.mp4").read_bytes())
    decoded = decoder.decode_now(messages, also=decoding.first_frame_and_times)
    direct = tiny.adapter.prepare(tiny.processor, [Request(messages=messages)])
    again = tiny.adapter.prepare(tiny.processor, [decoded.request])
    for name, value in direct.inputs.items():
        assert torch.equal(decoded.prepared.inputs[name], value), name
        assert torch.equal(again.inputs[name], value), name
    np.testing.assert_equal(decoding.first_frame_and_times(decoded.request, decoded.prepared), decoded.also)
    assert decoded.also[0]["picture"].flags.writeable
    assert 0 < decoded.seconds < LIMITS.decode_seconds


def test_messages_come_back_as_they_were_sent(decoder: MediaDecoder) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *_asked("What is shown?", KNOCK)]
    request = decoder.decode_now(messages).request
    assert [message.role for message in request.messages] == ["system", "user"]
    assert (request.messages[0].content, request.question) == ("Be brief.", "What is shown?")
    assert request.media[0].place == "messages[1].content[0]"


def test_the_sound_of_a_video_may_be_named_by_its_bytes(decoder: MediaDecoder) -> None:
    content = [{"type": "video", "video": KNOCK}, {"type": "audio", "audio": KNOCK}, {"type": "text", "text": "What?"}]
    (media,) = decoder.decode_now([{"role": "user", "content": content}]).request.media
    assert media.use == "both"


def test_warnings_come_back_and_are_not_raised(decoder: MediaDecoder, tmp_path: Path) -> None:
    film = write_clip(tmp_path / "a.avi", "mpeg4", frames=40, size=(64, 32)).read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoded = decoder.decode_now(_asked("What about xylophones?", film[: len(film) * 8 // 10]))
    kinds = {type(one) for one in decoded.warnings}
    assert kinds == {MediaWarning, FastAVWarning}
    assert any("xylophones" in str(one) for one in decoded.warnings)


def test_several_requests_are_decoded_at_once(decoder: MediaDecoder) -> None:
    async def both() -> list[Any]:
        return await asyncio.gather(*(decoder.decode(_asked("What is shown?", KNOCK)) for _ in range(5)))

    assert len(asyncio.run(both())) == 5
    assert len(_forker(decoder).children()) <= 3  # two, and perhaps one that is about to end


# --- what is refused


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "video", "path": "/etc/passwd"}, "got path"),
        ({"type": "video", "video": "/etc/passwd"}, "got str"),
        ({"type": "video", "url": "http://127.0.0.1/"}, "got url"),
        ({"type": "image", "base64": "AAAA"}, "got base64"),
        ({"type": "audio", "audio": np.zeros(9)}, "got ndarray"),
        ({"type": "video", "video": BytesIO(b"x")}, "got BytesIO"),
    ],
)
def test_media_must_be_bytes(part: dict[str, Any], message: str, decoder: MediaDecoder) -> None:
    with pytest.raises(MediaError, match=r"messages\[0\].content\[1\]: a medium must be bytes here, " + message):
        decoder.decode_now([{"role": "user", "content": [{"type": "text", "text": "?"}, part]}])


def test_messages_must_be_messages(decoder: MediaDecoder) -> None:
    deep: Any = "?"
    for _ in range(900):
        deep = [deep]
    part = {"type": ["video"], "video": KNOCK}
    many = ("What?", [], ["What?"], [{"role": "user"}], [{"role": "robot", "content": "?"}])
    for messages in (*many, [{"role": "user", "content": deep}], [{"role": "user", "content": [part]}]):
        with pytest.raises(FastAVError):
            decoder.decode_now(messages)


def test_errors_keep_their_class_and_place(decoder: MediaDecoder) -> None:
    sound = {"type": "audio", "audio": _silent_clip()}
    with pytest.raises(MissingTrack, match=r"messages\[0\].content\[0\]: the clip has no audio track") as caught:
        decoder.decode_now([{"role": "user", "content": [sound, {"type": "text", "text": "?"}]}])
    assert caught.value.hint
    assert caught.value.__cause__ is None


def _silent_clip() -> bytes:
    import av

    buffer = BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _png(width: int, height: int) -> bytes:
    """A PNG whose header has this size, and whose data are a few zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def _large(kind: str, width: int = 4000, height: int = 3000, frames: int = 1, **options: Any) -> bytes:
    """A picture of one color, small as a file."""
    buffer = BytesIO()
    images = [Image.new("RGB", (width, height), (i, 0, 0)) for i in range(frames)]
    images[0].save(buffer, kind, **({"save_all": True, "append_images": images[1:]} if frames > 1 else {}), **options)
    return buffer.getvalue()


def _patched(data: bytes, old: tuple[int, int], new: tuple[int, int], form: str) -> bytes:
    """A picture whose header says that it has another size."""
    before, after = struct.pack(form, *old), struct.pack(form, *new)
    assert before in data
    return data.replace(before, after, 1)


BOMBS = {
    "png": lambda: _png(60_000, 60_000),
    "large png": lambda: _png(16_000, 16_000),
    "jpeg": lambda: _patched(_large("jpeg", 400, 300), (300, 400), (60_000, 60_000), ">HH"),
    "webp": lambda: _large("webp"),
    "gif": lambda: _patched(_large("gif", 64, 32), (64, 32), (60_000, 60_000), "<HH"),
    "bmp": lambda: _patched(_large("bmp", 64, 32), (64, 32), (60_000, 60_000), "<ii"),
    "tiff": lambda: _large("tiff", compression="tiff_lzw"),
    "a real png": lambda: _large("png"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_pictures_that_are_too_large_are_refused_soon(name: str, decoder: MediaDecoder) -> None:
    bomb, start = BOMBS[name](), time.monotonic()
    for kind in ("image", "video"):
        with pytest.raises(UnreadableMedia, match="pixels"):
            decoder.decode_now(_asked("?", bomb, kind=kind))
    assert time.monotonic() - start < LIMITS.decode_seconds


def test_a_film_of_too_large_frames_is_refused(decoder: MediaDecoder, tmp_path: Path) -> None:
    film = write_clip(tmp_path / "a.mp4", "mpeg4", frames=2, size=(2400, 2000), picture=_black).read_bytes()
    with pytest.raises(UnreadableMedia, match="frames of 2400 x 2000; the limit is 4,194,304 pixels"):
        decoder.decode_now(_asked("?", film))
    small = write_clip(tmp_path / "b.avi", "rawvideo", frames=2, size=(64, 32), pixels="bgr24").read_bytes()
    header = struct.pack("<iii", 40, 64, -32)
    assert header in small
    with pytest.raises(UnreadableMedia, match="frames of 16000 x 16000"):
        decoder.decode_now(_asked("?", small.replace(header, struct.pack("<iii", 40, 16_000, -16_000))))


def _black(number: int, width: int, height: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


def test_an_animated_picture_of_many_frames_is_refused_or_killed(decoder: MediaDecoder) -> None:
    bomb = _large("webp", 1500, 1500, frames=40)
    body = bomb[12:]
    start, chunks = body.index(b"ANMF"), body[body.index(b"ANMF") :]
    body = body[:start] + chunks * 60
    bomb = b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    begin = time.monotonic()
    with pytest.raises(MediaError, match=r"decoding took longer than 4 s|GB when decoded"):
        decoder.decode_now(_asked("?", bomb))
    assert time.monotonic() - begin < LIMITS.decode_seconds + 2
    _still_works(decoder)


def test_more_seconds_bytes_or_media_than_allowed_are_refused(decoder: MediaDecoder, tmp_path: Path, tiny: Any) -> None:
    sound = write_clip(tmp_path / "a.wav", None, audio="pcm_s16le", sound=tone(50, 8000), rate=8000).read_bytes()
    assert decoder.decode_now(_asked("?", sound, kind="audio")).prepared.layouts
    with pytest.raises(UnreadableMedia, match="150 s long together; the limit is 120 s"):
        decoder.decode_now(_asked("?", sound, sound, sound, kind="audio"))
    with pytest.raises(FastAVError, match="5 clips; the limit is 4"):
        decoder.decode_now(_asked("?", *[KNOCK] * 5))
    film = write_clip(tmp_path / "a.mp4", frames=40, size=(1280, 720)).read_bytes()
    with pytest.raises(MediaError, match=r"more than 0.0 GB when decoded"):
        decoding.here(tiny.adapter, tiny.processor, _asked("?", film), limits=Limits(decoded_bytes=2**20))


def test_a_rate_of_a_million_frames_a_second_is_read_or_refused(decoder: MediaDecoder, tmp_path: Path) -> None:
    times = [0.0, *(1 + i * 1e-3 for i in range(19))]
    film = write_clip(tmp_path / "a.mkv", frames=20, size=(64, 32), times=times).read_bytes()
    rate = b"\x23\xe3\x83"  # DefaultDuration, in nanoseconds
    place = film.find(rate)
    if place >= 0:
        size = film[place + 3] & 0x7F
        film = film[: place + 4] + (1000).to_bytes(size, "big") + film[place + 4 + size :]
    wav = bytearray(
        write_clip(tmp_path / "a.wav", None, audio="pcm_s16le", sound=tone(1, 8000), rate=8000).read_bytes()
    )
    wav[24:28] = struct.pack("<I", 2**31 - 1)
    for data, kind in ((film, "video"), (bytes(wav), "audio")):
        try:
            decoder.decode_now(_asked("?", data, kind=kind))
        except MediaError:
            continue
    _still_works(decoder)


def test_what_is_no_media_says_so(decoder: MediaDecoder) -> None:
    archive = BytesIO()
    with ZipFile(archive, "w") as file:
        file.writestr("clip.mp4", KNOCK)
    page = b"<!doctype html><html><head><title>404</title></head><body>Not found</body></html>"
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n/etc/passwd\n#EXT-X-ENDLIST\n"
    listing = b"ffconcat version 1.0\nfile /etc/passwd\n"
    for data in (archive.getvalue(), page, page * 500, playlist, listing, b"\0" * 5000, b"x", b"", KNOCK[:900]):
        with pytest.raises(UnreadableMedia, match="the clip") as caught:
            decoder.decode_now(_asked("?", data))
        assert "/" not in caught.value.message + caught.value.hint


# --- processes that misbehave


def test_a_process_that_takes_too_long_is_killed(decoder: MediaDecoder) -> None:
    start = time.monotonic()
    with pytest.raises(MediaError, match="decoding took longer than 4 s"):
        decoder.decode_now(_asked("sleep", KNOCK))
    assert time.monotonic() - start < LIMITS.decode_seconds + 2
    _still_works(decoder)


@pytest.mark.parametrize("word", ["exit", "segfault"])
def test_a_process_that_crashes_is_replaced(word: str, decoder: MediaDecoder, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "fastav"), pytest.raises(MediaError, match="the decoder crashed"):
        decoder.decode_now(_asked(word, KNOCK))
    assert ("exit code 3" if word == "exit" else "SIGSEGV") in caplog.text
    _still_works(decoder)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the memory of a process")
@pytest.mark.parametrize("word", ["allocate", "hoard"])
def test_a_process_that_takes_too_much_memory_is_stopped(word: str, decoder: MediaDecoder) -> None:
    async def both() -> tuple[Any, Any]:
        bad = asyncio.create_task(decoder.decode(_asked(word, KNOCK)))
        good = await decoder.decode(_asked("What is shown?", KNOCK))
        with pytest.raises(MediaError, match=r"more memory than is allowed|crashed"):
            await bad
        return good, bad

    good, _ = asyncio.run(both())
    assert good.prepared.layouts
    _still_works(decoder)


def test_a_failure_of_our_own_tells_the_client_nothing_and_the_log_everything(
    decoder: MediaDecoder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "fastav"), pytest.raises(MediaError, match="the decoder failed") as caught:
        decoder.decode_now(_asked("fail", KNOCK))
    assert "secret" not in str(caught.value)
    assert "Traceback" in caplog.text
    assert "/home/user/secret" in caplog.text
    with pytest.raises(MediaError, match="the decoder failed"):
        decoder.decode_now(_asked("?", KNOCK), also=decoding.not_plain)
    _still_works(decoder)


def test_a_process_writes_no_file(decoder: MediaDecoder) -> None:
    target = Path("/tmp/fastav-decoder-test")
    target.unlink(missing_ok=True)
    with pytest.raises(MediaError, match="the decoder failed"):
        decoder.decode_now(_asked("write", KNOCK))
    assert not target.exists() or not target.stat().st_size
    target.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def single(tiny: Any) -> Iterator[MediaDecoder]:
    """A process for each request, of a server with secrets in its environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTAV_API_KEY", "secret")
        patch.setenv("HF_TOKEN", "secret")
        decoder = decoding.started(tiny.processor, requests_per_process=1)
    with decoder:
        yield decoder


def test_a_process_knows_no_secrets_and_lets_others_go_first(
    single: MediaDecoder, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "fastav"), pytest.raises(MediaError):
        single.decode_now(_asked("spy", KNOCK))
    assert "OMP_NUM_THREADS" in caplog.text
    assert "HF_TOKEN" not in caplog.text
    assert "FASTAV_API_KEY" not in caplog.text
    assert single.decode_now(_asked("?", KNOCK), also=decoding.priority).also == min(19, os.nice(0) + 5)


def test_a_process_may_serve_one_request_only(single: MediaDecoder) -> None:
    asked = _asked("What is shown?", KNOCK)
    assert len({single.decode_now(asked, also=decoding.process_id).also for _ in range(4)}) == 4


def test_cancelling_kills_the_process_and_frees_its_place(decoder: MediaDecoder) -> None:
    async def cancelled() -> float:
        tasks = [asyncio.create_task(decoder.decode(_asked("sleep", KNOCK))) for _ in range(5)]
        await asyncio.sleep(0.3)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(one, asyncio.CancelledError) for one in results)
        start = time.monotonic()
        await decoder.decode(_asked("What is shown?", KNOCK))
        return time.monotonic() - start

    assert asyncio.run(cancelled()) < LIMITS.decode_seconds
    _still_works(decoder)


def test_a_killed_process_is_replaced_and_so_is_the_one_that_forks(decoder: MediaDecoder) -> None:
    forker = _forker(decoder)
    children = forker.children()
    for child in children:
        child.kill()
    psutil.wait_procs(children, timeout=5)
    _still_works(decoder)
    children = forker.children()
    forker.kill()
    psutil.wait_procs([forker, *children], timeout=5)
    _still_works(decoder)
    assert _forker(decoder) != forker


class _Forged:
    """Answers of a process that an attacker has taken over."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self.answer


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"error": 1},
        {"error": "FastAVError"},
        {"request": {}, "prepared": {}, "also": None, "warnings": []},
        {
            "request": {"media": [], "messages": [], "tools": []},
            "prepared": {"inputs": {}, "layouts": []},
            "also": None,
        },
    ],
)
def test_a_wrong_answer_is_a_crash(
    answer: Any, decoder: MediaDecoder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("fastav.serve.decoder.receive", _Forged(answer))
        with pytest.raises(MediaError, match=r"crashed|failed"):
            decoder.decode_now(_asked("What is shown?", KNOCK))
    assert caplog.text
    _still_works(decoder)


# --- nothing is left


def test_a_process_serves_several_requests(decoder: MediaDecoder) -> None:
    asked = _asked("What is shown?", KNOCK)
    assert len({decoder.decode_now(asked, also=decoding.process_id).also for _ in range(6)}) <= 2


def test_closing_ends_all_processes_and_what_they_do(tiny: Any) -> None:
    async def closed() -> None:
        decoder = decoding.started(tiny.processor, workers=2)
        mine = [one for one in _descendants() if one.pid not in before]
        assert len(mine) == 3
        tasks = [asyncio.create_task(decoder.decode(_asked("sleep", KNOCK))) for _ in range(4)]
        await asyncio.sleep(0.3)
        start = time.monotonic()
        await asyncio.get_running_loop().run_in_executor(None, decoder.close)
        assert time.monotonic() - start < 5
        for task in tasks:
            with pytest.raises(EngineStopped):
                await task
        with pytest.raises(EngineStopped):
            await decoder.decode(_asked("?", KNOCK))
        with pytest.raises(EngineStopped):
            decoder.decode_now(_asked("?", KNOCK))
        assert not [one for one in mine if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]

    before = {one.pid for one in _descendants()}
    asyncio.run(closed())


SERVER = """
import sys, threading, time, fastav
from support.decoding import started
engine = fastav.pipeline("tiny-long").engine
decoder = started(engine.processor, workers=2)
clip = open(sys.argv[1], "rb").read()
ask = [{"role": "user", "content": [{"type": "video", "video": clip}, {"type": "text", "text": "sleep"}]}]
threading.Thread(target=decoder.decode_now, args=(ask,), daemon=True).start()
time.sleep(0.5)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_their_server(how: signal.Signals) -> None:
    path = os.pathsep.join(entry for entry in sys.path if entry and Path(entry) != decoding.BESIDE)
    command = [sys.executable, "-W", "ignore", "-c", SERVER, str(CLIPS / "knock.mp4")]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path}
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        children = psutil.Process(server.pid).children(recursive=True)
        assert len(children) >= 3
        server.send_signal(how)
        server.wait(10)
    _, alive = psutil.wait_procs(children, timeout=5)
    assert not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


# --- files that are damaged in every way


def _damaged(count: int, folder: Path) -> Iterator[bytes]:
    """Mutated, cut and spliced files of every format, always the same ones."""
    files = [seed(name, folder) for name in (*FILMS, *PICTURES)]
    files += [path.read_bytes() for path in sorted(CLIPS.glob("*.mp4"))]
    draw = np.random.default_rng(16)
    for number in range(count):
        data = files[number % len(files)]
        if draw.random() < 0.25:
            other = files[int(draw.integers(len(files)))]
            yield data[: draw.integers(1, len(data))] + other[draw.integers(len(other)) :]
        else:
            yield mutated(data, draw)


def _decode_damaged(decoder: MediaDecoder, count: int, folder: Path) -> None:
    messages: list[str] = []

    async def outcome(data: bytes) -> str:
        try:
            await decoder.decode(_asked("What is shown?", data), replay=False)
        except MediaError as error:
            messages.append(str(error))
            return type(error).__name__
        return "answer"

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*map(outcome, _damaged(count, folder)))

    outcomes = asyncio.run(all_of_them())
    assert len(outcomes) == count
    assert not [one for one in messages if "Traceback" in one or str(folder) in one]
    assert {"answer", "UnreadableMedia"} <= set(outcomes)
    _still_works(decoder)
    assert len(_forker(decoder).children()) <= 3


def test_damaged_files_answer_or_say_why(decoder: MediaDecoder, tmp_path: Path) -> None:
    _decode_damaged(decoder, 200, tmp_path)


@pytest.mark.slow
def test_many_more_damaged_files_answer_or_say_why(decoder: MediaDecoder, tmp_path: Path) -> None:
    _decode_damaged(decoder, 5000, tmp_path)


# --- limits


def test_limits_must_be_positive() -> None:
    assert Limits().pixels == 33_177_600
    for name in Limits.__slots__:
        with pytest.raises(FastAVError, match=f"{name} must be positive"):
            Limits(**{name: 0})
