"""Chats with the embedded model: what they remember, what fails and leaves them as they were, and their files."""

import json
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import fastav
from fastav.chats import Chat
from fastav.errors import (
    FastAVError,
    MediaError,
    MissingTrack,
    PlanError,
    UnknownName,
    UnreadableMedia,
    UnsupportedModel,
)
from fastav.pipelines import Pipeline

CLIPS = Path(str(files("fastav") / "assets" / "clips"))
TRIANGLE, KNOCK = CLIPS / "triangle.mp4", CLIPS / "knock.mp4"
SOUND = fastav.Clip.from_arrays(waveform=np.zeros(16_000, np.float32), sample_rate=16_000, name="beep")
FIRST, LATER = "what shape do you see?", "what color is it?"
CHOSEN = "an earlier question chose the tokens that stay"


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return fastav.pipeline(device="cpu")


def started(pipe: Pipeline, **options: Any) -> Chat:
    chat = pipe.chat(**options)
    chat.ask(TRIANGLE, FIRST)
    return chat


def test_the_first_answer_is_the_pipelines(pipe: Pipeline) -> None:
    chat, expected = pipe.chat(), pipe(TRIANGLE, FIRST)
    answer = chat.ask(TRIANGLE, FIRST)
    for name in ("text", "token_ids", "finish", "plan", "prompt_tokens", "tokens_per_layer", "flops", "kv_bytes"):
        assert getattr(answer, name) == getattr(expected, name), name
    assert [message.role for message in chat.messages] == ["user", "assistant"]
    assert chat.messages[1].text == answer.text
    assert repr(chat) == "Chat(2 messages, plan='fastav')"


def test_a_later_question_costs_its_own_tokens(pipe: Pipeline) -> None:
    chat = pipe.chat(plan="none")
    whole = chat.ask(TRIANGLE, FIRST)
    later = chat.ask(LATER)
    assert set(later.prompt_tokens) == {"text"}
    assert later.flops.full == later.flops.pruned < whole.flops.full / 10
    assert later.kv_bytes.full > whole.kv_bytes.full
    assert set(later.seconds) == {"media", "encode", "prefill", "decode"}
    pruned = started(pipe)
    with pytest.warns(match=CHOSEN):
        answer = pruned.ask(LATER)
    assert answer.kv_bytes.ratio < 1
    assert answer.flops.pruned < answer.flops.full, "its queries see fewer keys"


def test_whose_question_chose_the_tokens_is_said_once_and_only_where_questions_choose(
    pipe: Pipeline, recwarn: pytest.WarningsRecorder
) -> None:
    chat = started(pipe)
    for _ in range(2):
        chat.ask(LATER)
    assert [CHOSEN in str(one.message) for one in recwarn.list].count(True) == 1
    recwarn.clear()
    started(pipe, plan="dart@0.5").ask(LATER)
    assert [one for one in recwarn.list if CHOSEN in str(one.message)], "its pivots are words of the question"
    recwarn.clear()
    for plan in ("none", "dycoke@0.5", "fastav-trim"):
        started(pipe, plan=plan).ask(LATER)
    assert not [one for one in recwarn.list if CHOSEN in str(one.message)]


def test_replan_prefills_the_conversation_anew(pipe: Pipeline) -> None:
    chat = started(pipe)
    history = [
        {"role": "user", "content": [{"type": "video", "path": TRIANGLE}, {"type": "text", "text": FIRST}]},
        {"role": "assistant", "content": chat.messages[-1].text},
        {"role": "user", "content": LATER},
    ]
    expected = pipe(history)
    answer = chat.ask(LATER, replan=True)
    assert (answer.token_ids, answer.prompt_tokens) == (expected.token_ids, expected.prompt_tokens)
    assert answer.flops == expected.flops


def test_a_clip_may_come_after_a_turn_of_text(pipe: Pipeline) -> None:
    chat = pipe.chat()
    chat.ask(FIRST, max_new_tokens=3)
    answer = chat.ask(TRIANGLE, FIRST)
    assert answer.prompt_tokens["video"] == pipe(TRIANGLE, FIRST).prompt_tokens["video"]
    assert answer.flops.ratio < 1
    with pytest.raises(MediaError, match="takes one clip per conversation"), pytest.warns(match=CHOSEN):
        chat.ask(KNOCK, FIRST)


@pytest.mark.parametrize(
    ("content", "options", "error", "message"),
    [
        ((), {}, FastAVError, "ask takes a question, a clip and a question, or messages, got 0"),
        ((TRIANGLE, FIRST, "?"), {}, FastAVError, "got 3 arguments"),
        ((" ",), {}, FastAVError, "the question is empty"),
        ((3,), {}, FastAVError, "a question must be a string"),
        (("gone.mp4", FIRST), {}, UnreadableMedia, "no such file"),
        (([{"role": "usr", "content": "?"}],), {}, UnknownName, r"messages\[0\]: no role"),
        ((FIRST,), {"num_beams": 2}, PlanError, "beams have several"),
        ((FIRST,), {"cache_implementation": "offloaded"}, PlanError, "a conversation keeps its own cache"),
        ((SOUND, FIRST), {"use": "video"}, MissingTrack, "beep has no video track"),
        ((SOUND, FIRST), {"use": "both"}, MissingTrack, "beep has no video track"),
        ((FIRST,), {"temprature": 1.0}, UnknownName, "temperature"),
        ((FIRST,), {"max_new_tokens": 10_000}, FastAVError, "exceed the model's"),
    ],
)
@pytest.mark.filterwarnings(f"ignore:{CHOSEN}")
def test_an_error_leaves_the_chat_as_it_was(
    pipe: Pipeline, content: Any, options: Any, error: type[Exception], message: str
) -> None:
    chat, expected = started(pipe), started(pipe).ask(LATER)
    before = chat.messages
    with pytest.raises(error, match=message):
        chat.ask(*content, **options)
    assert chat.messages == before
    assert chat.ask(LATER).token_ids == expected.token_ids


@pytest.mark.filterwarnings(f"ignore:{CHOSEN}")
def test_an_answer_that_fails_midway_leaves_the_cache_as_it_was(pipe: Pipeline) -> None:
    chat, expected = started(pipe), started(pipe).ask(LATER)

    def fail(_: str) -> None:
        raise ValueError("the reader has gone")

    with pytest.raises(ValueError, match="the reader has gone"):
        chat.ask(LATER, on_text=fail)
    assert chat.ask(LATER).token_ids == expected.token_ids


@pytest.mark.filterwarnings(f"ignore:{CHOSEN}", "ignore:tiny does not know")
def test_an_answer_that_a_stop_text_ended_continues_from_what_was_said(pipe: Pipeline) -> None:
    chat = pipe.chat(plan="none")
    question = "describe the clip."
    whole = pipe(TRIANGLE, question, plan="none")
    word = whole.text.split()[1]
    cut = chat.ask(TRIANGLE, question, stop_strings=[word])
    assert cut.text == whole.text.split(word)[0].strip()
    later = chat.ask(LATER)
    history = [
        {
            "role": "user",
            "content": [{"type": "video", "path": TRIANGLE}, {"type": "text", "text": "describe the clip."}],
        },
        {"role": "assistant", "content": cut.text},
        {"role": "user", "content": LATER},
    ]
    assert later.token_ids == pipe(history, plan="none").token_ids


@pytest.mark.filterwarnings(f"ignore:{CHOSEN}")
def test_threads_take_turns(pipe: Pipeline) -> None:
    chat = pipe.chat(system="color")
    chat.ask(TRIANGLE, FIRST)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(chat.ask, [FIRST, LATER, FIRST, LATER]))
    assert [message.role for message in chat.messages] == ["system", *["user", "assistant"] * 5]
    transcript = chat._conversation.transcript.messages  # type: ignore[attr-defined]
    assert [message["role"] for message in transcript] == [message.role for message in chat.messages]
    assert [m["content"] for m in transcript[3:]] == [m.text for m in chat.messages[3:]]


@pytest.mark.filterwarnings(f"ignore:{CHOSEN}")
def test_a_question_within_an_answer_is_an_error_and_no_deadlock(pipe: Pipeline) -> None:
    chat, errors = started(pipe), list[str]()

    def ask_again(_: str) -> None:
        with pytest.raises(FastAVError, match="is answering a request in this thread") as caught:
            chat.ask(LATER)
        errors.append(caught.value.message)

    chat.ask(LATER, on_text=ask_again)
    pipe(TRIANGLE, FIRST, on_text=ask_again)
    assert len(errors) >= 2
    assert len(chat.messages) == 4


def test_a_system_message_comes_first(pipe: Pipeline) -> None:
    chat = pipe.chat(system="color")
    answer = chat.ask(TRIANGLE, FIRST)
    messages = [
        {"role": "system", "content": "color"},
        {"role": "user", "content": [{"type": "video", "path": TRIANGLE}, {"type": "text", "text": FIRST}]},
    ]
    assert answer.token_ids == pipe(messages).token_ids
    assert [message.role for message in chat.messages] == ["system", "user", "assistant"]


# --- files


@pytest.fixture
def saved(pipe: Pipeline, tmp_path: Path) -> Path:
    started(pipe).save(tmp_path / "chat.safetensors")
    return tmp_path / "chat.safetensors"


@pytest.mark.filterwarnings(f"ignore:{CHOSEN}")
def test_a_resumed_chat_goes_on_and_cannot_be_planned_anew(pipe: Pipeline, saved: Path) -> None:
    chat, resumed = started(pipe), pipe.chat(resume=saved)
    assert [one.text for one in resumed.messages] == [one.text for one in chat.messages]
    assert resumed.ask(LATER).token_ids == chat.ask(LATER).token_ids
    resumed.save(saved)
    assert pipe.chat(resume=saved).ask(FIRST).token_ids == chat.ask(FIRST).token_ids
    with pytest.raises(FastAVError, match="a resumed chat has no media"):
        resumed.ask(LATER, replan=True)


def test_a_file_has_only_what_was_kept(pipe: Pipeline, saved: Path) -> None:
    whole = saved.with_name("whole.safetensors")
    started(pipe, plan="none").save(whole)
    assert saved.stat().st_size < whole.stat().st_size


def test_a_resumed_chat_has_its_own_system_message(pipe: Pipeline, saved: Path) -> None:
    with pytest.raises(FastAVError, match="a resumed chat has its own system message"):
        pipe.chat(resume=saved, system="color")


@pytest.mark.parametrize("lost", ["layers.0.keys", "tokens.input_ids", "fields"])
def test_a_file_that_lacks_something_is_one_error(pipe: Pipeline, saved: Path, tmp_path: Path, lost: str) -> None:
    with safe_open(saved, "pt") as file:
        (key, header), *_ = file.metadata().items()
        tensors = {name: file.get_tensor(name) for name in file.keys() if name != lost}  # noqa: SIM118
    fields = {name: value for name, value in json.loads(header).items() if name != lost}
    save_file(tensors, tmp_path / "other", {key: json.dumps(fields)})
    with pytest.raises(FastAVError, match="other is damaged: it lacks"):
        pipe.chat(resume=tmp_path / "other")


def test_what_json_cannot_hold_is_one_error(pipe: Pipeline, tmp_path: Path) -> None:
    chat = pipe.chat()
    chat.ask([{"role": "user", "content": FIRST, "name": object()}])
    with pytest.raises(FastAVError, match=r"cannot write .*not JSON serializable"):
        chat.save(tmp_path / "chat.safetensors")
    assert not list(tmp_path.iterdir())


def test_files_of_others_are_refused(pipe: Pipeline, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FastAVError, match=r"with the plan '\w+', not"):
        pipe.chat(plan="none", resume=saved)
    other = fastav.pipeline("tiny-long", device="cpu")
    with pytest.raises(FastAVError, match="with the model 'tiny', not 'tiny-long'"):
        other.chat(resume=saved)
    half = fastav.pipeline(device="cpu", dtype="bfloat16")
    with pytest.raises(FastAVError, match="with the dtype 'float32', not 'bfloat16'"):
        half.chat(resume=saved)
    changed = fastav.pipeline(device="cpu")
    with torch.no_grad():
        next(iter(changed.engine.model.parameters())).mul_(0.5)
    with pytest.raises(FastAVError, match=r"with the weights '\w+', not"):
        changed.chat(resume=saved)
    (tmp_path / "text").write_text("no tensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "tensors")
    with safe_open(saved, "pt") as file:
        header = json.loads(file.metadata()["fastav_conversation"])
        save_file(
            {"a": torch.zeros(1)}, tmp_path / "newer", {"fastav_conversation": json.dumps(header | {"version": 2})}
        )
    for name, message in (
        ("text", "cannot read .*text"),
        ("gone", "cannot read .*gone"),
        ("tensors", "is no conversation"),
        ("newer", "is no conversation of this version"),
    ):
        with pytest.raises(FastAVError, match=message):
            pipe.chat(resume=tmp_path / name)


def test_what_cannot_be_written_is_one_error_and_keeps_the_earlier_file(pipe: Pipeline, saved: Path) -> None:
    before = saved.read_bytes()
    with pytest.raises(FastAVError, match="there is no cache to save"):
        pipe.chat().save(saved)
    with pytest.raises(FastAVError, match="cannot write"):
        started(pipe).save(saved / "inside.safetensors")
    assert saved.read_bytes() == before


def test_engines_without_a_cache_between_requests_say_so(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastav.engine import Engine

    monkeypatch.setattr(type(pipe.engine), "conversation", Engine.conversation)
    with pytest.raises(UnsupportedModel, match="keeps no cache between requests"):
        pipe.chat()
