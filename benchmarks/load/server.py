"""vLLM's server in a process of its own, which is stopped in any case."""

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

import psutil

from fastav.errors import FastAVError

PATIENCE = 20.0  # seconds that a server has to stop by itself
TAIL = 1500  # characters of its log that an error shows


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """The server's own metrics.  cache: share of the KV cache's blocks that are in use."""

    running: int
    waiting: int
    cache: float | int
    preemptions: int

    @property
    def busy(self) -> bool:
        """Whether the server holds requests or blocks."""
        return bool(self.running or self.waiting or self.cache)

    @classmethod
    def parse(cls, text: str) -> "Metrics":
        """The metrics in Prometheus's text format, summed over engines.  Raises: FastAVError if one is missing."""
        values: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith("vllm:"):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                values[name] = values.get(name, 0.0) + float(value)
        try:
            return cls(
                running=int(values["vllm:num_requests_running"]),
                waiting=int(values["vllm:num_requests_waiting"]),
                cache=values["vllm:kv_cache_usage_perc"],
                preemptions=int(values["vllm:num_preemptions_total"]),
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
        """The text that it has printed."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def metrics(self) -> Metrics:
        """Its metrics now.  Raises: FastAVError if it does not answer."""
        try:
            return Metrics.parse(self._get("/metrics", 30).decode())
        except OSError as error:
            self.require_alive()
            raise FastAVError(f"the server does not answer ({error}): {self._log_excerpt()}") from None

    def cpu(self) -> float:
        """CPU seconds of its processes so far."""
        return sum(map(_cpu_seconds, _tree(self._process.pid)))

    def require_alive(self) -> None:
        """Raises: FastAVError if its process has ended."""
        if (code := self._process.poll()) is not None:
            raise FastAVError(f"the server ended with exit code {code}: {self._log_excerpt()}")

    def wait_until_ready(self, seconds: float | int) -> None:
        """Raises: FastAVError if it ends, or is not ready in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.require_alive()
            with suppress(OSError):
                self._get("/health", 2)
                return
            time.sleep(0.5)
        raise FastAVError(f"the server was not ready after {seconds:.0f} s: {self._log_excerpt()}")

    def stop(self) -> None:
        """End all its processes; at once, if interrupted again."""
        _stop(self._process)

    def _log_excerpt(self) -> str:
        """The first errors of its log, which cause the later ones; without errors, its end."""
        errors = [line for line in self.log.splitlines() if " ERROR " in line and "Error: " in line]
        return " ... ".join(errors[:2])[:TAIL] or f"...{self.log[-TAIL:].strip()}"

    def _get(self, path: str, seconds: float | int) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=seconds) as answer:
            return answer.read()


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process, its group and its children; at once, if interrupted again."""
    tree = _tree(process.pid)
    try:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(PATIENCE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # it leads a group, which outlives it
        for one in tree:
            with suppress(psutil.NoSuchProcess):
                one.kill()  # psutil never kills a new process with the same id
        process.wait()
        end = time.monotonic() + PATIENCE
        while any(map(_is_alive, tree)) and time.monotonic() < end:
            time.sleep(0.05)


def _tree(pid: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def _is_alive(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _cpu_seconds(process: psutil.Process) -> float:
    with suppress(psutil.NoSuchProcess):
        spent = process.cpu_times()
        return spent.user + spent.system
    return 0.0


@contextmanager
def serving(
    command: Sequence[str], environment: Mapping[str, str], log: Path, *, seconds: float | int
) -> Iterator[Server]:
    """A server that is ready for requests, and stopped afterwards in any case.

    command: without host and port. environment: added to this process's own. seconds: time for it to become ready.
    Raises: FastAVError.
    """
    port = _free_port()
    words = [*command, "--host", "127.0.0.1", "--port", str(port)]
    server = Server(_start(words, environment, log), port, log)
    try:
        server.wait_until_ready(seconds)
        yield server
    finally:
        server.stop()


def run_to_end(
    name: str, command: Sequence[str], environment: Mapping[str, str], log: Path, *, seconds: float | int
) -> None:
    """Run a program that ends by itself; none of its processes is left in any case.

    name: for errors. environment: added to this process's own. seconds: time that it may take.
    Raises: FastAVError if it fails or takes longer.
    """
    process = _start(command, environment, log)
    try:
        code = process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        _stop(process)
    if code != 0:
        tail = log.read_text(encoding="utf-8", errors="replace")[-TAIL:].strip()
        reason = f"took more than {seconds:.0f} s" if code is None else f"ended with exit code {code}"
        raise FastAVError(f"{name} {reason}: ...{tail}")


def _start(words: Sequence[str], environment: Mapping[str, str], log: Path) -> "subprocess.Popen[bytes]":
    """A process that leads a group of its own and writes into a log."""
    with log.open("wb") as out:
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**os.environ, **environment},
            start_new_session=True,
        )


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
