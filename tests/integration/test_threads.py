"""A pipeline that several threads call answers them all, one after another."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fastav
from fastav.budgets import Share
from fastav.engines.transformers.engine import MAX_PLANS
from fastav.errors import FastAVError, PlanError
from fastav.media import Clip
from fastav.plan import Keep, Plan, Step
from fastav.request import Request
from fastav.request_lock import RequestLock

CLIP = Clip.open(Path(fastav.__file__).parent / "assets" / "clips" / "triangle.mp4")
QUESTIONS = ["how many beeps are there?", "what moves?"]


@pytest.fixture(scope="module")
def pipe():
    return fastav.pipeline("tiny", device="cpu")


@pytest.fixture(scope="module")
def alone(pipe):
    return [pipe(CLIP, question, max_new_tokens=2).token_ids for question in QUESTIONS]


def test_calls_and_sets_in_several_threads_are_answered_as_alone(pipe, alone):
    def one(number: int) -> tuple[int, ...]:
        return pipe(CLIP, QUESTIONS[number], max_new_tokens=2).token_ids

    def whole(_: int) -> list[tuple[int, ...]]:
        requests = [Request(clip=CLIP, question=question) for question in QUESTIONS]
        return [answer.token_ids for _, answer in sorted(pipe.map(requests, batch=1, max_new_tokens=2))]

    with ThreadPoolExecutor(6) as threads:
        sets = [threads.submit(whole, number) for number in range(2)]
        calls = [threads.submit(one, number % 2) for number in range(6)]
        assert [call.result(120) for call in calls] == alone * 3
        assert [of.result(120) for of in sets] == [alone, alone]


def test_an_error_lets_the_next_one_have_its_turn(pipe, alone):
    def fail(_: str) -> None:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        pipe(CLIP, QUESTIONS[0], max_new_tokens=2, on_text=fail)
    assert pipe(CLIP, QUESTIONS[0], max_new_tokens=2).token_ids == alone[0]


def test_a_question_within_an_answer_is_refused_and_not_waited_for(pipe, alone):
    with pytest.raises(FastAVError, match="cannot answer another one within it"):
        pipe(CLIP, QUESTIONS[0], max_new_tokens=2, on_text=lambda _: pipe(CLIP, QUESTIONS[1]))
    assert pipe(CLIP, QUESTIONS[0], max_new_tokens=2).token_ids == alone[0]


def test_a_set_that_is_not_read_on_holds_nobody_up(pipe, alone):
    requests = [Request(clip=CLIP, question=question) for question in QUESTIONS]
    answers = pipe.map(requests, batch=1, max_new_tokens=2)
    next(answers)
    assert pipe(CLIP, QUESTIONS[0], max_new_tokens=2).token_ids == alone[0]
    answers.close()


def test_threads_have_the_lock_one_at_a_time():
    lock, inside, most = RequestLock(), [], []

    def work(number: int) -> None:
        with lock:
            inside.append(number)
            most.append(len(inside))
            threading.Event().wait(0.01)
            inside.remove(number)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(8)))
    assert most == [1] * 8


def test_an_engine_compiles_a_plan_once_and_a_changed_one_anew(pipe):
    keep, compiled = Keep(media=Share(0.5)), pipe.engine._compiled
    plan = Plan((Step(layers="2", method="random", options={"seed": 1}, keep=keep),))
    assert compiled(plan) is compiled(plan)
    assert compiled(Plan(plan.steps)) is compiled(plan)
    plan.steps[0].options["seed"] = 5
    assert [method.seed for method in compiled(plan).methods] == [5]
    compiled(Plan((Step(layers="2", method="last-query", options={"lowest": True}, keep=keep),)))
    with pytest.raises(PlanError, match="lowest"):  # though 1 == True
        compiled(Plan((Step(layers="2", method="last-query", options={"lowest": 1}, keep=keep),)))
    for seed in range(MAX_PLANS + 3):
        compiled(Plan((Step(layers="2", method="random", options={"seed": seed}, keep=keep),)))
    assert len(pipe.engine._plans) == MAX_PLANS
