"""The engine vllm against the engine transformers: the same questions about the same files, by `fastav.pipeline`."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
from harness import positions, record_positions

import fastav
from fastav.adapter import plan_named
from fastav.cli import batch as command
from fastav.cli import main
from fastav.engines.transformers import TransformersEngine
from fastav.errors import EngineStopped, FastAVError, MediaError, UnsupportedModel, UnsupportedPlan
from fastav.media import Clip
from fastav.request import Request, Use

CLIPS = Path(str(files("fastav") / "assets" / "clips"))
TRIANGLE, KNOCK = CLIPS / "triangle.mp4", CLIPS / "knock.mp4"


def requests():
    return [
        Request(clip=Clip.open(TRIANGLE), question="which color moves?"),
        Request(clip=Clip.open(KNOCK), question="describe the clip.", use=Use.VIDEO),
        Request(clip=Clip.open(KNOCK), question="what sound do you hear?", use=Use.AUDIO),
        Request(clip=Clip.open(KNOCK), question="what is to be seen and heard?", use=Use.BOTH),
    ]


@pytest.fixture(scope="module")
def pipe(omni, engines):
    engines.close()  # which leaving the pipeline would end
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        with fastav.pipeline(str(omni.folder), engine="vllm") as pipe:
            record_positions(pipe.engine._vllm.llm)
            yield pipe


@pytest.fixture(scope="module")
def plain(omni):
    """The engine transformers, with vLLM's positions where the two differ: of a video with its own sound."""
    engine = TransformersEngine(omni.model, omni.processor, omni.adapter)

    def ask(request, plan, **options):
        ids = omni.adapter.prepare(omni.processor, [request]).inputs["input_ids"][0]
        together = all(request.tracks)
        with omni._with_positions(*positions[tuple(ids.tolist())]) if together else nullcontext():
            return engine.generate([request], plan, **options)[0]

    return ask


def same(answer, expected):
    """All that both engines say, but for the time."""
    for name in ("text", "token_ids", "finish", "plan", "prompt_tokens", "flops", "kv_bytes"):
        assert getattr(answer, name) == getattr(expected, name), name
    sums = [sum(layer.values()) for layer in answer.tokens_per_layer]
    assert sums == [sum(layer.values()) for layer in expected.tokens_per_layer]


def test_a_set_gets_the_answers_of_the_engine_transformers(pipe, plain):
    questions = requests()
    answers = dict(pipe.map(questions, batch=64, max_new_tokens=12))
    for place, request in enumerate(questions):
        same(answers[place], plain(request, pipe.plan, max_new_tokens=12))
        assert set(answers[place].seconds) == {"media", "prefill", "decode"}
        assert min(answers[place].seconds.values()) >= 0
        assert answers[place].peak_bytes is None
    assert answers[0].flops.ratio < 1
    assert (pipe.engine.device, pipe.engine.dtype) == ("cpu", "float32")


@pytest.mark.parametrize("plan", ["none", "fastav-plus", "fastv@0.25"])
def test_a_call_may_have_a_plan_of_its_own(pipe, plain, plan):
    chosen, questions = plan_named(plan, pipe.adapter), requests()
    answers = dict(pipe.map(questions, plan=plan, batch=64, max_new_tokens=6))
    for place, request in enumerate(questions):
        same(answers[place], plain(request, chosen, max_new_tokens=6))


def test_an_answer_comes_in_pieces(pipe, plain):
    pieces, expected = [], []
    answer = pipe(TRIANGLE, "which color moves?", max_new_tokens=60, on_text=pieces.append)
    same(answer, plain(requests()[0], pipe.plan, max_new_tokens=60, on_text=expected.append))
    assert pieces == expected
    assert "".join(pieces).strip() == answer.text


def test_texts_that_stop_and_penalties_are_alike(pipe, plain):
    request = requests()[2]
    whole = pipe.engine.generate([request], pipe.plan, max_new_tokens=12)[0]
    word = whole.text[len(whole.text) // 2 :][:2]
    for settings in ({"stop_strings": [word]}, {"repetition_penalty": 0.3}, {"max_new_tokens": 5}):
        settings = {"max_new_tokens": 12, "do_sample": False} | settings
        (answer,) = pipe.engine.generate([request], pipe.plan, **settings)
        same(answer, plain(request, pipe.plan, **settings))
        assert answer.token_ids != whole.token_ids


def test_draws_are_their_seed_s(pipe):
    sampled = {"max_new_tokens": 12, "do_sample": True, "temperature": 2, "top_k": 0}
    drawn = [pipe(KNOCK, "what?", **sampled, seed=seed).token_ids for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    with pytest.raises(FastAVError, match=r"temperatures from 0\.01 to 2, got 3"):
        pipe(KNOCK, "what?", do_sample=True, temperature=3)
    with pytest.raises(UnsupportedPlan, match="the engine vllm has no num_beams"):
        pipe(KNOCK, "what?", num_beams=2)


def test_an_answer_streams_and_can_be_left(pipe):
    whole = pipe(TRIANGLE, "which color moves?", max_new_tokens=60)
    stream = pipe.stream(TRIANGLE, "which color moves?", max_new_tokens=60)
    assert "".join(stream).strip() == whole.text == stream.answer.text
    for _ in pipe.stream(TRIANGLE, "which color moves?", max_new_tokens=60):
        break
    assert not pipe.engine._vllm.llm.llm_engine.has_unfinished_requests()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fastav-stream")]
    assert pipe(TRIANGLE, "which color moves?", max_new_tokens=60).text == whole.text


def test_a_request_that_cannot_be_answered_leaves_the_others(pipe, tmp_path):
    broken = tmp_path / "broken.mp4"
    questions = requests()
    broken.write_bytes(TRIANGLE.read_bytes())
    questions.insert(1, Request(clip=Clip.open(broken), question="which color moves?"))
    questions.insert(3, Request(clip=Clip.open(TRIANGLE), question="a" * 3950))
    broken.unlink()
    answers = dict(pipe.map(questions, batch=64, max_new_tokens=3))
    assert isinstance(answers[1], MediaError)
    assert "exceed vLLM's limit of" in str(answers[3])
    assert [len(answers[place].token_ids) for place in (0, 2, 4, 5)] == [3] * 4


def test_any_error_of_one_request_is_its_own(pipe, monkeypatch):
    kind = type(pipe.adapter)
    vllm_inputs = kind.vllm_inputs

    def failing(self, processor, request):
        if request.question == "odd":
            raise KeyError("what no one thought of")
        return vllm_inputs(self, processor, request)

    monkeypatch.setattr(kind, "vllm_inputs", failing)
    questions = requests()
    questions.insert(1, Request(clip=Clip.open(KNOCK), question="odd"))
    answers = dict(pipe.map(questions, batch=64, max_new_tokens=3))
    assert isinstance(answers[1], FastAVError)
    assert "KeyError" in str(answers[1])
    assert isinstance(answers[1].__cause__, KeyError)
    assert [len(answers[place].token_ids) for place in (0, 2, 3, 4)] == [3] * 4


def test_threads_that_ask_at_once_are_all_answered(pipe):
    questions = [
        ("which color moves?", TRIANGLE),
        ("what sound do you hear?", KNOCK),
        ("what is to be seen?", KNOCK),
    ] * 2
    alone = [pipe(clip, question, max_new_tokens=8).token_ids for question, clip in questions[:3]] * 2
    with ThreadPoolExecutor(len(questions)) as threads:
        answers = list(threads.map(lambda one: pipe(one[1], one[0], max_new_tokens=8).token_ids, questions))
    assert answers == alone


def test_a_question_from_within_an_answer_is_refused(pipe):
    with pytest.raises(FastAVError, match="cannot answer another one within it"):
        pipe(TRIANGLE, "which color moves?", on_text=lambda _: pipe(KNOCK, "what sound do you hear?"))
    assert pipe(TRIANGLE, "which color moves?", max_new_tokens=3).token_ids


def test_a_set_ends_with_an_engine_that_has_ended(pipe, monkeypatch):
    from vllm.v1.engine.exceptions import EngineDeadError

    def dead():
        raise EngineDeadError

    monkeypatch.setattr(pipe.engine._vllm.llm.llm_engine, "step", dead)
    with pytest.raises(EngineStopped, match="vLLM stopped before"):
        list(pipe.map(requests(), batch=2, max_new_tokens=3))


def test_leaving_a_set_early_leaves_nothing_behind(pipe):
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipe(TRIANGLE, "which color moves?", on_text=interrupt)
    assert not pipe.engine._vllm.llm.llm_engine.has_unfinished_requests()
    assert pipe(TRIANGLE, "which color moves?", max_new_tokens=3).token_ids


def test_a_file_of_questions_goes_on_where_it_was_stopped(pipe, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_pipeline", lambda *_: pipe)
    monkeypatch.setattr(type(pipe.engine), "close", lambda _: None)
    lines = [{"id": n, "clip": str(clip), "question": f"what is {n}?"} for n, clip in enumerate([TRIANGLE, KNOCK] * 3)]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(line) + "\n" for line in lines))
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    model = pipe.engine._vllm.llm.model_config.model
    run = ["batch", str(questions), "--model", model, "--engine", "vllm", "--max-new-tokens", "4"]
    assert main([*run, "--out", str(whole), "--batch", "64"]) == 0
    answers = whole.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(answers[:2]) + answers[2][:30])
    assert main([*run, "--out", str(part), "--batch", "2"]) == 0
    assert sorted(part.read_bytes().splitlines()) == sorted(whole.read_bytes().splitlines())
    assert len(answers) == len(lines)


@pytest.mark.parametrize(
    ("model", "options", "kind", "words"),
    [
        ("gemma4", {}, UnsupportedModel, "cannot be pruned inside vLLM yet"),
        ("videollama2", {}, FastAVError, "cannot be reached"),  # as there is no network
        ("omni", {"plan": "omnizip"}, UnsupportedPlan, "method 'omnizip' reads audio-encoder"),
        ("omni", {"attention": "eager"}, FastAVError, "chooses its attention itself"),
        ("omni", {"device": "cuda"}, FastAVError, "runs on cpu, not on cuda"),
        ("omni", {"dtype": "int8"}, FastAVError, "dtype must be"),
    ],
)
def test_what_cannot_be_is_refused_before_weights_load(omni, model, options, kind, words):
    name = str(omni.folder) if model == "omni" else model
    with pytest.raises(kind, match=words):
        fastav.pipeline(name, engine="vllm", **options)


def test_plans_that_no_request_can_have_are_refused_at_once(pipe):
    keep = replace(fastav.Keep(), media=fastav.Share(0.5))
    plan = fastav.Plan((fastav.Step(layers="5", method="given", keep=keep),))
    with pytest.raises(UnsupportedPlan, match="method 'given' reads given"):
        pipe.map(requests(), plan=plan)
    with pytest.raises(UnsupportedPlan, match="does not expose its attention"):
        pipe.engine.trace(requests()[0], pipe.plan)


def test_the_command_answers_in_processes_of_vllm_s_own():
    command = ["-c", "from fastav.cli import main; raise SystemExit(main())"]
    command += ["run", str(TRIANGLE), "which color moves?", "--engine", "vllm", "--plan", "fastav-plus", "--json"]
    env = {name: value for name, value in os.environ.items() if name != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    env |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["text"] == "green"
    assert report["flops"]["ratio"] < 1


# --- messages


def messages_about(*clips, image=None):
    """A conversation with a system message, clips in two messages, and an answer between them."""
    first, *others = [{"type": "video", "path": clip, "use": "video"} for clip in clips]
    pictures = [] if image is None else [{"type": "image", "image": image}]
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [*pictures, first, {"type": "text", "text": "What moves?"}]},
        {"role": "assistant", "content": "A shape."},
        {"role": "user", "content": [*others, {"type": "text", "text": "And now?"}]},
    ]


def test_a_conversation_about_one_clip_is_answered_alike(pipe, plain):
    request = Request(messages=messages_about(TRIANGLE))
    same(pipe(messages_about(TRIANGLE), max_new_tokens=8), plain(request, pipe.plan, max_new_tokens=8))


def test_more_clips_than_vllm_was_started_for_are_refused_with_a_hint(pipe):
    with pytest.raises(FastAVError, match="At most 1 video") as refused:
        pipe(messages_about(TRIANGLE, KNOCK))
    assert "limit_mm_per_prompt" in refused.value.hint


@pytest.mark.parametrize("plan", ["none", "fastav", "fastav-plus"])
def test_several_clips_and_an_image_are_answered_alike(sight, engines, plan):
    from fastav.engines.vllm.engine import VllmEngine
    from fastav.pipelines import Pipeline

    image = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    messages = messages_about(TRIANGLE, KNOCK, image=image)
    llm = engines(sight.folder, plan, limit_mm_per_prompt={"video": 2, "image": 1})
    chosen = plan_named(plan, sight.adapter)
    answer = Pipeline(VllmEngine(llm), chosen, sight.adapter)(messages, max_new_tokens=8)
    engine = TransformersEngine(sight.model, sight.processor, sight.adapter)
    request = Request(messages=messages)
    ids = tuple(sight.adapter.prepare(sight.processor, [request]).inputs["input_ids"][0].tolist())
    with sight._with_positions(*positions[ids]):
        same(answer, engine.generate([request], chosen, max_new_tokens=8)[0])
