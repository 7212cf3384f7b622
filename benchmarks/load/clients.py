"""Concurrent clients of a server, by the `openai` package: each asks its next question after the last answer."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Any

from benchmarks.load.questions import QuestionSet
from benchmarks.load.server import Metrics, Server
from fastav.errors import FastAVError

MODEL = "load"  # the name under which servers serve the model
INTERVAL = 0.25  # seconds between reads of the server's metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """The answer to one question.

    prompt: its tokens, as the server counts them. first: seconds to the first token. gaps: seconds between later ones;
    tokens that arrive together share theirs. error: why there is no complete answer.
    """

    number: int
    prompt: int = 0
    tokens: tuple[int, ...] = ()
    first: float | int = 0.0
    gaps: tuple[float, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LevelResult:
    """One level of load.

    asked: numbers of the questions. seconds: elapsed, from the first question to the last answer. cpu: CPU seconds of
    the server's processes. metrics: of the server, read while it works. after: its metrics after the last answer.
    """

    asked: Sequence[int]
    completions: Sequence[Completion]
    seconds: float | int
    cpu: float | int
    metrics: Sequence[Metrics]
    after: Metrics


def run_clients(
    server: Server,
    questions: QuestionSet,
    numbers: Sequence[int],
    clients: int,
    *,
    new: int,
    patience: float | int,
    seconds: float | int = inf,
) -> LevelResult:
    """Ask the questions with these numbers, by this many clients at once.

    new: tokens of every answer. patience: seconds that a client waits for one. seconds: time after which no question
    is asked.
    """
    return asyncio.run(_run(server, questions, numbers, clients, new, patience, seconds))


async def _run(
    server: Server,
    questions: QuestionSet,
    numbers: Sequence[int],
    clients: int,
    new: int,
    patience: float | int,
    bound: float | int,
) -> LevelResult:
    from openai import AsyncOpenAI  # pyright: ignore[reportMissingImports]

    asked: list[int] = []
    completions: list[Completion] = []
    metrics = [server.metrics()]
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=patience, max_retries=0) as client:
        monitor = asyncio.create_task(_monitor(server, metrics))
        cpu, start = server.cpu(), time.perf_counter()
        bodies = _bodies(questions, numbers, asked, start + bound)
        await asyncio.gather(*(_client(client, bodies, completions, new, patience) for _ in range(clients)))
        seconds, cpu = time.perf_counter() - start, server.cpu() - cpu
        monitor.cancel()
        with suppress(asyncio.CancelledError):
            await monitor
    server.require_alive()
    after = await _idle_metrics(server)
    return LevelResult(asked=asked, completions=completions, seconds=seconds, cpu=cpu, metrics=metrics, after=after)


def _bodies(
    questions: QuestionSet, numbers: Sequence[int], asked: list[int], end: float | int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The questions, until a time of `time.perf_counter`.  asked: gets the number of each."""
    for number in numbers:
        if time.perf_counter() >= end:
            return
        asked.append(number)
        yield number, questions.body(number)


async def _client(
    client: Any,
    bodies: Iterator[tuple[int, dict[str, Any]]],
    completions: list[Completion],
    new: int,
    patience: float | int,
) -> None:
    for number, body in bodies:  # which all clients share
        try:
            async with asyncio.timeout(patience):
                completions.append(await _ask(client, number, body, new))
        except Exception as error:  # every error is a question without an answer
            completions.append(Completion(number=number, error=f"{type(error).__name__}: {error}"[:300]))


async def _ask(client: Any, number: int, body: dict[str, Any], new: int) -> Completion:
    """Ask one question, and follow the answer while it arrives."""
    tokens: list[int] = []
    first, prompt, gaps = 0.0, 0, []
    start = last = time.perf_counter()
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=body["messages"],
        max_tokens=new,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True, "return_token_ids": True, **body["extra_body"]},
    )
    async for chunk in stream:
        now = time.perf_counter()
        prompt = chunk.usage.prompt_tokens if chunk.usage else prompt
        arrived = [token for choice in chunk.choices for token in getattr(choice, "token_ids", None) or ()]
        if arrived and not tokens:
            first, last = now - start, now
            gaps += [0.0] * (len(arrived) - 1)
        elif arrived:
            gaps += [(now - last) / len(arrived)] * len(arrived)
            last = now
        tokens += arrived
    error = "" if len(tokens) == new else f"{len(tokens)} tokens came, not {new}"
    return Completion(number=number, prompt=prompt, tokens=tuple(tokens), first=first, gaps=tuple(gaps), error=error)


async def _monitor(server: Server, metrics: list[Metrics]) -> None:
    """Read the server's metrics until cancelled."""
    while True:
        await asyncio.sleep(INTERVAL)
        with suppress(FastAVError):  # the level ends with `require_alive`, which reports a server that is gone
            metrics.append(await asyncio.to_thread(server.metrics))


async def _idle_metrics(server: Server) -> Metrics:
    """The server's metrics once nothing runs; after some seconds, whatever they are."""
    for _ in range(20):
        metrics = server.metrics()
        if not metrics.busy:
            return metrics
        await asyncio.sleep(INTERVAL)
    return server.metrics()
