"""The processes that decode, and the one that forks them, which holds what they need.

`main` runs in the one that forks. It never sees what clients send, and it forks within milliseconds, as everything is
imported there. Its parent talks to it over a socket, and ends it by closing that.
"""

import ctypes
import gc
import os
import pickle
import select
import signal
import socket
import struct
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastav.adapter import ModelAdapter, Prepared
from fastav.errors import FastAVError, FastAVWarning, UnreadableMedia
from fastav.layout import Layout
from fastav.media import MediaPolicy, MediaWarning
from fastav.messages import Use
from fastav.request import Request
from fastav.serve._recording import Budget, packed, recorded
from fastav.serve._wire import Broken, encode, receive, send
from fastav.serve.limits import Limits

COMMAND = struct.Struct("<ci")
"""`f`: fork, with the file descriptor of the new process's socket beside it; `k`: kill this process."""

REPLY = struct.Struct("<i")
"""The id of the new process; or the exit status of a killed one, as `os.waitpid` has it."""

FORK, KILL = b"f", b"k"
OPEN_FILES = 128
NICE = 5
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38  # of Linux' prctl

FORMATS = frozenset(
    {
        "3gp",
        "aac",
        "ac3",
        "aiff",
        "amr",
        "apng",
        "asf",
        "au",
        "avi",
        "bmp_pipe",
        "caf",
        "eac3",
        "flac",
        "flv",
        "gif",
        "jpeg_pipe",
        "matroska",
        "mov",
        "mp3",
        "mpeg",
        "mpegts",
        "mpegvideo",
        "ogg",
        "png_pipe",
        "tiff_pipe",
        "w64",
        "wav",
        "webm",
        "webp_pipe",
    }
)
"""FFmpeg's names of the formats that are opened; its demuxers of all others are not reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every decoding process has from the start."""

    adapter: ModelAdapter
    processor: Any
    limits: Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A request to decode.

    messages: with the number of a medium instead of its bytes. replay: whether the reads are sent. also: what to call
    with the request and what was prepared.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]]
    use: Use
    replay: bool
    also: Callable[[Request, Prepared], Any] | None


@dataclass(frozen=True, slots=True)
class Blob:
    """Stands for the bytes of a medium in a job's messages."""

    number: int


def main(descriptor: int) -> None:
    """Fork processes, until the parent closes the socket with this descriptor."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent says when to end
    control = socket.socket(fileno=descriptor)
    children: set[int] = set()
    try:
        setup = pickle.loads(receive(control, max_bytes=2**40))
        torch.set_num_threads(1)
        _warm_up(setup)
        gc.collect()
        gc.freeze()  # the collector then leaves alone, and shared, what is here already
        send(control, encode("ready"))
        while True:
            if not select.select([control], [], [], 1.0)[0]:
                _reap(children)
                continue
            command, fds, _, _ = socket.recv_fds(control, COMMAND.size, 1)
            if len(command) < COMMAND.size:
                break
            kind, number = COMMAND.unpack(command)
            answer = _kill(number, children) if kind == KILL else _fork(control, fds[0], setup, children)
            control.sendall(REPLY.pack(answer))
    except (Broken, OSError):
        pass  # the parent has ended
    finally:
        for child in list(children):
            _kill(child, children)
        os._exit(0)  # without taking apart what was imported, which takes a while


def _warm_up(setup: Setup) -> None:
    """Prepare a request once, so that what is imported or compiled on first use is there when a process is forked."""
    from importlib.resources import files

    clip = files("fastav") / "assets" / "clips" / "knock.mp4"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            content = [{"type": "video", "video": clip.read_bytes()}, {"type": "text", "text": "What is shown?"}]
            request = Request(messages=[{"role": "user", "content": content}])
            prepared = setup.adapter.prepare(setup.processor, [request])
            encode(_packed_prepared(prepared))
        except Exception:  # a family that takes no such clip starts a little slower
            return


def _reap(children: set[int]) -> None:
    """Forget the processes that have ended."""
    for child in list(children):
        if os.waitpid(child, os.WNOHANG)[0]:
            children.discard(child)


def _kill(child: int, children: set[int]) -> int:
    """End a process.  Returns its status; 0 if it is unknown."""
    if child not in children:
        return 0
    os.kill(child, signal.SIGKILL)
    children.discard(child)
    return os.waitpid(child, 0)[1]


def _fork(control: socket.socket, descriptor: int, setup: Setup, children: set[int]) -> int:
    child = os.fork()
    if child:
        os.close(descriptor)
        children.add(child)
        return child
    try:
        control.close()
        _confine(descriptor, setup.limits)
        _warm_up(setup)  # the pages that decoding changes are copied before a request waits for it
        connection = socket.socket(fileno=descriptor)
        while True:
            _work(connection, setup)
    finally:
        os._exit(0)


def _confine(descriptor: int, limits: Limits) -> None:
    """Take from this process what it does not need: files that are open, memory, files to write, priority."""
    import resource  # which Windows does not have

    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.closerange(3, descriptor)
    os.closerange(descriptor + 1, 1024)
    for name, limit in (("CORE", 0), ("FSIZE", 0), ("NOFILE", OPEN_FILES)):
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        memory = limits.decode_memory + _data_bytes()
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    os.nice(NICE)


def _data_bytes() -> int:
    """Bytes of private memory that this process can write to, which RLIMIT_DATA counts."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData"))


def _work(connection: socket.socket, setup: Setup) -> None:
    """Decode one request."""
    job, blobs = receive(connection, max_bytes=2**40)
    try:
        answer = encode(_decode(pickle.loads(job), blobs, setup))
    except FastAVError as error:
        answer = encode({"error": type(error).__name__, "message": error.message, "hint": error.hint})
    except MemoryError:
        answer = encode({"error": "MemoryError"})
    except Exception as error:
        out_of_memory = "allocate memory" in str(error)
        answer = encode({"error": "MemoryError" if out_of_memory else "", "log": traceback.format_exc()})
    send(connection, answer)


def _decode(job: Job, blobs: Sequence[bytes], setup: Setup) -> dict[str, Any]:
    limits = setup.limits
    policy = MediaPolicy(files=False, urls=False, max_pixels=limits.pixels, formats=FORMATS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opened = Request(messages=_with_bytes(job.messages, blobs), tools=job.tools, use=job.use, policy=policy)
        _check_seconds(opened, limits)
        keep = job.replay or job.also is not None
        request = recorded(opened, budget=Budget(limits.decoded_bytes), keep=keep)
        prepared = setup.adapter.prepare(setup.processor, [request])
        also = None if job.also is None else job.also(request, prepared)
    return {
        "request": packed(request, reads=job.replay),
        "prepared": _packed_prepared(prepared),
        "also": also,
        "warnings": [
            (one.category.__name__, str(one.message))
            for one in caught
            if issubclass(one.category, FastAVWarning | MediaWarning)
        ],
    }


def _with_bytes(value: Any, blobs: Sequence[bytes]) -> Any:
    """Messages with the bytes of their media."""
    match value:
        case Blob():
            return blobs[value.number]
        case dict():
            return {key: _with_bytes(one, blobs) for key, one in value.items()}
        case list() | tuple():
            return [_with_bytes(one, blobs) for one in value]
        case _:
            return value


def _check_seconds(request: Request, limits: Limits) -> None:
    seconds = sum(media.seconds for media in request.media)
    if not seconds <= limits.media_seconds:
        raise UnreadableMedia(
            f"the media are {seconds:,.0f} s long together; the limit is {limits.media_seconds:,.0f} s",
            "send a part of them",
        )


def _packed_prepared(prepared: Prepared) -> dict[str, Any]:
    names = Layout.__slots__
    return {
        "inputs": dict(prepared.inputs),
        "layouts": [{name: getattr(layout, name) for name in names} for layout in prepared.layouts],
    }
