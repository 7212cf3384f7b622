"""A server of `tiny-long` in this process or in one of its own, for tests of what clients see."""

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

import fastav
from fastav.pipelines import Pipeline
from fastav.serve.app import Served
from fastav.serve.server import ServerOptions, bound_socket, make_server, url_of
from support.decoding import without_torchvision

MODEL = "tiny-long"
START_SECONDS = 120.0
STOP_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Serving:
    """A server that runs.  url: without a slash at its end. pipe: which the server uses, and closes at its end."""

    url: str
    pipe: Pipeline
    served: Served
    server: uvicorn.Server

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host.strip("[]"), int(port)


@contextmanager
def serving(plan: str = "fastav", **options: Any) -> Iterator[Serving]:
    """A server in a thread, on a free port of 127.0.0.1.  plan: its default one. options: of `ServerOptions`."""
    with fastav.pipeline(MODEL, plan=plan) as pipe:
        known = ServerOptions(**{"name": MODEL, "port": 0} | options)
        with bound_socket(known.host, known.port) as listening:
            ready = threading.Event()
            with without_torchvision():
                server, served = make_server(pipe, known, ready.set)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, name="server", daemon=True)
            url = url_of(listening)
            thread.start()
            assert ready.wait(START_SECONDS), "the server does not start"
            try:
                yield Serving(url=url, pipe=pipe, served=served, server=server)
            finally:
                server.should_exit = True
                thread.join(STOP_SECONDS)
                assert not thread.is_alive(), "the server does not stop"


@contextmanager
def started(*arguments: str, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`fastav serve` in a process of its own, and its URL.  The process is killed at the end if it still runs."""
    command = [sys.executable, "-m", "fastav", "serve", MODEL, "--port", str(port), *arguments]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            yield process, next(found[0] for line in process.stderr if (found := re.search(r"http://\S+:\d+", line)))
        finally:
            process.kill()
