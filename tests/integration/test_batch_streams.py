"""Batches whose answers stream: each listener gets its own text, and leaving changes no other answer."""

from pathlib import Path
from typing import Any

import pytest

import fastav
from fastav.engine import Listener
from fastav.errors import FastAVError, PlanError
from fastav.request import Request
from fastav.request_lock import Cancellation, Cancelled

CLIPS = Path(fastav.__file__).parent / "assets" / "clips"
QUESTIONS = ("describe the clip.", "which color moves?", "how many beeps are there?", "what happens in the clip?")
LOOPS: dict[str, dict[str, Any]] = {"own loop": {}, "transformers": {"logits_processor": [lambda ids, scores: scores]}}


@pytest.fixture(scope="module")
def pipe():
    return fastav.pipeline("tiny", device="cpu")


@pytest.fixture(scope="module")
def requests():
    return [Request(clip=CLIPS / "knock.mp4", question=question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def alone(pipe, requests):
    return [pipe(request) for request in requests]


def run(pipe: Any, requests: Any, listeners: Any, **settings: Any) -> Any:
    return pipe.engine.preparer(pipe.plan, **settings)(requests)(listeners)


@pytest.mark.parametrize("loop", LOOPS)
def test_every_listener_gets_the_text_of_its_own_answer(pipe, requests, alone, loop):
    pieces: list[list[str]] = [[] for _ in requests]
    listeners = [Listener(on_text=one.append) for one in pieces]
    answers = run(pipe, requests, listeners, **LOOPS[loop])
    assert [answer.text for answer in answers] == [answer.text for answer in alone]
    assert ["".join(one).strip() for one in pieces] == [answer.text for answer in alone]
    assert any(len(one) > 3 for one in pieces)  # words come one by one


@pytest.mark.parametrize("loop", LOOPS)
def test_stop_texts_end_the_rows_that_have_them(pipe, requests, alone, loop):
    pieces: list[list[str]] = [[] for _ in requests]
    listeners = [Listener(on_text=one.append) for one in pieces]
    answers = run(pipe, requests, listeners, stop_strings=["moves"], **LOOPS[loop])
    expected = [answer.text.partition("moves")[0].strip() for answer in alone]
    assert [answer.text for answer in answers] == expected
    assert ["".join(one).strip() for one in pieces] == expected


def test_some_rows_may_be_read_at_the_end_only(pipe, requests, alone):
    pieces: list[str] = []
    listeners = [Listener(), Listener(on_text=pieces.append), Listener(cancellation=Cancellation()), Listener()]
    answers = run(pipe, requests, listeners)
    assert [answer.text for answer in answers] == [answer.text for answer in alone]
    assert "".join(pieces).strip() == alone[1].text


@pytest.mark.parametrize("loop", LOOPS)
def test_a_cancelled_row_leaves_the_others_as_they_are(pipe, requests, loop):
    settings = {"max_new_tokens": 40, "min_new_tokens": 40, **LOOPS[loop]}
    expected = [pipe(request, **settings).text for request in requests]
    cancellation, pieces = Cancellation(), []

    def leave(piece: str) -> None:
        pieces.append(piece)
        cancellation.cancel()

    listeners = [Listener(on_text=leave, cancellation=cancellation), *(Listener() for _ in requests[1:])]
    answers = run(pipe, requests, listeners, **settings)
    assert [answer.text for answer in answers[1:]] == expected[1:]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_batch_ends_within_a_token_once_nobody_waits(pipe, requests, loop):
    cancellation, pieces = Cancellation(), list[str]()

    def leave(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            cancellation.cancel()

    settings = {"max_new_tokens": 200, "eos_token_id": -1, **LOOPS[loop]}
    listeners = [Listener(on_text=leave, cancellation=cancellation), Listener(cancellation=cancellation)]
    with pytest.raises(Cancelled):
        run(pipe, requests[:2], listeners, **settings)
    assert len(pieces) == 3


def test_a_batch_that_is_cancelled_before_its_turn_does_not_run(pipe, requests):
    cancellation = Cancellation()
    cancellation.cancel()
    with pytest.raises(Cancelled):
        run(pipe, requests[:2], [Listener(cancellation=cancellation)] * 2)


def test_beams_cannot_stream(pipe, requests):
    with pytest.raises(PlanError, match="beams have no text before the end"):
        run(pipe, requests[:1], [Listener(on_text=print)], num_beams=2)


def test_an_engine_that_listens_to_single_requests_says_so(pipe, requests):
    class Plain(type(pipe.engine)):
        preparer = fastav.engine.Engine.preparer

    engine = Plain(pipe.engine.model, pipe.engine.processor, pipe.adapter)
    prepare = engine.preparer(pipe.plan)
    pieces: list[str] = []
    (answer,) = prepare(requests[:1])([Listener(on_text=pieces.append)])
    assert "".join(pieces).strip() == answer.text
    with pytest.raises(FastAVError, match="one answer at a time"):
        prepare(requests[:2])([Listener(), Listener()])
