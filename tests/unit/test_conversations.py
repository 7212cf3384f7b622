"""Conversations in transformers' form become what the adapters feed the models."""

from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchFeature

from fastav.errors import MediaError, MissingTrack, UnreadableMedia
from fastav.media import Clip
from fastav.request import Request, Use
from support.native import FAMILIES

CLIPS = Path(str(files("fastav") / "assets" / "clips"))
CLIP, OTHER = CLIPS / "triangle.mp4", CLIPS / "knock.mp4"
QUESTION = "What is heard?"
AUTO = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def family(request: Any) -> tuple[Any, Any]:
    family = FAMILIES[request.param]
    return family.adapter, family.processor()


def video(**source: Any) -> dict[str, Any]:
    return {"type": "video"} | (source or {"path": str(CLIP)})


def audio(**source: Any) -> dict[str, Any]:
    return {"type": "audio"} | source


def talk(*parts: dict[str, Any], question: str = QUESTION) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def prepared(family: Any, *requests: Request) -> dict[str, torch.Tensor]:
    adapter, processor = family
    return dict(adapter.prepare(processor, requests).inputs)


def request(clip: Clip | None = None, use: Use = Use.AUTO, question: str = QUESTION) -> Request:
    return Request(clip=clip or Clip.open(CLIP), question=question, use=use)


def assert_same(ours: Any, wanted: dict[str, torch.Tensor]) -> None:
    assert isinstance(ours, BatchFeature)
    assert set(ours) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(ours[name], value), name


CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], Use]] = {
    "path": ([video()], {}, Use.AUTO),
    "url": ([video(url=str(CLIP))], {}, Use.BOTH),
    "a clip": ([video(video=Clip.open(CLIP))], {}, Use.BOTH),
    "picture alone": ([video()], {"load_audio_from_video": False}, Use.VIDEO),
    "with its sound": ([video(path=CLIP)], {"load_audio_from_video": True}, Use.BOTH),
    "its sound is a part": ([video(), audio()], {"load_audio_from_video": False}, Use.BOTH),
    "the sound's path too": ([audio(path=str(CLIP)), video()], {}, Use.BOTH),
    "sound alone": ([audio(path=str(CLIP))], {}, Use.AUDIO),
}


@pytest.mark.parametrize("case", CASES)
def test_a_conversation_gives_what_the_adapter_does(family: Any, case: str) -> None:
    parts, options, use = CASES[case]
    _, processor = family
    if use is Use.AUDIO and "audio" not in processor.places:
        with pytest.raises(MediaError, match="only along with a picture"):
            processor.apply_chat_template(talk(*parts), **AUTO, **options)
        return
    messages = talk(*parts)
    before = deepcopy([[(part["type"], part.get("text")) for part in message["content"]] for message in messages])
    ours = processor.apply_chat_template(messages, **AUTO, **options)
    assert_same(ours, prepared(family, request(use=use)))
    assert before == [[(part["type"], part.get("text")) for part in message["content"]] for message in messages]


def test_sound_may_come_from_another_file(family: Any) -> None:
    _, processor = family
    ours = processor.apply_chat_template(talk(video(), audio(path=str(OTHER))), **AUTO)
    mixed = Clip(name="mixed", video=Clip.open(CLIP).video, audio=Clip.open(OTHER).audio)
    assert_same(ours, prepared(family, request(mixed, Use.BOTH)))


def test_arrays_are_clips_that_say_how_fast_they_are(family: Any) -> None:
    _, processor = family
    frames = np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), dtype=np.uint8)
    sound = np.random.default_rng(0).uniform(-0.5, 0.5, 16_000).astype(np.float32)
    parts = [video(video=frames, fps=10), audio(audio=sound, sampling_rate=16_000)]
    clip = Clip.from_arrays(frames=frames, fps=10, waveform=sound, sample_rate=16_000)
    assert_same(processor.apply_chat_template(talk(*parts), **AUTO), prepared(family, request(clip)))
    for part in (video(video=frames), audio(audio=sound)):
        shown = [part] if part["type"] == "video" else [video(), part]
        with pytest.raises(MediaError, match=r"needs its (fps|sampling_rate)"):
            processor.apply_chat_template(talk(*shown), **AUTO)


def test_conversations_of_a_batch_have_clips_of_their_own(family: Any) -> None:
    _, processor = family
    questions = ("Why?", "What is heard at the end of it?")
    talks = [
        talk(video(path=str(clip)), question=question) for clip, question in zip((CLIP, OTHER), questions, strict=True)
    ]
    wanted = [
        request(Clip.open(clip), question=question) for clip, question in zip((CLIP, OTHER), questions, strict=True)
    ]
    assert_same(processor.apply_chat_template(talks, padding=True, **AUTO), prepared(family, *wanted))


def test_text_alone_stays_among_clips(family: Any) -> None:
    _, processor = family
    both = processor.apply_chat_template([talk(video()), talk(question="Hello!")], **AUTO)
    alone = processor.apply_chat_template(talk(question="Hello!"), **AUTO)
    assert set(alone) <= {"input_ids", "attention_mask", "position_ids"}
    assert both["input_ids"][1][both["attention_mask"][1] == 1].tolist() == alone["input_ids"][0].tolist()


def test_a_later_turn_may_show_the_clip_and_answers_may_follow(family: Any) -> None:
    _, processor = family
    before = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    after = [{"role": "assistant", "content": "A bell."}, {"role": "user", "content": "Sure?"}]
    ours = processor.apply_chat_template([*before, *talk(video()), *after], **AUTO)
    text = processor.apply_chat_template([*before, *talk(video()), *after], add_generation_prompt=True)
    clip = processor.media_arguments([processor.read(request().media[0])])
    assert_same(ours, dict(processor(text, **clip)))


def test_ids_alone_are_the_same(family: Any) -> None:
    _, processor = family
    ids = processor.apply_chat_template(talk(video()), tokenize=True, add_generation_prompt=True)
    assert torch.equal(ids, prepared(family, request())["input_ids"])


NO = {"tokenize": True, "return_dict": True}


@pytest.mark.parametrize(
    ("parts", "options", "error", "message"),
    [
        ([video(path="missing.mp4")], NO, UnreadableMedia, "missing.mp4"),
        ([{"type": "video"}], NO, MediaError, "does not say what it shows"),
        ([video(), video()], NO, MediaError, "several parts"),
        ([video(), video()], {}, MediaError, "several parts"),
        ([video(), audio(), audio()], NO, MediaError, "several parts"),
        ([video(path=str(CLIPS.parent / "clips" / "questions.json"))], NO, UnreadableMedia, "questions.json"),
        ([{"type": "image", "path": "x.png"}], NO, MediaError, "type image"),
        ([video()], {**NO, "num_frames": 4}, MediaError, "takes num_frames"),
        ([video()], {**NO, "max_length": 9, "truncation": True}, MediaError, "takes max_length, truncation"),
        ([video()], {**NO, "return_assistant_tokens_mask": True}, MediaError, "return_assistant_tokens_mask"),
        ([video()], {**NO, "videos": [1]}, MediaError, "from the messages, got videos too"),
        ([video()], {**NO, "processor_kwargs": {"fps": 1}}, MediaError, "takes fps"),
        ([video()], {**NO, "return_tensors": "np"}, MediaError, "PyTorch tensors only"),
    ],
)
def test_what_cannot_be_shown_is_an_error(
    family: Any, parts: list[dict[str, Any]], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        family[1].apply_chat_template(talk(*parts), **options)


def test_a_track_that_is_not_there_is_an_error(family: Any, tmp_path: Path) -> None:
    silent = Clip(name="silent", video=Clip.open(CLIP).video, audio=None)
    deaf = Clip(name="blind", video=None, audio=Clip.open(CLIP).audio)
    for parts, options in (
        ([video(video=silent)], {"load_audio_from_video": True}),
        ([video(video=silent), audio()], {}),
        ([video(video=deaf)], {}),
    ):
        with pytest.raises(MissingTrack):
            family[1].apply_chat_template(talk(*parts), **NO, **options)


def test_clips_in_two_turns_are_an_error(family: Any) -> None:
    with pytest.raises(MediaError, match="several parts"):
        family[1].apply_chat_template([*talk(video()), *talk(video())], **NO)


def test_earlier_text_cannot_take_the_clips_place(family: Any) -> None:
    earlier = {"role": "user", "content": "What is a <video> tag?"}
    with pytest.raises(MediaError, match="text before the clip holds <video>"):
        family[1].apply_chat_template([earlier, *talk(video())], **NO)


@pytest.mark.parametrize("text", ["<video>\nWhy?", "Why?\n<video>", "<video> Why?"])
def test_a_place_without_a_clip_is_an_error(family: Any, text: str) -> None:
    _, processor = family
    with pytest.raises(MediaError, match="place for video, <video>, but none was given"):
        processor(processor.apply_chat_template([{"role": "user", "content": text}]))
    with pytest.raises(MediaError, match="place for video, <video>, but none was given"):
        processor.apply_chat_template([{"role": "user", "content": text}], **NO)
    if "audio" in processor.places:
        with pytest.raises(MediaError, match="place for audio, <audio>, but none was given"):
            processor(processor.prompt("Why?", video=False, audio=True))


def test_images_are_refused(family: Any) -> None:
    _, processor = family
    with pytest.raises(MediaError, match="not images"):
        processor("Why?", images=[np.zeros((4, 4, 3), np.uint8)])
    assert torch.equal(processor("Why?", images=None)["input_ids"], processor("Why?")["input_ids"])


def test_templates_may_have_names_and_variables(family: Any) -> None:
    processor = deepcopy(family[1])
    processor.chat_template = {"default": processor.chat_template, "loud": "{{ messages[0]['content'] }}{{ ending }}"}
    wanted = processor.apply_chat_template(talk(question="Hi"), chat_template="loud", ending="!")
    assert wanted == "Hi!"
    ids = processor.apply_chat_template(talk(question="Hi"), chat_template="loud", ending="!", tokenize=True)
    assert ids.tolist() == processor("Hi!")["input_ids"].tolist()
    assert processor.apply_chat_template(talk(question="Hi")) == family[1].apply_chat_template(talk(question="Hi"))


PARTS = (  # a template in transformers' own form, which writes the places itself
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{{ '<video>\n' if part['type'] == 'video' else part['text'] }}{% endfor %}{% endfor %}"
)


def test_a_template_given_in_the_call_gets_the_messages_as_they_are(family: Any) -> None:
    _, processor = family
    messages = talk(video())
    before = deepcopy(messages)
    text = processor.apply_chat_template(messages, chat_template=PARTS)
    assert text == f"user: <video>\n{QUESTION}"
    assert processor.apply_chat_template([messages] * 2, chat_template=PARTS) == [text] * 2
    ours = processor.apply_chat_template(messages, chat_template=PARTS, **NO)
    assert_same(ours, dict(processor(text, **processor.media_arguments([processor.read(request().media[0])]))))
    assert messages == before


def test_the_processors_own_template_may_be_given_in_the_call(family: Any) -> None:
    _, processor = family
    own = processor.chat_template
    assert processor.apply_chat_template(talk(video()), chat_template=own) == processor.apply_chat_template(
        talk(video())
    )


def test_a_template_given_in_the_call_without_a_place_is_an_error(family: Any) -> None:
    with pytest.raises(MediaError):
        family[1].apply_chat_template(talk(video()), chat_template="{{ messages[0]['content'][1]['text'] }}", **NO)
    with pytest.raises(MediaError, match="type image"):
        family[1].apply_chat_template(talk({"type": "image", "path": "x.png"}), chat_template=PARTS)
