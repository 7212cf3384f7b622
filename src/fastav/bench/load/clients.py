"""Concurrent clients of a server, by the `openai` package: each asks its next question when the last is answered."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastav.bench.load.prompts import Asking
from fastav.bench.load.server import Metrics, Server
from fastav.errors import FastAVError

MODEL = "load"  # what servers call what they serve
EVERY = 0.25  # seconds between looks at the server's metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What came of one question.

    prompt: its tokens, as the server counts them. first: seconds to the first token. gaps: seconds between later ones;
    tokens that come together share theirs. error: why there is no whole answer.
    """

    number: int
    prompt: int = 0
    tokens: tuple[int, ...] = ()
    first: float | int = 0.0
    gaps: tuple[float, ...] = ()
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One level of load.

    seconds: on the wall, from the first question to the last answer. cpu: seconds of the server's processes. looks:
    the server's metrics now and then. after: once all is answered.
    """

    said: Sequence[Said]
    seconds: float | int
    cpu: float | int
    looks: Sequence[Metrics]
    after: Metrics


def load(
    server: Server, asking: Asking, numbers: Sequence[int], clients: int, *, new: int, patience: float | int
) -> Seen:
    """Ask questions by so many clients at once.

    new: tokens of every answer. patience: seconds that a client waits for one.
    """
    return asyncio.run(_load(server, asking, numbers, clients, new, patience))


async def _load(
    server: Server, asking: Asking, numbers: Sequence[int], clients: int, new: int, patience: float | int
) -> Seen:
    from openai import AsyncOpenAI  # pyright: ignore[reportMissingImports]

    bodies = iter([(number, asking.body(number)) for number in numbers])
    said: list[Said] = []
    looks = [server.metrics()]
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=patience, max_retries=0) as client:
        watch = asyncio.create_task(_watched(server, looks))
        cpu, start = server.cpu(), time.perf_counter()
        await asyncio.gather(*(_client(client, bodies, said, new, patience) for _ in range(clients)))
        seconds, cpu = time.perf_counter() - start, server.cpu() - cpu
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
    server.require_alive()
    return Seen(said=said, seconds=seconds, cpu=cpu, looks=looks, after=await _settled(server))


async def _client(
    client: Any, bodies: Iterator[tuple[int, dict[str, Any]]], said: list[Said], new: int, patience: float | int
) -> None:
    for number, body in bodies:  # which all clients share
        try:
            async with asyncio.timeout(patience):
                said.append(await _asked(client, number, body, new))
        except Exception as error:  # whatever goes wrong, a question without an answer is what counts
            said.append(Said(number=number, error=f"{type(error).__name__}: {error}"[:300]))


async def _asked(client: Any, number: int, body: dict[str, Any], new: int) -> Said:
    """Ask one question, and follow the answer as it comes."""
    more = {"ignore_eos": True, "return_token_ids": True, **body["extra_body"]}
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
        extra_body=more,
    )
    async for chunk in stream:
        now = time.perf_counter()
        prompt = chunk.usage.prompt_tokens if chunk.usage else prompt
        come = [token for choice in chunk.choices for token in getattr(choice, "token_ids", None) or ()]
        if come and not tokens:
            first, last = now - start, now
            gaps += [0.0] * (len(come) - 1)
        elif come:
            gaps += [(now - last) / len(come)] * len(come)
            last = now
        tokens += come
    short = "" if len(tokens) == new else f"{len(tokens)} tokens came, not {new}"
    return Said(number=number, prompt=prompt, tokens=tuple(tokens), first=first, gaps=tuple(gaps), error=short)


async def _watched(server: Server, looks: list[Metrics]) -> None:
    """Look at the server's metrics until cancelled."""
    while True:
        await asyncio.sleep(EVERY)
        with suppress(FastAVError):  # a server that is gone is told of once nobody asks it any more
            looks.append(await asyncio.to_thread(server.metrics))


async def _settled(server: Server) -> Metrics:
    """The server's metrics once it says that nothing runs; as they are after some seconds if it does not."""
    for _ in range(20):
        now = server.metrics()
        if not (now.running or now.waiting or now.cache):
            return now
        await asyncio.sleep(EVERY)
    return server.metrics()
