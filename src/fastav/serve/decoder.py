"""Decoding of clients' media in processes that can be killed, so that no file can harm or stop the server."""

import asyncio
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from time import monotonic
from typing import Any

from fastav import errors
from fastav.adapter import ModelAdapter, Prepared
from fastav.errors import EngineStopped, FastAVError, FastAVWarning, MediaError
from fastav.formatting import plural
from fastav.layout import Layout
from fastav.media import MediaWarning
from fastav.messages import Kind, Use
from fastav.request import Request
from fastav.serve._decoder_process import COMMAND, FORK, KILL, REPLY, Blob, Job, Setup
from fastav.serve._recording import unpacked
from fastav.serve._wire import Broken, Chunks, encode, receive, send
from fastav.serve.limits import Limits

PROGRAM = "import sys; from fastav.serve._decoder_process import main; main(int(sys.argv[1]))"

START_SECONDS = 120.0
"""How long the imports of the first process may take."""

ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "HOME", "TMPDIR", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
"""Variables that decoding processes inherit."""

SETTINGS = {
    "OMP_NUM_THREADS": "1",  # also keeps the first process without threads, as one that forks must be
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),  # memory is reused by the next request: new pages take longer than decoding
    "MALLOC_TRIM_THRESHOLD_": str(2**27),
}

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decoded:
    """A request whose media are decoded.

    request: its clips answer the reads that `prepare` and `also` made, from memory; others raise UnrecordedRead.
    prepared: what `prepare` gives for this request alone. also: what the caller's function gave. warnings: about media.
    seconds: from when a process took the request.
    """

    request: Request
    prepared: Prepared
    also: Any
    warnings: tuple[Warning, ...]
    seconds: float


class MediaDecoder:
    """Opens, decodes and prepares requests in processes of their own.

    They are forked in advance from one that has everything imported. Each has little memory, no files to write, no GPU,
    no variables of the environment that it does not need, and a lower priority; what it answers is read as plain data.
    A process that takes too long, or crashes, or whose request is cancelled is killed and replaced; other requests go
    on.

    adapter, processor: of the model; both are pickled. limits: of each request. workers: requests that are decoded at
    the same time; further ones wait. requests_per_process: after so many a process is replaced; with 1, no process sees
    the media of two requests, and each request costs the processor time of a short clip more.
    Raises: FastAVError if the processes cannot start; on Windows.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        processor: Any,
        limits: Limits | None = None,
        workers: int = 1,
        requests_per_process: int = 100,
    ) -> None:
        if sys.platform == "win32":
            raise FastAVError("decoding processes need fork, which Windows does not have", "use WSL")
        self.limits = limits or Limits()
        self._workers, self._per_process = workers, requests_per_process
        self._threads = ThreadPoolExecutor(workers, "fastav-decode")
        self._refills = ThreadPoolExecutor(1, "fastav-decode-refill")
        self._lock, self._closed = Lock(), False
        self._spare: deque[_Process] = deque()
        self._running: set[_Process] = set()
        self._forker = _Forker(pickle.dumps(Setup(adapter=adapter, processor=processor, limits=self.limits)))
        for _ in range(workers):
            self._refill()

    def __enter__(self) -> "MediaDecoder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def decode(
        self,
        messages: Any,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        use: Use = Use.AUTO,
        replay: bool = True,
        also: Callable[[Request, Prepared], Any] | None = None,
    ) -> Decoded:
        """Decode the media of a conversation; cancellation kills the process that does.

        messages: as for `fastav.Request`, but media are bytes, under their type. tools, use: as for `fastav.Request`.
        replay: whether the clips of the request can be read again. also: a function that can be pickled, which the
        process calls with the request and what was prepared; it returns plain data and arrays.
        Raises: FastAVError, MediaError as `Request` and `ModelAdapter.prepare`, and for media that exceed a limit or
        crash the process; EngineStopped after `close`.
        """
        task = _Task(_job(messages, tools, use, replay, also, self.limits))
        try:
            return await asyncio.wrap_future(self._submit(task))
        except asyncio.CancelledError:
            task.cancel()
            this = asyncio.current_task()
            if self._closed and this is not None and not this.cancelling():  # it was waiting for its turn
                raise _closed_error() from None
            raise

    def decode_now(
        self,
        messages: Any,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        use: Use = Use.AUTO,
        replay: bool = True,
        also: Callable[[Request, Prepared], Any] | None = None,
    ) -> Decoded:
        """Decode the media of a conversation, and wait for it.  Arguments and errors: as for `decode`."""
        task = _Task(_job(messages, tools, use, replay, also, self.limits))
        try:
            return self._submit(task).result()
        except CancelledError:
            raise _closed_error() from None
        except BaseException:
            task.cancel()
            raise

    def close(self) -> None:
        """End all processes; requests that are being decoded raise EngineStopped."""
        with self._lock:
            self._closed = True
            processes = [*self._spare, *self._running]
            self._spare.clear()
        for process in processes:
            process.hang_up()
        self._forker.close()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._refills.shutdown(wait=True, cancel_futures=True)
        for process in processes:
            process.connection.close()

    def _submit(self, task: "_Task") -> Future[Decoded]:
        """Decode when it is the request's turn.  Raises: EngineStopped after `close`."""
        with self._lock:
            if self._closed:
                raise _closed_error()
            return self._threads.submit(self._run, task)

    def _run(self, task: "_Task") -> Decoded:
        process = self._take()
        start = monotonic()
        try:
            answer = self._ask(process, task, start + self.limits.decode_seconds)
            try:
                if answer.get("error", "FastAVError") in ("MemoryError", ""):
                    process.kill()  # in an unknown state
                error = _error_of(answer) if "error" in answer else None
                decoded = _decoded(answer, monotonic() - start) if error is None else None
            except Exception:  # errors of fastav, too: an answer is plain data that fits together
                process.kill()
                _log.exception("a decoding process gave a wrong answer")
                raise _crash_error() from None
        finally:
            self._put_back(process)
        if decoded is None:
            assert error is not None
            raise error
        return decoded

    def _ask(self, process: "_Process", task: "_Task", until: float) -> Any:
        """The answer of a process.  Raises: MediaError if there is none."""
        try:
            with task.given_to(process):
                send(process.connection, task.job, until)
                return receive(process.connection, max_bytes=self.limits.decode_memory, until=until)
        except TimeoutError:
            process.kill()
            seconds = self.limits.decode_seconds
            raise MediaError(f"decoding took longer than {seconds:g} s", "use shorter clips") from None
        except Broken as error:
            status = process.kill()
            if self._closed:
                raise _closed_error() from None
            if task.cancelled:
                raise MediaError("decoding was cancelled") from None
            _log.error("a decoding process ended (%s): %s", _how(status), error)
            raise _crash_error() from None
        except BaseException:
            process.kill()
            raise

    def _take(self) -> "_Process":
        """A process for one request."""
        while True:
            with self._lock:
                if self._closed:
                    raise _closed_error()
                process = self._spare.popleft() if self._spare else None
                if process is not None:
                    self._running.add(process)
            if process is None:
                self._refill()
            elif process.is_waiting():
                return process
            else:
                process.kill()
                with self._lock:
                    self._running.discard(process)
                process.connection.close()

    def _put_back(self, process: "_Process") -> None:
        """Keep a process for other requests, or replace it."""
        process.requests += 1
        with self._lock:
            self._running.discard(process)
            enough = len(self._spare) >= self._workers
            if not (self._closed or process.killed or enough or process.requests >= self._per_process):
                self._spare.append(process)
                return
        process.kill()
        process.connection.close()
        if not (self._closed or enough):
            self._refills.submit(self._refill)

    def _refill(self) -> None:
        """Fork a process."""
        process = self._forker.fork()
        with self._lock:
            if not self._closed:
                self._spare.append(process)
                return
        process.connection.close()


class _Forker:
    """The process that forks the others; a new one is started if it has ended.  setup: pickled."""

    def __init__(self, setup: bytes) -> None:
        self._setup, self._lock, self._closed = setup, Lock(), False
        self._path = os.pathsep.join(entry for entry in sys.path if entry)
        self._start()

    def fork(self) -> "_Process":
        """A new process.  Raises: EngineStopped after `close`; FastAVError if it cannot start."""
        with self._lock:
            if self._closed:
                raise _closed_error()
            try:
                return self._fork()
            except OSError as error:
                _log.error("the process that forks decoding processes has ended: %s", error)
                self._stop()
                self._start()
                return self._fork()

    def kill(self, number: int) -> int:
        """Kill a process.  Returns its status, as `os.waitpid` has it; 0 if it is unknown."""
        with self._lock:
            try:
                self._control.sendall(COMMAND.pack(KILL, number))
                return self._reply()
            except OSError:
                return 0  # it ended, and all others with it

    def close(self) -> None:
        """End this process and those that it forked."""
        with self._lock:
            self._closed = True
            self._stop()

    def _start(self) -> None:
        self._control, theirs = socket.socketpair()
        kept = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", PROGRAM, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**kept, **SETTINGS, "PYTHONPATH": self._path},
                start_new_session=True,
            )
        until = monotonic() + START_SECONDS
        try:
            send(self._control, encode(self._setup), until)
            receive(self._control, max_bytes=1024, until=until)
        except (Broken, TimeoutError) as error:
            self._stop()
            raise FastAVError("the decoding processes cannot start", "see the errors above") from error
        self._control.settimeout(START_SECONDS)

    def _stop(self) -> None:
        self._control.close()  # which is the sign to end
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _fork(self) -> "_Process":
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                socket.send_fds(self._control, [COMMAND.pack(FORK, 0)], [theirs.fileno()])
                return _Process(ours, self._reply(), self)
            except BaseException:
                ours.close()
                raise

    def _reply(self) -> int:
        data = self._control.recv(REPLY.size, socket.MSG_WAITALL)
        if len(data) < REPLY.size:
            raise OSError("it closed its socket")
        return REPLY.unpack(data)[0]


class _Process:
    """A decoding process.  requests: how many it got. killed: whether it was killed."""

    def __init__(self, connection: socket.socket, number: int, forker: _Forker) -> None:
        self.connection, self.number, self._forker = connection, number, forker
        self.requests, self.killed, self._status = 0, False, 0

    def is_waiting(self) -> bool:
        """Whether it waits for a request: it has not ended, and has sent nothing that was not asked for."""
        self.connection.setblocking(False)
        try:
            self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def hang_up(self) -> None:
        """End what waits for the process, and the process once it sends or reads."""
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has ended

    def kill(self) -> int:
        """End it.  Returns its status, as `os.waitpid` has it; 0 if it is unknown."""
        if not self.killed:
            self.killed, self._status = True, self._forker.kill(self.number)
        return self._status


class _Task:
    """A request on its way through a process."""

    def __init__(self, job: Chunks) -> None:
        self.job, self.cancelled = job, False
        self._lock = Lock()
        self._process: _Process | None = None

    def cancel(self) -> None:
        """Stop waiting for the process, which is then killed."""
        with self._lock:
            self.cancelled = True
            if self._process is not None:
                self._process.hang_up()

    def given_to(self, process: _Process) -> "_Task":
        """The task, as a context in which a process works on it."""
        with self._lock:
            if self.cancelled:
                raise Broken("cancelled")
            self._process = process
        return self

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._process = None


def _job(
    messages: Any,
    tools: Sequence[Mapping[str, Any]],
    use: Use,
    replay: bool,
    also: Callable[[Request, Prepared], Any] | None,
    limits: Limits,
) -> Chunks:
    """A request as a process gets it.  Raises: FastAVError for media that are not bytes, and too many."""
    blobs: dict[int, bytes] = {}
    if not isinstance(messages, list | tuple):
        raise FastAVError(f"messages must be a list of messages, got {type(messages).__name__}")
    numbered = [_without_bytes(message, f"messages[{index}]", blobs) for index, message in enumerate(messages)]
    count = sum(_n_media(message) for message in numbered)
    if count > limits.media:
        raise FastAVError(f"the messages have {plural(count, 'clip')}; the limit is {limits.media}", "send fewer")
    try:
        job = pickle.dumps(Job(messages=numbered, tools=list(tools), use=use, replay=replay, also=also))
    except RecursionError:
        raise FastAVError("the messages are nested too deeply", "write them flat") from None
    return encode((job, list(blobs.values())))


def _without_bytes(message: Any, place: str, blobs: dict[int, bytes]) -> Any:
    """A message with numbers instead of the bytes of its media."""
    if not isinstance(message, Mapping):
        raise FastAVError(f"{place} must be an object with role and content, got {type(message).__name__}")
    content: Any = message.get("content")
    if not isinstance(content, list | tuple):
        return dict(message)
    numbers = {number: place for place, number in enumerate(blobs)}
    parts: list[Any] = []
    for index, part in enumerate(content):
        if _is_medium(part):
            kind = part["type"]
            source = part.get(kind)
            others = [name for name in ("path", "url", "base64") if part.get(name) is not None]
            if others or not isinstance(source, bytes | None):
                named = others[0] if others else type(source).__name__
                raise MediaError(f"{place}.content[{index}]: a medium must be bytes here, got {named}")
            if isinstance(source, bytes):
                blobs.setdefault(id(source), source)
                numbers.setdefault(id(source), len(numbers))
                part = {**part, kind: Blob(numbers[id(source)])}
        parts.append(dict(part) if isinstance(part, Mapping) else part)
    return {**message, "content": parts}


def _n_media(message: Mapping[str, Any]) -> int:
    content: Any = message.get("content")
    parts = content if isinstance(content, list) else []
    return sum(map(_is_medium, parts))


def _is_medium(part: Any) -> bool:
    return isinstance(part, Mapping) and isinstance(kind := part.get("type"), str) and kind in set(Kind)


def _decoded(answer: Any, seconds: float) -> Decoded:
    """What a process answered."""
    kinds: dict[str, Callable[[str], Warning]] = {"MediaWarning": MediaWarning}
    return Decoded(
        request=unpacked(answer["request"]),
        prepared=Prepared(
            inputs=answer["prepared"]["inputs"],
            layouts=tuple(Layout(**layout) for layout in answer["prepared"]["layouts"]),
        ),
        also=answer["also"],
        warnings=tuple(kinds.get(kind, FastAVWarning)(message) for kind, message in answer["warnings"]),
        seconds=seconds,
    )


def _error_of(answer: Mapping[str, Any]) -> FastAVError:
    """The error that a process reports."""
    kind = answer["error"]
    if kind == "MemoryError":
        return MediaError("decoding takes more memory than is allowed here", "use shorter clips, or scale them down")
    known = getattr(errors, kind, None) if kind else None
    if isinstance(known, type) and issubclass(known, FastAVError):
        return known(answer["message"], answer["hint"])
    _log.error("a decoding process failed:\n%.10000s", answer.get("log"))
    return MediaError("the media could not be decoded: the decoder failed", "convert the file first")


def _crash_error() -> MediaError:
    return MediaError(
        "the media could not be decoded: the decoder crashed", "is the file damaged? convert it to another format first"
    )


def _closed_error() -> EngineStopped:
    return EngineStopped("the server is closing")


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit code {os.waitstatus_to_exitcode(status)}"
