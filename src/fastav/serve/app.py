"""The HTTP application: OpenAI's API over one pipeline, and the page."""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager
from functools import cached_property, partial
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from fastav import __version__
from fastav.adapter import Prepared
from fastav.batches import attempt
from fastav.decoding.settings import MAX_NEW_TOKENS, resolve_settings
from fastav.engine import Answer
from fastav.errors import EngineStopped, FastAVError, PlanNotApplied
from fastav.messages import Use
from fastav.pipelines import Pipeline
from fastav.plan import Plan
from fastav.recipes import has_budget
from fastav.registry import RECIPES
from fastav.report.answer import template
from fastav.report.inspection import items_json, to_json
from fastav.request import Request as ModelRequest
from fastav.serve import protocol
from fastav.serve.content import MediaAccess
from fastav.serve.decoder import Decoded, MediaDecoder
from fastav.serve.files import StoreFull, UnknownFile, examples
from fastav.serve.guard import error_object
from fastav.serve.limits import Limits
from fastav.serve.logprobs import LogprobRecorder
from fastav.serve.metrics import Metrics
from fastav.serve.protocol import ChatRequest, InvalidRequest, UnknownModel
from fastav.serve.scheduler import THREADS, Job, QueueFull, Scheduler, Stopping

STATUS: tuple[tuple[type[Exception], int, str], ...] = (
    (QueueFull, 429, "queue_full"),
    (Stopping, 503, "shutting_down"),
    (EngineStopped, 503, "engine_stopped"),
    (PlanNotApplied, 500, "plan_not_applied"),
    (UnknownModel, 404, "model_not_found"),
    (UnknownFile, 404, "file_not_found"),
    (StoreFull, 413, "too_large"),
    (TimeoutError, 504, "timeout"),
    (FastAVError, 400, "invalid_request"),
)
LARGE_BODY = 2**20  # bytes from which a body is parsed in a thread
MAX_DEPTH, MAX_VALUES = 64, 500_000  # of JSON
CHARSET = re.compile(r";\s*charset\s*=\s*\"?([^\s\";]*)", re.IGNORECASE)

_log = logging.getLogger(__name__)


class Served:
    """What the routes of one server share.

    pipe: of the engine transformers. name: under which clients know the model.
    """

    def __init__(self, pipe: Pipeline, name: str, decoder: MediaDecoder, access: MediaAccess, *, batch: int) -> None:
        self.pipe, self.name, self.decoder, self.access = pipe, name, decoder, access
        self.limits, self.metrics, self.created = access.limits, Metrics(), int(time.time())
        self.scheduler = Scheduler(pipe.engine, batch=batch, capacity=self.limits.queue, on_batch=self.metrics.batch)
        self.metrics.watch(self.scheduler)
        # one at a time, in a thread of their own: they cannot be cancelled once they run, and nothing else waits for it
        self.inspections = ThreadPoolExecutor(1, f"{THREADS}-inspect")

    @cached_property
    def model(self) -> dict[str, Any]:
        """The object of `/v1/models`."""
        engine: Any = self.pipe.engine
        adapter, text = self.pipe.adapter, engine.model.config.get_text_config(decoder=True)
        names = ("media", "media_seconds", "body_bytes", "new_tokens")
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "fastav",
            "max_model_len": text.max_position_embeddings,
            "fastav": {
                "version": __version__,
                "family": adapter.name,
                "layers": text.num_hidden_layers,
                "device": engine.device,
                "dtype": engine.dtype,
                "supports_audio": adapter.supports_audio,
                "supports_images": adapter.supports_images,
                "default_plan": self.pipe.plan.name or "custom",
                "plans": ["none", *adapter.presets],
                "recipes": list(RECIPES),
                "budgets": [name for name in RECIPES if has_budget(name)],
                "limits": {name: getattr(self.limits, name) for name in names},
            },
        }

    async def decode(
        self, chat: ChatRequest, *, also: Callable[[ModelRequest, Prepared], Any] | None = None
    ) -> Decoded:
        """The media of a request, loaded and decoded.  also: as for `MediaDecoder.decode`."""
        with self.scheduler.expecting():
            messages = await self.access.messages(chat.messages)
            return await self.decoder.decode(messages, tools=chat.tools or (), use=Use(chat.use), also=also)

    def plan_of(self, chat: ChatRequest) -> Plan:
        """The plan of a request, checked for this model.  Raises: UnknownModel, PlanError, UnsupportedPlan."""
        if chat.model != self.name:
            raise UnknownModel(f"the model {chat.model[:200]!r} is not served here", f"this server has {self.name!r}")
        plan = chat.plan(self.pipe.adapter, self.pipe.plan)
        if plan != self.pipe.plan:
            engine: Any = self.pipe.engine
            engine.check(engine.model.config, plan, engine.model.config._attn_implementation, adapter=self.pipe.adapter)
        return plan

    def settings(self, chat: ChatRequest, choice: int) -> dict[str, Any]:
        """The settings of one answer to a request.  Raises: InvalidRequest, PlanError."""
        engine: Any = self.pipe.engine
        settings = chat.settings(self.limits, choice)
        config = resolve_settings(settings, engine.generation_config).config
        new = config.max_new_tokens or (MAX_NEW_TOKENS if config.max_length is None else 0)
        return settings | ({"max_new_tokens": self.limits.new_tokens} if new > self.limits.new_tokens else {})

    def close(self) -> None:
        """End threads and processes."""
        self.inspections.shutdown(wait=True, cancel_futures=True)
        self.scheduler.close()
        self.decoder.close()
        self.pipe.engine.close()


def create_app(served: Served) -> FastAPI:
    """The application of a server, without what `Guard` does."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(examples)  # opening them takes a moment
        yield
        await asyncio.to_thread(served.close)

    app = FastAPI(
        title="fastav",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.add_exception_handler(FastAVError, _on_error)
    app.add_exception_handler(TimeoutError, _on_error)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(_Left, _on_left)
    app.add_exception_handler(ClientDisconnect, _on_left)
    app.add_exception_handler(Exception, _on_internal_error)

    async def chat_completions(request: Request) -> Response:
        chat = protocol.parse(await _json(request))
        chat_answers = ChatAnswers(served, chat, request)
        return chat_answers if chat.stream else await chat_answers.response()

    async def inspect(request: Request) -> Response:
        chat = protocol.parse(await _json(request))
        plan = served.plan_of(chat)
        with served.scheduler.admission():
            work = partial(_inspection, served, chat, plan)
            return Response(await _while_connected(request, work, served.limits), media_type="application/json")

    async def upload(request: Request) -> Response:
        if (charset := CHARSET.search(request.headers.get("content-type", ""))) and charset[1].lower() != "utf-8":
            raise InvalidRequest("the form must be UTF-8", "leave out the charset")
        try:
            async with request.form(max_files=1, max_fields=4, max_part_size=2**16) as form:
                file, purpose = form.get("file"), form.get("purpose")
                if not isinstance(file, UploadFile):
                    raise InvalidRequest("the form has no file", "send multipart/form-data with the field file")
                data = await file.read()
        except (AssertionError, HTTPException) as error:
            raise InvalidRequest(f"the form cannot be read: {getattr(error, 'detail', error)}") from None
        purpose = purpose if isinstance(purpose, str) else ""
        stored = served.access.files.add(file.filename or "file", file.content_type or "", data, purpose)
        return JSONResponse(stored.to_dict())

    store = served.access.files

    async def list_files() -> Response:
        return JSONResponse({"object": "list", "data": [one.to_dict() for one in store.all()], "has_more": False})

    async def file(identifier: str) -> Response:
        return JSONResponse(store.get(identifier).to_dict())

    async def delete_file(identifier: str) -> Response:
        store.delete(identifier)
        return JSONResponse({"id": identifier, "object": "file", "deleted": True})

    async def file_content(identifier: str) -> Response:
        return _download(store.get(identifier).data)

    async def list_examples() -> Response:
        return JSONResponse({"object": "list", "data": [one.to_dict() for one in examples().values()]})

    async def example(identifier: str) -> Response:
        if identifier not in examples():
            raise UnknownFile(f"there is no example {identifier[:80]!r}")
        return Response(examples()[identifier].file.data, media_type="video/mp4")

    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [served.model]})

    async def model(identifier: str) -> Response:
        if identifier != served.name:
            raise UnknownModel(f"the model {identifier[:200]!r} is not served here", f"this server has {served.name!r}")
        return JSONResponse(served.model)

    async def health() -> Response:
        failure = served.scheduler.failure
        body = {"status": "ok"} if failure is None else error_object(failure.message, "engine_stopped", 503)
        return JSONResponse(body, 200 if failure is None else 503)

    async def metrics() -> Response:
        return Response(served.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    routes: list[tuple[str, str, Callable[..., Awaitable[Response]]]] = [
        ("POST", "/v1/chat/completions", chat_completions),
        ("POST", "/v1/inspect", inspect),
        ("POST", "/v1/files", upload),
        ("GET", "/v1/files", list_files),
        ("GET", "/v1/files/{identifier}", file),
        ("DELETE", "/v1/files/{identifier}", delete_file),
        ("GET", "/v1/files/{identifier}/content", file_content),
        ("GET", "/v1/examples", list_examples),
        ("GET", "/v1/examples/{identifier}", example),
        ("GET", "/v1/models", models),
        ("GET", "/v1/models/{identifier:path}", model),
        ("GET", "/health", health),
        ("GET", "/metrics", metrics),
    ]
    routes += [("GET", path, partial(_static, kind, data)) for path, (kind, data) in _page().items()]
    for method, path, route in routes:
        methods = ["GET", "HEAD"] if method == "GET" else [method]
        app.add_api_route(path, route, methods=methods, response_model=None)
    return app


# --- chat completions


class ChatAnswers(Response):
    """The answers to one chat completion: `response` waits for them; as a response it streams them."""

    def __init__(self, served: Served, chat: ChatRequest, request: Request) -> None:
        super().__init__()
        self._served, self._chat, self._request = served, chat, request
        self._id, self._created, self._start = protocol.new_id(), int(time.time()), time.monotonic()
        self._recorders: list[LogprobRecorder] = []
        self._warnings: list[str] = []  # about the media and the question
        self._plan = served.plan_of(chat)
        self._settings = [served.settings(chat, choice) for choice in range(chat.choices)]  # before any work
        if chat.choices > served.limits.queue:
            raise InvalidRequest(f"n is {chat.choices}, and the queue of this server has {served.limits.queue} places")
        self._places = ExitStack()
        self._places.enter_context(served.scheduler.admission(chat.choices))

    async def response(self) -> Response:
        """The whole response."""
        with self._places:
            body = await _while_connected(self._request, self._complete, self._served.limits)
        return Response(body, media_type="application/json")

    async def _complete(self) -> bytes:
        jobs = self._jobs(await self._served.decode(self._chat))
        try:
            answers = await self._answers(jobs)
        finally:
            _cancel(jobs)
        logprobs = [self._steps(index, 0, answer.token_ids) for index, answer in enumerate(answers)]
        return _bytes(protocol.completion(self._id, self._served.name, answers, logprobs, self._warnings))

    def _jobs(self, decoded: Decoded, pieces: "asyncio.Queue[tuple[int, str]] | None" = None) -> list[Job]:
        """The jobs of all choices, submitted.  pieces: gets the text of each."""
        chat, jobs = self._chat, []
        self._warnings = [str(warning) for warning in decoded.warnings]
        for choice, settings in enumerate(self._settings):
            if chat.logprobs:
                engine: Any = self._served.pipe.engine
                self._recorders.append(LogprobRecorder(engine.processor.tokenizer, chat.top_logprobs or 0))
                settings = settings | {"logits_processor": [self._recorders[-1]]}
            on_text = None if pieces is None else partial(_put, pieces, choice)
            jobs.append(
                Job(
                    request=decoded.request,
                    prepared=decoded.prepared,
                    plan=self._plan,
                    settings=settings,
                    is_alone="seed" in settings or chat.logprobs is True,
                    on_text=on_text,
                    media_seconds=decoded.seconds,
                )
            )
        self._served.scheduler.submit(jobs)
        return jobs

    async def _answers(self, jobs: Sequence[Job]) -> list[Answer]:
        answers = [await job.answer for job in jobs]
        for answer in answers:
            self._served.metrics.answer(answer)
        return answers

    def _steps(self, choice: int, start: int, tokens: tuple[int, ...] | None) -> list[dict[str, Any]] | None:
        return self._recorders[choice].steps(start, tokens) if self._recorders else None

    # --- streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream the answers.  An error before the first text is a response with its status."""
        with self._places:
            streaming = asyncio.ensure_future(self._stream(_Events(scope, receive, send)))
            leaving = asyncio.ensure_future(_left(self._request.receive))
            try:
                await asyncio.wait((streaming, leaving), return_when=asyncio.FIRST_COMPLETED)
            finally:
                leaving.cancel()
                streaming.cancel()
                await asyncio.gather(streaming, leaving, return_exceptions=True)

    async def _stream(self, events: "_Events") -> None:
        jobs: list[Job] = []
        try:
            async with asyncio.timeout(self._served.limits.request_seconds):
                pieces: asyncio.Queue[tuple[int, str]] = asyncio.Queue()
                jobs = self._jobs(await self._served.decode(self._chat), pieces)
                await self._send_text(events, pieces, jobs)
                answers = await self._answers(jobs)
                for choice, answer in enumerate(answers):
                    steps = self._steps(choice, self._told[choice], answer.token_ids)
                    await events.send(self._piece(choice, {}, finish=answer.finish, logprobs=steps))
                if self._chat.includes_usage:
                    name, created = self._served.name, self._created
                    await events.send(protocol.usage_chunk(self._id, name, created, answers, self._warnings))
        except (FastAVError, TimeoutError) as error:
            await events.fail(_error_response(error))
        except Exception:
            _log.exception("an internal error")
            await events.fail(_internal_error())
        finally:
            _cancel(jobs)
        await events.end()

    async def _send_text(
        self, events: "_Events", pieces: "asyncio.Queue[tuple[int, str]]", jobs: Sequence[Job]
    ) -> None:
        texts = [_Trimmed() for _ in jobs]
        self._told = [0 for _ in jobs]  # steps whose log probabilities were sent
        async for choice, piece in _until_done(pieces, jobs):
            if not (text := texts[choice].add(piece)):
                continue
            if not events.begun:
                self._served.metrics.first_text.observe(time.monotonic() - self._start)
                await self._send_roles(events, len(jobs))
            steps = self._steps(choice, self._told[choice], None)
            self._told[choice] += len(steps or ())
            await events.send(self._piece(choice, {"content": text}, logprobs=steps))
        if not events.begun:
            await self._send_roles(events, len(jobs))

    async def _send_roles(self, events: "_Events", choices: int) -> None:
        for choice in range(choices):
            await events.send(self._piece(choice, {"role": "assistant", "content": ""}))

    def _piece(self, choice: int, delta: Mapping[str, Any], **fields: Any) -> dict[str, Any]:
        return protocol.chunk(self._id, self._served.name, self._created, choice, delta, **fields)


class _Events:
    """Server-sent events of one response, which begins with the first of them.  begun: whether it has."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self.begun, self._ended = False, False

    async def send(self, data: Mapping[str, Any]) -> None:
        """Send an object."""
        if not self.begun:
            self.begun = True
            headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._line(_bytes(data))

    async def fail(self, error: Response) -> None:
        """Send an error: as the whole response if none has begun, else as an event."""
        if self.begun:
            await self._line(bytes(error.body))
        else:
            self._ended = True
            await error(self._scope, self._receive, self._send)

    async def end(self) -> None:
        """End the response."""
        if not self._ended:
            await self._line(b"[DONE]")
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _line(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})


class _Trimmed:
    """The text of an answer without spaces at both ends, piece by piece."""

    def __init__(self) -> None:
        self._spaces, self._length = "", 0

    def __len__(self) -> int:
        return self._length

    def add(self, piece: str) -> str:
        """What can be passed on."""
        text = self._spaces + piece
        text = text if self._length else text.lstrip()
        ready = text.rstrip()
        self._spaces = text[len(ready) :]
        self._length += len(ready)
        return ready


async def _until_done(pieces: "asyncio.Queue[tuple[int, str]]", jobs: Sequence[Job]) -> AsyncIterator[tuple[int, str]]:
    """The pieces of all jobs, until they have their answers.  Raises: the first error of a job."""
    done = asyncio.gather(*(job.answer for job in jobs))
    done.add_done_callback(partial(_tell_end, pieces))
    while (item := await pieces.get())[0] >= 0:
        yield item
    done.result()


def _tell_end(pieces: "asyncio.Queue[tuple[int, str]]", done: "asyncio.Future[Any]") -> None:
    if not done.cancelled():
        done.exception()  # read, as the one who waits may have left
    pieces.put_nowait((-1, ""))


def _put(pieces: "asyncio.Queue[tuple[int, str]]", choice: int, piece: str) -> None:
    pieces.put_nowait((choice, piece))


def _cancel(jobs: Sequence[Job]) -> None:
    """End jobs that nobody waits for any more; those with an answer are not affected."""
    for job in jobs:
        job.cancellation.cancel()


# --- inspections


async def _inspection(served: Served, chat: ChatRequest, plan: Plan) -> bytes:
    decoded = await served.decode(chat, also=_items)
    engine = served.pipe.engine
    inspect = partial(attempt, partial(engine.inspect, decoded.request, plan))
    inspection = await asyncio.get_running_loop().run_in_executor(served.inspections, inspect)
    if isinstance(inspection, FastAVError):
        raise inspection
    items, names = json.loads(decoded.also), served.access.names(chat.messages)
    if len(items) == len(names):  # fewer, if a sound is that of a video
        items = [item | ({"name": name} if name else {}) for item, name in zip(items, names, strict=True)]
    data = to_json(inspection, decoded.request, items=items)
    return await asyncio.to_thread(_bytes, data | {"model": served.name})


def _items(request: ModelRequest, prepared: Prepared) -> str:
    """The pictures and outlines of sounds; runs in the process that decodes."""
    return json.dumps(items_json(request, prepared.layouts[0]))


# --- requests, responses and errors


class _Left(Exception):
    """The client has left."""


async def _while_connected(request: Request, work: Callable[[], Awaitable[Any]], limits: Limits) -> Any:
    """The result of some work, which is cancelled if the client leaves or the time is over.

    Raises: _Left, TimeoutError, and what the work raises.
    """
    working = asyncio.ensure_future(work())
    leaving = asyncio.ensure_future(_left(request.receive))
    try:
        async with asyncio.timeout(limits.request_seconds):
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _Left
        return working.result()
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _json(request: Request) -> Any:
    """The body as JSON.  Raises: InvalidRequest."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page of another site could send anything else without being asked
        raise InvalidRequest("the body must be JSON", "send the header Content-Type: application/json")
    body = await request.body()
    try:
        return await asyncio.to_thread(_loads, body) if len(body) > LARGE_BODY else _loads(body)
    except (ValueError, RecursionError):
        raise InvalidRequest("the body is not JSON") from None


def _loads(body: bytes) -> Any:
    """The value of some JSON, whose texts are Unicode.  Raises: ValueError, InvalidRequest."""
    if sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:  # each takes a hundred bytes in memory, or more
        raise InvalidRequest(f"the body has more than {MAX_VALUES:,} values")
    value = json.loads(body.decode(), parse_constant=_no_constant)
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        texts = [one for one in level if isinstance(one, str)]
        if any(not text.isascii() and _has_surrogates(text) for text in texts):
            raise InvalidRequest("a text of the body is not Unicode: it has lone surrogates")
        containers = [one for one in level if isinstance(one, dict | list)]
        if not containers:
            return value
        level = [part for one in containers for part in ([*one, *one.values()] if isinstance(one, dict) else one)]
    raise InvalidRequest(f"the body is nested more than {MAX_DEPTH} levels deep")


def _has_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _bytes(body: Any) -> bytes:
    return json.dumps(body, ensure_ascii=False, allow_nan=False).encode()


def _status(error: Exception) -> tuple[int, str, str]:
    """Status, code and message of an error."""
    if type(error) is FastAVError and isinstance(error.__cause__, Exception):  # not one that fastav foresees
        _log.error("a request failed", exc_info=error.__cause__)
        return 500, "internal_error", "this could not be answered"
    status, code = next((status, code) for kind, status, code in STATUS if isinstance(error, kind))
    if isinstance(error, FastAVError):
        return status, code, f"{error.message} ({error.hint})" if error.hint else error.message
    return status, code, "the request took too long"


def _error_response(error: Exception) -> Response:
    status, code, message = _status(error)
    retry = {429: getattr(error, "retry_after", 1), 503: 5}.get(status)
    headers = {} if retry is None else {"Retry-After": str(retry)}
    return JSONResponse(error_object(message, code, status, getattr(error, "param", None)), status, headers)


def _internal_error() -> Response:
    return JSONResponse(error_object("internal error", "internal_error", 500), 500)


async def _on_error(_: Request, error: Exception) -> Response:
    return _error_response(error)


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status, message = error.status_code, str(error.detail)
    if status == 404:
        message = "there is no such path: chats are at /v1/chat/completions, the model is at /v1/models"
    return JSONResponse(error_object(message, "http_error", status), status, error.headers)


async def _on_left(_: Request, error: Exception) -> Response:
    return Response(status_code=499)  # which nobody reads; logs and metrics have it


async def _on_internal_error(_: Request, error: Exception) -> Response:
    return JSONResponse(error_object("internal error", "internal_error", 500), 500)  # `Guard` logs it


# --- the page

KINDS = {"html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}


def _page() -> dict[str, tuple[str, bytes]]:
    """The files of the page by path, with their media types."""
    found: dict[str, tuple[str, bytes]] = {}
    for package, names in (("fastav.serve", ("page",)), ("fastav.report", ("viewer.js", "viewer.css"))):
        for name in names:
            entry = files(package) / name
            for file in [entry] if entry.is_file() else entry.iterdir():
                kind = KINDS.get(file.name.rpartition(".")[2])
                if kind is not None:
                    path = "/" if file.name == "index.html" else f"/static/{file.name}"
                    found[path] = kind, file.read_bytes()
    found["/static/report.html"] = KINDS["html"], template().encode()
    return found


async def _static(kind: str, data: bytes) -> Response:
    return Response(data, media_type=kind, headers={"Cache-Control": "no-cache"})


def _download(data: bytes) -> Response:
    headers = {"Content-Disposition": "attachment"}  # never shown as a page of this server
    return Response(data, media_type="application/octet-stream", headers=headers)
