"""vLLM's server as a process of its own, which is gone when it is not needed any more."""

import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastav.errors import FastAVError

PATIENCE = 20.0  # seconds that a server is given to stop by itself
TAIL = 1500  # characters of its log that an error shows


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """What the server says of itself.  cache: share of the KV cache's blocks that are taken."""

    running: int
    waiting: int
    cache: float | int
    preemptions: int

    @classmethod
    def read(cls, text: str) -> "Metrics":
        """From what Prometheus is told.  Raises: FastAVError for a server that says nothing of these."""
        found: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith("vllm:"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
        try:
            return cls(
                running=int(found["vllm:num_requests_running"]),
                waiting=int(found["vllm:num_requests_waiting"]),
                cache=found["vllm:kv_cache_usage_perc"],
                preemptions=int(found["vllm:num_preemptions_total"]),
            )
        except KeyError as missing:
            raise FastAVError(f"the server's metrics hold no {missing.args[0]}") from None


class Server:
    """A running server.  Made by `serving`."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
        self._process, self._log = process, log
        self.url = f"http://127.0.0.1:{port}"

    @property
    def log(self) -> str:
        """What it has printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def metrics(self) -> Metrics:
        """What it says of itself now.  Raises: FastAVError if it does not answer."""
        try:
            return Metrics.read(self._get("/metrics", 30).decode())
        except OSError as error:
            self.require_alive()
            raise FastAVError(f"the server does not answer ({error}): {self._last_words()}") from None

    def cpu(self) -> float:
        """Seconds of CPU time that it and its children have taken."""
        return sum(map(_seconds, self._tree()))

    def require_alive(self) -> None:
        """Raises: FastAVError if it has ended."""
        if (code := self._process.poll()) is not None:
            raise FastAVError(f"the server ended with exit code {code}: {self._last_words()}")

    def wait_until_ready(self, seconds: float | int) -> None:
        """Raises: FastAVError if it ends, or is not ready in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.require_alive()
            with suppress(OSError):
                self._get("/health", 2)
                return
            time.sleep(0.5)
        raise FastAVError(f"the server was not ready after {seconds:.0f} s: {self._last_words()}")

    def stop(self) -> None:
        """End it and all that it started; at once, if interrupted once more."""
        family = self._tree()
        try:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # it leads a group, which outlives it
            for process in family:
                _kill(process)
            self._process.wait()
            end = time.monotonic() + PATIENCE
            while any(map(_alive, family)) and time.monotonic() < end:
                time.sleep(0.05)

    def _last_words(self) -> str:
        """The first errors of its log, which others follow from; without any, its end."""
        errors = [line for line in self.log.splitlines() if " ERROR " in line and "Error: " in line]
        return " ... ".join(errors[:2])[:TAIL] or f"...{self.log[-TAIL:].strip()}"

    def _get(self, path: str, seconds: float | int) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=seconds) as answer:
            return answer.read()

    def _tree(self) -> list[Any]:
        import psutil  # pyright: ignore[reportMissingModuleSource, reportMissingImports]

        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self._process.pid)
            return [process, *process.children(recursive=True)]
        return []


def _alive(process: Any) -> bool:
    import psutil  # pyright: ignore[reportMissingModuleSource, reportMissingImports]

    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _kill(process: Any) -> None:
    import psutil  # pyright: ignore[reportMissingModuleSource, reportMissingImports]

    with suppress(psutil.NoSuchProcess):
        process.kill()  # never another that has its number by now


def _seconds(process: Any) -> float:
    import psutil  # pyright: ignore[reportMissingModuleSource, reportMissingImports]

    with suppress(psutil.NoSuchProcess):
        spent = process.cpu_times()
        return spent.user + spent.system
    return 0.0


@contextmanager
def serving(
    command: Sequence[str], environment: Mapping[str, str], log: Path, *, seconds: float | int
) -> Iterator[Server]:
    """A server that is ready, and stopped afterwards whatever happens.

    command: without host and port. environment: beside this process's own. seconds: until it must be ready.
    Raises: FastAVError.
    """
    port = _free_port()
    words = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**os.environ, **environment},
            start_new_session=True,
        )
    server = Server(process, port, log)
    try:
        server.wait_until_ready(seconds)
        yield server
    finally:
        server.stop()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
