"""The model that comes with the package: small, whole, and right about the clips beside it."""

import json
import warnings
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fastav.adapter import adapter_for
from fastav.cli import main
from fastav.errors import FastAVWarning
from fastav.layout import Modality
from fastav.media import Clip
from fastav.models.tiny import FastAVTinyForConditionalGeneration, TinyAdapter
from fastav.models.tiny.adapter import unknown_words
from fastav.models.tiny_long import TinyLongAdapter
from fastav.models.videollama2 import VideoLlama2Processor
from fastav.pipelines import Pipeline, pipeline
from fastav.request import Request
from fastav.tasks.toy_world import ToyWorldTask
from fastav.tasks.toy_world_long import ToyWorldLongTask
from fastav.world import LONG_SECONDS, SECONDS, kinds, sentences
from support.toy import scene_request

ASSETS = Path(str(files("fastav"))) / "assets"
CLIP = ASSETS / "clips" / "triangle.mp4"
QUESTIONS = json.loads((ASSETS / "clips" / "questions.json").read_text(encoding="utf-8"))

LONG = "half-minute.mp4"  # of 32 s, for tiny-long


@cache
def tiny() -> Pipeline:
    return pipeline("tiny", "none", device="cpu", dtype="float32")


def test_the_weights_are_in_half_precision_and_small():
    path = ASSETS / "tiny" / "model.safetensors"
    assert path.stat().st_size < 10_000_000
    with safe_open(path, "pt") as weights:
        assert {weights.get_tensor(name).dtype.itemsize for name in weights.keys()} == {2}  # noqa: SIM118


def test_its_architecture_is_its_own():
    assert TinyAdapter().config().architectures == [FastAVTinyForConditionalGeneration.__name__]
    assert type(adapter_for(TinyAdapter().config().architectures)) is TinyAdapter


def test_every_word_of_the_world_is_a_token():
    words = VideoLlama2Processor.from_pretrained(ASSETS / "tiny").tokenizer
    for sentence in sentences():
        assert words.unk_token_id not in words(sentence.upper(), add_special_tokens=False)["input_ids"]


def test_a_clip_is_64_video_and_72_audio_tokens():
    (layout,) = (
        tiny()
        .engine.adapter.prepare(
            tiny().engine.processor,
            [Request(clip=Clip.open(ASSETS / "clips" / "knock.mp4"), question="describe the clip.")],
        )
        .layouts
    )
    assert (layout.count(Modality.VIDEO), layout.count(Modality.AUDIO)) == (64, 72)
    example = TinyAdapter().example(TinyAdapter().config(), text=layout.count(Modality.TEXT))
    assert (example.modality == layout.modality).all()


@pytest.mark.parametrize("name", [name for name in QUESTIONS if name != LONG])
def test_it_answers_about_the_clips_beside_it(name):
    path = ASSETS / "clips" / name
    assert path.stat().st_size <= 60_000
    assert len(QUESTIONS[name]) == len(kinds(SECONDS))
    for one in QUESTIONS[name]:
        answer = tiny()(path, one["question"], max_new_tokens=16)
        assert answer.text.replace(" .", ".") == one["answer"], one["question"]


def test_for_long_clips_it_answers_about_the_long_one_beside_it():
    path = ASSETS / "clips" / LONG
    assert path.stat().st_size <= 240_000
    clip, pipe = Clip.open(path), pipeline("tiny-long", "none", device="cpu", dtype="float32")
    assert clip.duration == pytest.approx(LONG_SECONDS, abs=0.1)
    assert len(QUESTIONS[LONG]) == len(kinds(LONG_SECONDS))
    requests = [Request(clip=clip, question=one["question"]) for one in QUESTIONS[LONG][4:10]]
    for plan, asked in (("none", requests), ("fastav-plus", requests[:2])):
        answers = pipe.engine.generate(asked, pipe.adapter.preset(plan), max_new_tokens=2)
        assert [answer.text for answer in answers] == [one["answer"] for one in QUESTIONS[LONG][4 : 4 + len(asked)]]


@pytest.mark.slow  # integration/test_quality.py asks more
def test_it_is_nearly_always_right_about_scenes_it_was_not_trained_on():
    task = ToyWorldTask(scenes=10, seed=7)
    samples = list(task.samples())
    answers = tiny().engine.generate([sample.request() for sample in samples], tiny().plan, max_new_tokens=16)
    scores = [task.grade(sample, answer.text).score for sample, answer in zip(samples, answers, strict=True)]
    assert sum(scores) / len(scores) > 0.9


def test_for_long_clips_the_same_weights_see_over_a_thousand_tokens():
    pipe = pipeline("tiny-long", "none", device="cpu", dtype="float32")
    assert type(adapter_for(pipe.adapter.config().architectures)) is TinyLongAdapter
    assert not list((ASSETS / "tiny-long").glob("*.safetensors"))
    for name, weight in pipe.engine.model.named_parameters():
        assert torch.equal(weight, tiny().engine.model.get_parameter(name)), name
    prepared = pipe.adapter.prepare(pipe.engine.processor, [scene_request(seconds=LONG_SECONDS)])
    (layout,) = prepared.layouts
    assert (layout.count(Modality.VIDEO), layout.count(Modality.AUDIO)) == (512, 597)
    assert np.nanmax(layout.second) > LONG_SECONDS - 1


@pytest.mark.slow  # 45 prompts of over a thousand tokens
def test_it_is_mostly_right_about_long_clips():
    pipe, task = pipeline("tiny-long", "none", device="cpu", dtype="float32"), ToyWorldLongTask(scenes=3, seed=7)
    scores = [task.grade(one, pipe(one.clip, one.question, max_new_tokens=16).text).score for one in task.samples()]
    assert sum(scores) / len(scores) > 0.8


def test_its_preset_keeps_one_word_answers():
    pruned = tiny()(ASSETS / "clips" / "knock.mp4", "what shape is moving?", plan="fastav", max_new_tokens=4)
    assert pruned.text == "square"
    assert pruned.flops.ratio < 0.9


# --- words that it was never taught


def test_words_that_it_does_not_know_are_named():
    processor = tiny().engine.processor  # pyright: ignore
    assert unknown_words(processor, "Does the Dog bark in the picture, dog?") == ["dog", "bark"]
    assert unknown_words(processor, "wie viele? 3 beeps!") == ["wie", "viele", "3"]
    assert all(unknown_words(processor, sentence) == [] for sentence in sentences())


def test_a_question_with_words_that_it_does_not_know_warns():
    with pytest.warns(FastAVWarning, match="tiny does not know the words 'did', 'dog'") as warned:
        tiny()(CLIP, "Did the dog move?", max_new_tokens=1)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny()(CLIP, "Which shape moves?", max_new_tokens=1)


def test_the_commands_say_it_in_one_line(tmp_path, capsys):
    assert main(["run", str(CLIP), "does the dog bark?", "--max-new-tokens", "1"]) == 0
    assert "warning: tiny does not know the words 'dog', 'bark', so" in capsys.readouterr().err
    lines = [json.dumps({"clip": str(CLIP), "question": q}) for q in ("is it a dog?", "is it a dog?", "is it red?")]
    (tmp_path / "q.jsonl").write_text("\n".join(lines))
    assert main(["batch", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "a.jsonl"), "--max-new-tokens", "1"]) == 0
    err = capsys.readouterr().err
    assert err.count("warning: tiny does not know the word 'dog', so") == 1
