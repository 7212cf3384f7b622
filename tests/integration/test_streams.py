"""Streams: the same text in pieces, and nothing left behind, however they end."""

import asyncio
import gc
import threading
import time
import warnings
from contextlib import suppress
from inspect import unwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import fastav
from fastav.decoding.stopping import Stop
from fastav.decoding.streaming import WINDOW, Stream
from fastav.engines.transformers.generation.sampler import TokenSampler
from fastav.errors import FastAVError, UnknownName, UnreadableMedia
from fastav.media import Clip
from fastav.request import Request
from fastav.request_lock import Cancellation, Cancelled, RequestLock
from fastav.streams import THREAD, AsyncTextStream, TextStream
from integration.test_no_trace import state_of

CLIPS = Path(fastav.__file__).parent / "assets" / "clips"
CLIP, QUESTION = Clip.open(CLIPS / "knock.mp4"), "describe the clip."
LONG = {"max_new_tokens": 200, "min_new_tokens": 200}


@pytest.fixture(scope="module")
def pipe():
    return fastav.pipeline("tiny", device="cpu")


@pytest.fixture(autouse=True)
def nothing_left(pipe):
    """After every test the model is as it was, its lock is free, no thread is left, and it answers."""
    model = pipe.engine.model
    before, hooks, threads = state_of(model), n_hooks(model), set(threading.enumerate())
    yield
    gc.collect()
    assert set(threading.enumerate()) <= threads
    assert not pipe.engine._answering._lock.locked()
    assert (state_of(model), n_hooks(model)) == (before, hooks)
    assert pipe(CLIP, QUESTION).text == "a yellow square moves right with two low buzz beeps"


def n_hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def tokens(monkeypatch) -> list[int]:
    """One entry for each token that is generated."""
    taken: list[int] = []
    plain = TokenSampler.take

    def take(self: Any, logits: Any) -> Any:
        taken.append(1)
        return plain(self, logits)

    monkeypatch.setattr(TokenSampler, "take", take)
    return taken


async def gathered(stream: AsyncTextStream) -> list[str]:
    return [piece async for piece in stream]


# --- the text


@pytest.mark.parametrize(
    "settings",
    [{}, {"plan": "none", "use": "audio"}, {"stop_strings": ["with two"]}, {"stop_strings": "buzz"}, LONG],
    ids=str,
)
def test_pieces_are_the_text(pipe, settings):
    answer = pipe(CLIP, QUESTION, **settings)
    stream = pipe.stream(CLIP, QUESTION, **settings)
    pieces = list(stream)
    assert "".join(pieces).strip() == answer.text == stream.answer.text
    assert len(pieces) > 1
    assert not any(text in "".join(pieces) for text in ("with two", "buzz") if text in str(settings))
    assert stream.answer.token_ids == answer.token_ids
    assert stream.answer.flops == answer.flops
    use, others = settings.get("use", "auto"), {name: value for name, value in settings.items() if name != "use"}
    later = pipe.astream(Request(clip=CLIP, question=QUESTION, use=use), **others)
    assert asyncio.run(gathered(later)) == pieces
    assert later.answer.token_ids == answer.token_ids


def test_pieces_come_while_the_answer_is_generated(pipe, tokens):
    seen = [len(tokens) for _ in zip(pipe.stream(CLIP, QUESTION, **LONG), range(3), strict=False)]
    assert seen[0] < LONG["max_new_tokens"]


def test_transformers_own_loop_streams_too(pipe):
    settings = {"prefix_allowed_tokens_fn": lambda _, ids: list(range(3, 60))}
    stream = pipe.stream(CLIP, QUESTION, **settings)
    assert "".join(stream).strip() == pipe(CLIP, QUESTION, **settings).text == stream.answer.text


class Bytes:
    """A tokenizer whose tokens are bytes, so that a character may take several."""

    def decode(self, ids: Any, skip_special_tokens: bool = False) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.mark.parametrize("text", ["ä b\nc", "日本語 — ok\n\n", "x" * (5 * WINDOW) + "é" + "y z " * WINDOW, "", " "])
def test_a_stream_puts_characters_together(text):
    pieces: list[str] = []
    stream = Stream(Bytes(), pieces.append, Stop(Bytes(), ["§"]))
    stream.put(torch.tensor([[1, 2]]))  # the prompt
    for byte in text.encode():
        stream.put(torch.tensor([byte]))
    stream.end()
    assert "".join(pieces) == text
    assert all(pieces)


def test_an_unfinished_character_at_the_end_is_not_lost():
    pieces: list[str] = []
    stream = Stream(Bytes(), pieces.append, Stop(Bytes(), []))
    for value in ([], [97], ["é".encode()[0]]):
        stream.put(torch.tensor(value, dtype=torch.long))
    stream.end()
    assert "".join(pieces) == Bytes().decode([97, "é".encode()[0]])


# --- early ends


def test_leaving_the_loop_stops_within_a_token(pipe, tokens, monkeypatch):
    checked = Cancellation.check
    since: list[int] = []

    def check(self: Any) -> None:
        try:
            checked(self)
        except Cancelled:
            since.append(len(tokens))
            raise

    monkeypatch.setattr(Cancellation, "check", check)
    cancelled: list[int] = []
    cancel = Cancellation.cancel
    monkeypatch.setattr(Cancellation, "cancel", lambda self: (cancelled.append(len(tokens)), cancel(self))[1])
    stream = pipe.stream(CLIP, QUESTION, **LONG)
    for _ in stream:
        break
    assert threads() == []
    assert len(tokens) < LONG["max_new_tokens"]
    assert since[0] - cancelled[0] <= 1
    with pytest.raises(FastAVError, match="the stream ended early, so there is no answer"):
        _ = stream.answer


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD)]


def test_close_and_with_stop_too(pipe, tokens):
    with pipe.stream(CLIP, QUESTION, **LONG) as stream:
        pieces = iter(stream)
        next(pieces)
        assert threads()
    assert threads() == []
    stream.close()
    assert list(pieces) == [] or len(tokens) < LONG["max_new_tokens"]


def test_an_error_in_the_loop_stops_too(pipe, tokens):
    def respond() -> Any:
        yield from pipe.stream(CLIP, QUESTION, **LONG)

    def read() -> None:
        for piece in respond():
            raise LookupError(piece)

    with pytest.raises(LookupError):
        read()
    assert threads() == []
    assert len(tokens) < LONG["max_new_tokens"]
    responding = respond()
    next(responding)
    responding.close()
    assert threads() == []


def test_a_stream_that_nobody_reads_does_nothing(pipe, tokens):
    stream, other = pipe.stream(CLIP, QUESTION), pipe.stream(CLIP, QUESTION)
    with pytest.raises(FastAVError, match="the stream has not ended"):
        _ = stream.answer
    assert (threads(), tokens) == ([], [])
    del stream
    other.close()
    with pytest.raises(FastAVError, match="can be read once"):
        list(other)


def test_a_stream_is_read_once(pipe):
    stream = pipe.stream(CLIP, QUESTION)
    list(stream)
    with pytest.raises(FastAVError, match="can be read once"):
        list(stream)


def test_cancelling_a_task_stops(pipe, tokens):
    async def main() -> None:
        async def read() -> None:
            async for _ in pipe.astream(CLIP, QUESTION, **LONG):
                begun.set()

        begun = asyncio.Event()
        task = asyncio.create_task(read())
        await begun.wait()
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        assert threads() == []

    asyncio.run(main())
    assert len(tokens) < LONG["max_new_tokens"]


def test_leaving_an_asynchronous_loop_stops(pipe, tokens):
    async def main() -> None:
        async for _ in pipe.astream(CLIP, QUESTION, **LONG):
            break
        async with pipe.astream(CLIP, QUESTION, **LONG) as stream:
            async for _ in stream:
                break
        with pytest.raises(FastAVError, match="ended early"):
            _ = stream.answer

    asyncio.run(main())
    assert threads() == []
    assert len(tokens) < 2 * LONG["max_new_tokens"]


def test_the_event_loop_goes_on_meanwhile(pipe):
    async def main() -> int:
        ticks, reading = 0, asyncio.create_task(gathered(pipe.astream(CLIP, QUESTION, **LONG)))
        while not reading.done():
            await asyncio.sleep(0.001)
            ticks += 1
        return ticks

    assert asyncio.run(main()) > 10


# --- errors


@pytest.mark.parametrize("name", ["stream", "astream"])
def test_bad_arguments_are_one_error_at_once(pipe, name):
    make = getattr(pipe, name)
    for arguments, settings, message in (
        ((CLIP, QUESTION), {"temprature": 1}, "temperature"),
        ((CLIP, QUESTION), {"plan": "fastaw"}, "fastav"),
        ((CLIP, QUESTION), {"use": "eyes"}, "use of a clip"),
    ):
        with pytest.raises(UnknownName, match=message):
            make(*arguments, **settings)
    with pytest.raises(FastAVError, match="a stream is one answer, and this is a list"):
        unwrap(getattr(type(pipe), name))(pipe, [CLIP], QUESTION)  # unwrapped: the tests check types before it can


def test_errors_are_raised_in_the_loop(pipe, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("on purpose")

    missing = pipe.stream("missing.mp4", QUESTION)
    with pytest.raises(UnreadableMedia, match="no such file"):
        list(missing)
    with pytest.raises(FastAVError, match="ended early"):
        _ = missing.answer
    with pytest.raises(FastAVError, match="beams have no text"):
        list(pipe.stream(CLIP, QUESTION, num_beams=2))
    with monkeypatch.context() as patch:
        patch.setattr(TokenSampler, "take", fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            list(pipe.stream(CLIP, QUESTION))
        with pytest.raises(RuntimeError, match="on purpose"):
            asyncio.run(gathered(pipe.astream(CLIP, QUESTION)))


def test_warnings_are_those_of_a_call(pipe):
    with pytest.warns(fastav.FastAVWarning, match="does not know"):
        list(pipe.stream(CLIP, "describe the elephant."))


# --- several at once


def test_streams_queue(pipe):
    expected = [pipe(CLIP, question).text for question in (QUESTION, "what sound do you hear?")]
    first, second = pipe.stream(CLIP, QUESTION), pipe.stream(CLIP, "what sound do you hear?")
    found: list[list[str]] = [[], []]
    readers = [
        threading.Thread(target=lambda pieces, stream: pieces.extend(stream), args=(pieces, stream))
        for pieces, stream in zip(found, (first, second), strict=True)
    ]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert ["".join(pieces).strip() for pieces in found] == expected

    async def both() -> list[list[str]]:
        questions = (QUESTION, "what sound do you hear?")
        return list(await asyncio.gather(*(gathered(pipe.astream(CLIP, question)) for question in questions)))

    assert ["".join(pieces).strip() for pieces in asyncio.run(both())] == expected


def test_a_slow_reader_holds_nobody_up(pipe):
    pieces = iter(pipe.stream(CLIP, QUESTION))
    first = next(pieces)
    inner = pipe(CLIP, "what sound do you hear?")  # within the loop
    assert inner.text
    assert (first + "".join(pieces)).strip() == pipe(CLIP, QUESTION).text


def test_a_stream_that_waits_for_its_turn_can_be_left(pipe):
    stream = pipe.stream(CLIP, QUESTION)
    with pipe.engine._answering:
        reader = threading.Thread(target=list, args=(stream,))
        reader.start()
        while not threads():
            time.sleep(0.005)
        stream.close()  # though the model is not free
        reader.join(10)
        assert not reader.is_alive()
    assert threads() == []


def test_a_request_that_is_cancelled_gives_its_turn_away():
    lock, cancellation = RequestLock(), Cancellation()
    cancellation.cancel()
    with pytest.raises(Cancelled), lock.turn(cancellation):
        pytest.fail("entered")
    with lock.turn(Cancellation()), pytest.raises(FastAVError, match="within it"), lock.turn(Cancellation()):
        pytest.fail("entered")
    with lock:
        pass


def test_kinds_of_streams(pipe):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(pipe.stream(CLIP, QUESTION), TextStream)
        assert isinstance(pipe.astream(CLIP, QUESTION), AsyncTextStream)
