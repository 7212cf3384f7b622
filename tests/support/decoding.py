"""Models and functions for tests of decoding processes, which import this file."""

import ctypes
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastav.adapter import Prepared
from fastav.models.tiny import TinyAdapter
from fastav.request import Request
from fastav.serve import _decoder_process, decoder
from fastav.serve._decoder_process import Setup
from fastav.serve._wire import receive, send
from fastav.serve.decoder import MediaDecoder
from fastav.serve.limits import Limits

BESIDE = Path(sys.prefix) / "vision"  # as in conftest


class MisbehavingAdapter(TinyAdapter):
    """The tiny family, which does what the last word of a question says."""

    name = "misbehaving"

    def prepare(self, processor: Any, requests: Any) -> Prepared:
        match requests[0].question.split()[-1]:
            case "sleep":
                time.sleep(60)
            case "exit":
                os._exit(3)
            case "segfault":
                ctypes.string_at(0)
            case "allocate":
                np.ones(2**31, np.uint8)
            case "hoard":
                blocks = []
                while True:
                    blocks.append(np.ones(2**26, np.uint8))
            case "fail":
                raise KeyError("/home/user/secret")
            case "write":
                with open("/tmp/fastav-decoder-test", "wb") as file:
                    file.write(b"x")
            case "spy":
                raise KeyError(repr(sorted(os.environ)))
            case _:
                pass
        return super().prepare(processor, requests)


def started(processor: Any, *options: Any, **more: Any) -> MediaDecoder:
    """Decoding processes that misbehave when they are told to."""
    with without_torchvision():
        return MediaDecoder(MisbehavingAdapter(), processor, *options, **more)


@contextmanager
def without_torchvision() -> Iterator[None]:
    """Start processes that do not find the torchvision of the tests, whose operators only conftest declares."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [entry for entry in sys.path if Path(entry) != BESIDE])
        yield


def first_frame_and_times(request: Request, prepared: Prepared) -> Any:
    """What an inspection reads: the first frame of each clip, the times of the frames that are shown, some sound."""
    found = []
    for number, media in enumerate(request.media):
        layout = prepared.layouts[0]
        video, audio = media.clip.video, media.clip.audio
        found.append(
            {
                "frames": sorted(set(layout.frame[layout.item == number].tolist())),
                "picture": None if video is None else video.read([0])[0],
                "second": None if video is None else video.seconds([video.frames - 1]),
                "sound": None if audio is None else audio.read(800),
            }
        )
    return found


def process_id(request: Request, prepared: Prepared) -> int:
    return os.getpid()


def priority(request: Request, prepared: Prepared) -> int:
    return os.nice(0)


def not_plain(request: Request, prepared: Prepared) -> Any:
    return request


def here(adapter: Any, processor: Any, messages: Any, *, limits: Limits | None = None, **options: Any) -> Any:
    """What `MediaDecoder.decode_now` gives, by the same code, in this process."""
    limits = limits or Limits()
    given = {"tools": (), "use": decoder.Use.AUTO, "replay": True, "also": None, **options}
    job = decoder._job(messages, limits=limits, **given)
    ours, theirs = socket.socketpair()
    setup = Setup(adapter=adapter, processor=processor, limits=limits)
    thread = threading.Thread(target=_decoder_process._work, args=(theirs, setup))
    with ours, theirs:
        thread.start()
        send(ours, job)
        answer = receive(ours, max_bytes=2**32)
        thread.join()
    if "error" in answer:
        raise decoder._error_of(answer)
    return decoder._decoded(answer, 0.0)
