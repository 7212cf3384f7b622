"""The queue of the server: batches of like shape, bounds, cancellation, failures."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from fastav.adapter import Prepared
from fastav.engine import Answer, Engine, Listener
from fastav.errors import EngineStopped, FastAVError, MediaError
from fastav.flops import Saving
from fastav.layout import Layout, Modality
from fastav.media import Clip
from fastav.plan import Plan
from fastav.presets import NONE
from fastav.request import Request
from fastav.request_lock import Cancellation, Cancelled
from fastav.serve.scheduler import THREADS, Job, QueueFull, Scheduler, Stopping

CLIP = Clip.from_arrays(frames=np.zeros((2, 4, 4, 3), np.uint8))


class FakeEngine(Engine):
    """Answers with the question, when it is let go; a question that begins with `bad` fails."""

    provides = frozenset()
    device, dtype = "cpu", "float32"

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = threading.Event()
        self.started = threading.Semaphore(0)
        self.gate.set()
        self.error: Callable[[], Exception] = lambda: MediaError("this one fails")

    check = load = generate = None  # pyright: ignore[reportAssignmentType]

    def preparer(self, plan: Plan, **settings: Any) -> Any:
        def prepare(requests: Sequence[Request], prepared: Prepared | None = None) -> Any:
            def run(listeners: Sequence[Listener] = ()) -> tuple[Answer, ...]:
                questions = [request.question for request in requests]
                self.batches.append(questions)
                self.started.release()
                assert self.gate.wait(10)
                for question, listener in zip(questions, listeners, strict=True):
                    for piece in question.split("|")[:-1]:
                        if listener.on_text is not None:
                            listener.on_text(piece)
                if any("bad" in question for question in questions):
                    raise self.error()
                if all(one.cancellation and one.cancellation.is_cancelled for one in listeners):
                    raise Cancelled
                return tuple(answer(question) for question in questions)

            return run

        return prepare


FakeEngine.__abstractmethods__ = frozenset()


def answer(text: str) -> Answer:
    return Answer(
        text=text,
        token_ids=(1,),
        finish="stop",
        plan="none",
        prompt_tokens={"text": 1},
        tokens_per_layer=({"text": 1},),
        flops=Saving(1, 1),
        kv_bytes=Saving(1, 1),
        seconds={"media": 0.0, "encode": 0.0, "prefill": 0.1, "decode": 0.1},
        peak_bytes=None,
    )


@pytest.fixture
def engine():
    return FakeEngine()


@pytest.fixture
def scheduler(engine):
    scheduler = Scheduler(engine, batch=4, capacity=6)
    yield scheduler
    engine.gate.set()
    scheduler.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(THREADS)]


def job(question: str, tokens: int = 8, **fields: Any) -> Job:
    layout = Layout.of(Modality.TEXT, tokens)
    return Job(
        request=Request(clip=CLIP, question=question),
        prepared=Prepared(inputs={}, layouts=(layout,)),
        plan=fields.pop("plan", NONE),
        settings=fields.pop("settings", {}),
        **fields,
    )


async def hold(engine: FakeEngine, scheduler: Scheduler) -> Job:
    """A job that holds the model until the gate opens."""
    engine.gate.clear()
    first = job("first")
    scheduler.submit([first])
    await asyncio.to_thread(engine.started.acquire)
    return first


def test_jobs_that_wait_for_the_model_run_together(engine, scheduler):
    async def main() -> None:
        first = await hold(engine, scheduler)
        jobs = [job(f"q{n}") for n in range(6)]
        scheduler.submit(jobs)
        assert scheduler.waiting >= 2  # four are prepared ahead
        engine.gate.set()
        answers = await asyncio.gather(*(one.answer for one in [first, *jobs]))
        assert [one.text for one in answers] == ["first", *(f"q{n}" for n in range(6))]
        assert engine.batches == [["first"], ["q0", "q1", "q2", "q3"], ["q4", "q5"]]
        assert all(one.seconds["queue"] > 0 for one in answers[1:])

    asyncio.run(main())


def test_a_batch_has_one_plan_one_shape_and_the_same_settings(engine, scheduler):
    async def main() -> None:
        first = await hold(engine, scheduler)
        jobs = [
            job("a"),
            job("long", tokens=100),
            job("b"),
            job("plan", plan=Plan((), name="other")),
            job("sampled", settings={"do_sample": True}),
            job("seeded", is_alone=True),
            job("seeded too", is_alone=True),
            job("c", tokens=9),
        ]
        scheduler.submit(jobs)
        engine.gate.set()
        await asyncio.gather(*(one.answer for one in [first, *jobs]))
        names = {frozenset(batch) for batch in engine.batches}
        assert frozenset({"a", "b", "c"}) in names
        assert {frozenset({one}) for one in ("long", "sampled", "seeded", "seeded too")} <= names

    asyncio.run(main())


def test_a_free_model_waits_a_moment_for_a_job_that_is_known_to_come(engine):
    scheduler = Scheduler(engine, batch=4, wait=0.5)

    async def main() -> None:
        one, other = job("one"), job("other")
        with scheduler.expecting():
            scheduler.submit([one])
            await asyncio.sleep(0.05)
            assert engine.batches == []
            scheduler.submit([other])
        await asyncio.gather(one.answer, other.answer)
        assert engine.batches == [["one", "other"]]
        alone = job("alone")  # nothing else is expected
        start = time.monotonic()
        scheduler.submit([alone])
        await alone.answer
        assert time.monotonic() - start < 0.4

    asyncio.run(main())
    scheduler.close()


def test_the_queue_is_bounded_and_frees_places(engine, scheduler):
    async def main() -> None:
        with scheduler.admission(5), pytest.raises(QueueFull) as error, scheduler.admission(2):
            pass
        assert error.value.retry_after >= 1
        with scheduler.admission(6):
            assert scheduler.admitted == 6
        assert scheduler.admitted == 0

    asyncio.run(main())


def test_a_request_that_fails_takes_no_other_with_it(engine, scheduler):
    async def main() -> None:
        first = await hold(engine, scheduler)
        jobs = [job("good"), job("bad"), job("fine")]
        scheduler.submit(jobs)
        engine.gate.set()
        results = await asyncio.gather(*(one.answer for one in [first, *jobs]), return_exceptions=True)
        assert [getattr(one, "text", str(one)) for one in results] == ["first", "good", "this one fails", "fine"]

    asyncio.run(main())


def test_what_a_client_has_read_is_never_sent_again(engine, scheduler):
    """Of a batch that fails, only those run again whose clients have no text yet."""

    async def main() -> None:
        first = await hold(engine, scheduler)
        pieces: list[str] = []
        jobs = [job("some|text", on_text=pieces.append), job("bad"), job("fine")]
        scheduler.submit(jobs)
        engine.gate.set()
        results = await asyncio.gather(*(one.answer for one in [first, *jobs]), return_exceptions=True)
        assert [type(one) for one in results] == [Answer, MediaError, MediaError, Answer]
        assert pieces == ["some"]

    asyncio.run(main())


def test_a_job_whose_client_leaves_is_dropped_from_the_queue(engine, scheduler):
    async def main() -> None:
        first = await hold(engine, scheduler)
        jobs = [job(f"q{n}", tokens=2 ** (n + 4)) for n in range(3)]
        scheduler.submit(jobs)
        jobs[1].cancellation.cancel()
        engine.gate.set()
        results = await asyncio.gather(*(one.answer for one in [first, *jobs]), return_exceptions=True)
        assert isinstance(results[2], Cancelled)
        assert ["q1"] not in engine.batches

    asyncio.run(main())


def test_a_batch_that_everybody_left_is_cancelled(engine, scheduler):
    async def main() -> None:
        cancellation = Cancellation()
        engine.gate.clear()
        one = job("one", cancellation=cancellation)
        scheduler.submit([one])
        await asyncio.to_thread(engine.started.acquire)
        cancellation.cancel()
        engine.gate.set()
        with pytest.raises(Cancelled):
            await one.answer

    asyncio.run(main())


def test_a_dead_engine_ends_all_and_is_told(engine, scheduler):
    async def main() -> None:
        engine.error = lambda: EngineStopped("its processes have ended")
        one = job("bad")
        scheduler.submit([one])
        with pytest.raises(EngineStopped):
            await one.answer
        assert scheduler.failure is not None
        with pytest.raises(EngineStopped, match="cannot answer any more"), scheduler.admission():
            pass

    asyncio.run(main())


def test_an_error_of_any_kind_is_the_requests(engine, scheduler):
    async def main() -> None:
        engine.error = lambda: RuntimeError("something odd")
        one = job("bad")
        scheduler.submit([one])
        with pytest.raises(FastAVError, match="something odd"):
            await one.answer
        assert scheduler.failure is None
        after = job("after")
        scheduler.submit([after])
        assert (await after.answer).text == "after"

    asyncio.run(main())


def test_closing_finishes_what_runs_and_fails_what_waits(engine):
    scheduler = Scheduler(engine, batch=1)

    async def main() -> None:
        first = await hold(engine, scheduler)
        jobs = [job(f"q{n}") for n in range(3)]
        scheduler.submit(jobs)
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(asyncio.to_thread(scheduler.close))
        await asyncio.sleep(0.05)
        engine.gate.set()
        await closing
        results = await asyncio.gather(*(one.answer for one in [first, *jobs]), return_exceptions=True)
        assert results[0].text == "first"  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(results[-1], Stopping)
        with pytest.raises(Stopping), scheduler.admission():
            pass

    asyncio.run(main())


def test_the_reports_of_batches_have_their_sizes(engine):
    reports: list[Any] = []
    scheduler = Scheduler(engine, on_batch=reports.append)

    async def main() -> None:
        one = job("one")
        scheduler.submit([one])
        await one.answer

    asyncio.run(main())
    scheduler.close()
    assert [report.size for report in reports] == [1]
    assert reports[0].seconds >= 0
