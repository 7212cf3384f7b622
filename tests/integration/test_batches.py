"""Sets of requests in batches: the same answers, each failure its own, and nothing left behind."""

import copy
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch

import fastav
from fastav import batches
from fastav.budgets import Share
from fastav.engines.transformers import Decoding, TransformersEngine, prune
from fastav.engines.transformers.prefetch import EncoderPrefetcher
from fastav.errors import FastAVError, MissingTrack, PlanError
from fastav.media import Clip
from fastav.method import Signal
from fastav.pipelines import Pipeline
from fastav.plan import Keep, Plan, Step
from fastav.registry import METHODS
from fastav.request import Request, Use
from support.family import NAMES, family_of, generate
from support.toy import scene_request

QUESTIONS = ("which color moves?", "describe the clip.", "what sound do you hear?")


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return fastav.pipeline(device="cpu")


@pytest.fixture(scope="module")
def asked() -> list[Request]:
    """Prompts of unequal length: both tracks, the video or the sound."""
    requests = []
    for number, use in enumerate((Use.BOTH, Use.VIDEO, Use.AUDIO) * 3):
        scene = scene_request(QUESTIONS[number // 3], seed=number)
        requests.append(Request(clip=scene.clip, question=scene.question, use=use))
    return requests


@pytest.fixture(scope="module")
def alone(pipe, asked) -> list[str]:
    return [pipe.engine.generate([request], pipe.plan)[0].text for request in asked]


@pytest.fixture(autouse=True)
def no_thread_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastav-ahead")]


def silent() -> Request:
    """A request for sound that is not there."""
    clip = scene_request().clip
    return Request(clip=Clip(name="silent", video=clip.video, audio=None), question="?", use=Use.AUDIO)


def unreadable() -> Request:
    """A request that fails once its media are read."""
    clip = scene_request().clip
    assert clip.audio is not None
    broken = copy.copy(clip)
    object.__setattr__(broken, "audio", copy.copy(clip.audio))
    object.__setattr__(broken.audio, "source", _Gone())
    return Request(clip=broken, question="?", use=Use.AUDIO)


def answered(outcomes: Iterable[tuple[int, Any]]) -> list[Any]:
    """Results in the order of their requests."""
    found = dict(outcomes)
    return [found[place] for place in range(len(found))]


class _Gone:
    def __getattr__(self, name: str) -> Any:
        raise FastAVError("the file is gone")


# --- answers


@pytest.mark.parametrize("encode_ahead", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
def test_batched_answers_are_single_ones(pipe, asked, alone, batch, encode_ahead):
    engine = TransformersEngine(pipe.engine.model, pipe.engine.processor, pipe.adapter, encode_ahead=encode_ahead)
    found = answered(Pipeline(engine, pipe.plan, pipe.adapter).map(iter(asked), batch=batch))
    assert [answer.text for answer in found] == alone
    assert all(answer.seconds["encode"] > 0 for answer in found)


def test_a_batch_holds_prompts_of_about_one_length(pipe, asked, monkeypatch):
    together: list[list[Request]] = []
    prepare = type(pipe.adapter).prepare

    def remember(adapter: Any, processor: Any, requests: Sequence[Request]) -> Any:
        together.append(list(requests))
        return prepare(adapter, processor, requests)

    monkeypatch.setattr(type(pipe.adapter), "prepare", remember)
    list(pipe.map(asked, batch=3, max_new_tokens=1))
    assert [{request.use for request in batch} for batch in together] == [{Use.BOTH}, {Use.VIDEO}, {Use.AUDIO}]
    for batch in together:
        assert [len(request.question) for request in batch] == sorted(map(len, QUESTIONS), reverse=True)


def test_another_plan_and_sampling(pipe, asked):
    settings = {"max_new_tokens": 3, "do_sample": True, "temperature": 1.0, "seed": 1}
    found = answered(pipe.map(asked[:2], batch=1, plan="none", **settings))
    for place in range(2):
        expected = pipe.engine.generate([asked[place]], pipe.adapter.preset("none"), **settings)
        assert found[place].token_ids == expected[0].token_ids
        assert found[place].plan == "none"


# --- failures


def test_what_fails_fails_alone(pipe, asked, alone):
    error = FastAVError("no such file")
    mixed: list[Any] = [silent(), *asked[:4], unreadable(), *asked[4:], error]
    found = answered(pipe.map(mixed, batch=4))
    assert len(found) == len(mixed)
    assert isinstance(found[0], MissingTrack)
    assert found[5].message == "the file is gone"
    assert found[len(mixed) - 1] is error
    assert [found[place].text for place in (1, 2, 3, 4, *range(6, 11))] == alone


@pytest.mark.parametrize("fault", [FastAVError("it is too much"), torch.OutOfMemoryError("it is too much")])
def test_a_batch_that_fails_while_it_runs_is_tried_in_halves(pipe, asked, alone, monkeypatch, fault):
    answers = TransformersEngine._answer_batch

    def limited(engine: Any, batch: Any, *options: Any) -> Any:
        if len(batch.prepared.layouts) > 2 or "video" not in batch.prepared.layouts[0].by_modality():
            raise fault
        return answers(engine, batch, *options)

    monkeypatch.setattr(TransformersEngine, "_answer_batch", limited)
    found = answered(pipe.map(asked, batch=8))
    for place, request in enumerate(asked):
        if request.use is Use.AUDIO:
            assert "much" in found[place].message or "memory" in found[place].message
        else:
            assert found[place].text == alone[place]


@pytest.mark.parametrize("stage", ["prepare", "answer"])
def test_any_error_is_its_request_s_own(pipe, asked, alone, monkeypatch, stage):
    """A processor's ValueError, a bug's KeyError: the others are answered, and the cause is told."""
    victim, place = asked[4], 4
    prepare, answers = type(pipe.adapter).prepare, TransformersEngine._answer_batch
    fault = KeyError("no such thing") if stage == "answer" else ValueError("absolute aspect ratio must be below 200")

    def failing(adapter: Any, processor: Any, requests: Sequence[Request]) -> Any:
        if stage == "prepare" and victim in requests:
            raise fault
        return prepare(adapter, processor, requests)

    def failing_late(engine: Any, batch: Any, *options: Any) -> Any:
        if stage == "answer" and "video" in batch.prepared.layouts[0].by_modality():
            raise fault
        return answers(engine, batch, *options)

    monkeypatch.setattr(type(pipe.adapter), "prepare", failing)
    monkeypatch.setattr(TransformersEngine, "_answer_batch", failing_late)
    found = answered(pipe.map(asked, batch=4))
    assert len(found) == len(asked)
    for number, outcome in enumerate(found):
        if (number == place) if stage == "prepare" else (asked[number].use is not Use.AUDIO):
            assert isinstance(outcome, FastAVError)
            assert str(fault.args[0]) in outcome.message
            assert type(fault).__name__ in outcome.message
            assert outcome.__cause__ is fault
        else:
            assert outcome.text == alone[number]


def test_a_device_that_fails_ends_the_set_and_loses_no_answer(pipe, asked, alone, monkeypatch):
    answers, calls = TransformersEngine._answer_batch, []

    def failing(engine: Any, batch: Any, *options: Any) -> Any:
        calls.append(batch)
        if len(calls) > 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return answers(engine, batch, *options)

    monkeypatch.setattr(TransformersEngine, "_answer_batch", failing)
    found = []
    with pytest.raises(FastAVError, match="the device has failed: CUDA error"):  # noqa: PT012
        for outcome in pipe.map(asked, batch=2):
            found.append(outcome)
    assert len(found) == 4
    assert all(answer.text == alone[place] for place, answer in found)
    assert len(calls) == 3


def test_what_no_request_could_be_answered_with_is_refused_at_once(pipe, asked):
    given = Plan((Step(layers="1", method="given", keep=Keep(media=Share(0.5))),))
    for options, error in (
        ({"batch": 0}, FastAVError),
        ({"max_new_tokens": 0}, PlanError),
        ({"plan": "fastaw"}, PlanError),
        ({"plan": given}, PlanError),
    ):
        with pytest.raises(error):
            pipe.map(asked, **options)


def test_an_engine_that_prepares_nothing_answers_all_the_same(pipe, asked, alone, monkeypatch):
    monkeypatch.delattr(TransformersEngine, "preparer")
    assert [answer.text for answer in answered(pipe.map(asked, batch=4))] == alone


# --- threads


def test_requests_are_read_as_they_are_needed(pipe, asked):
    read = []

    def endless() -> Iterator[Request]:
        while True:
            read.append(len(read))
            yield asked[0]

    found = pipe.map(endless(), batch=2, max_new_tokens=1)
    for _ in range(3):
        next(found)
    found.close()
    assert len(read) <= 2 * batches.WINDOW_BATCHES * 2


def test_a_set_of_nothing(pipe):
    assert list(pipe.map([])) == []


def test_an_error_of_the_caller_s_own_comes_through(pipe, asked):
    def broken() -> Iterator[Request]:
        yield asked[0]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        list(pipe.map(broken(), batch=1))


def test_ctrl_c_leaves_no_thread(pipe, asked, monkeypatch):
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(TransformersEngine, "_answer_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(pipe.map(asked, batch=2))


def test_one_item_is_made_ahead():
    made, used = [], threading.Event()

    def items() -> Iterator[int]:
        for number in range(4):
            made.append(number)
            yield number

    for number in batches.prefetch(items()):
        used.wait(0.05)
        assert len(made) <= number + 2
    assert made == [0, 1, 2, 3]


# --- encoders ahead


def untouched(family: Any) -> Any:
    """The family's model without what its tests replace on it, for which `generate` has no need."""
    model = family.model()
    if EncoderPrefetcher.is_supported(model, family.adapter):
        return model
    model = copy.deepcopy(model)
    for module in model.modules():
        for name in ("get_video_features", "set_attn_implementation"):
            vars(module).pop(name, None)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_encoders_that_ran_ahead_change_nothing(name):
    family = family_of(name)
    model, (first, second) = untouched(family), family.clips
    assert EncoderPrefetcher.is_supported(model, family.adapter)
    other, prepared = family.prepare(second), family.prepare(first)
    options = {"custom_generate": Decoding(family.adapter)}

    @torch.inference_mode()
    def said(inputs: Any) -> Any:
        with prune(model, family.plan, layouts=inputs.layouts, adapter=family.adapter):
            return generate(model, inputs, **options)

    before, expected = said(other), said(prepared)
    ahead, encoded, stop = EncoderPrefetcher(model, family.adapter), [], threading.Event()

    def encode() -> None:
        while not (stop.is_set() and encoded):
            encoded[:] = [ahead.encode(prepared.inputs)]

    thread = threading.Thread(target=encode)
    thread.start()
    meanwhile = [said(other) for _ in range(2)]
    stop.set()
    thread.join()
    encoders = family.adapter.encoders(model)
    ran = []
    for encoder in encoders:
        encoder.register_forward_hook(lambda module, *_: ran.append(vars(module).get("forward")))
    with encoded[0].replay(encoders):
        found = said(prepared)
    assert ran
    assert all(ran)
    assert all("forward" not in vars(encoder) for encoder in encoders)
    for mine, theirs in (*((before, one) for one in meanwhile), (expected, found)):
        assert torch.equal(mine.sequences, theirs.sequences)
        assert all(torch.equal(ours, logits) for ours, logits in zip(mine.logits, theirs.logits, strict=True))


def test_other_threads_are_not_given_what_was_encoded(pipe):
    model, adapter, processor = pipe.engine.model, pipe.adapter, pipe.engine.processor
    encoded = EncoderPrefetcher(model, adapter).encode(adapter.prepare(processor, [scene_request(seed=5)]).inputs)
    other = adapter.prepare(processor, [scene_request(seed=6)])
    with torch.inference_mode():
        expected, found = model(**other.inputs).logits, []
    with encoded.replay(adapter.encoders(model)):

        def run() -> None:
            with torch.inference_mode():
                found.append(model(**other.inputs).logits)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        for outputs in encoded.outputs:
            outputs.clear()
    assert torch.equal(found[0], expected)


def test_models_whose_twin_would_not_be_alone_are_told(pipe):
    model, adapter = pipe.engine.model, pipe.adapter
    assert EncoderPrefetcher.is_supported(model, adapter)
    model.get_input_embeddings().forward = model.get_input_embeddings().forward
    try:
        assert not EncoderPrefetcher.is_supported(model, adapter)
    finally:
        del model.get_input_embeddings().forward


@pytest.mark.parametrize("wants", [frozenset(), frozenset({Signal.VISION_ENCODER})], ids=["needed", "wanted"])
def test_encoders_that_are_listened_to_do_not_run_ahead(pipe, asked, monkeypatch, wants):
    monkeypatch.setattr(
        "fastav.engines.transformers.engine.EncoderPrefetcher.encode", lambda *_: pytest.fail("it ran ahead")
    )
    monkeypatch.setattr(METHODS["position"], "wants", wants)
    engine = TransformersEngine(pipe.engine.model, pipe.engine.processor, pipe.adapter, encode_ahead=True)
    plan = Plan((Step(layers="2", method="position", keep=Keep(media=Share(0.5))),)) if wants else "omnizip"
    found = list(Pipeline(engine, pipe.plan, pipe.adapter).map(asked[:1], plan=plan, max_new_tokens=1))
    assert not isinstance(found[0][1], FastAVError)


@pytest.mark.gpu
def test_encoders_ahead_on_a_gpu(asked):
    pipe = fastav.pipeline(device="cuda", dtype="float32")
    expected = [pipe.engine.generate([request], pipe.plan)[0].text for request in asked]
    for _ in range(3):
        assert [answer.text for answer in answered(pipe.map(asked * 4, batch=4))] == expected * 4
