"""Files of questions with chat messages; those about clips are tested with `fastav batch`."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from fastav.errors import FastAVError, UnreadableMedia
from fastav.messages import Use
from fastav.questions import read_conversation, read_questions
from fastav.request import Request

CLIP = Path(str(files("fastav") / "assets" / "clips" / "triangle.mp4"))
SHOWN = {"type": "video", "path": "triangle.mp4"}
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": [SHOWN, {"type": "text", "text": "What moves?"}]},
    {"role": "assistant", "content": "a triangle"},
    {"role": "user", "content": "What color?"},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "triangle.mp4").write_bytes(CLIP.read_bytes())
    return tmp_path


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_line_may_hold_messages_whose_paths_are_relative_to_the_file(folder: Path) -> None:
    tools = [{"name": "look"}]
    path = written(folder, {"id": "a", "messages": TALK, "tools": tools, "use": "video"})
    (question,) = read_questions(path, "auto")
    assert (question.id, question.text, question.clip) == ("a", "What color?", str(folder / "triangle.mp4"))
    request = question.request()
    assert isinstance(request, Request)
    assert [message.role for message in request.messages] == ["user", "assistant", "user"]
    assert (request.clip.name, request.use, request.tools) == ("triangle.mp4", Use.VIDEO, ({"name": "look"},))


def test_urls_and_data_stay_as_they_are(folder: Path) -> None:
    parts = [
        {"type": "video", "url": "https://a.example/b.mp4"},
        {"type": "image", "image": "data:,AA"},
    ]
    (question,) = read_questions(written(folder, {"messages": [{"role": "user", "content": parts}]}), "auto")
    assert question.clip == "https://a.example/b.mp4, data:,AA"


def test_what_cannot_be_opened_is_the_questions_own_error(folder: Path) -> None:
    gone = [{"role": "user", "content": [{"type": "video", "path": "gone.mp4"}]}]
    broken, whole = read_questions(written(folder, {"messages": gone}, {"messages": TALK}), "auto")
    error = broken.request()
    assert isinstance(error, UnreadableMedia)
    assert error.message.startswith("messages[0].content[0]: ")
    assert isinstance(whole.request(), Request)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"messages": "What?"}, "messages must be a list"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": ["What?"]}, "messages must be a list of objects"),
        ({"messages": TALK, "clip": "a.mp4"}, "it has messages and clip"),
        ({"messages": TALK, "question": "?", "clip": "a"}, "it has messages and clip and question"),
        ({"messages": TALK, "tools": {}}, "tools must be a list"),
        ({"messages": TALK, "use": "all"}, "use must be auto"),
    ],
)
def test_bad_lines_are_named(folder: Path, entry: Any, message: str) -> None:
    with pytest.raises(FastAVError, match=f"line 1 of .*questions.jsonl: {message}"):
        read_questions(written(folder, entry), "auto")


@pytest.mark.parametrize("content", [TALK, {"messages": TALK}])
def test_a_file_may_hold_one_conversation(folder: Path, content: Any) -> None:
    (folder / "chat.json").write_text(json.dumps(content))
    request = read_conversation(folder / "chat.json", "auto").request()
    assert isinstance(request, Request)
    assert request.question == "What color?"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no messages: Expect"),
        ("{}", "it has no messages"),
        ("3", "it has no messages"),
        ("[]", "a list"),
    ],
)
def test_a_file_without_a_conversation_is_one_error(folder: Path, content: str, message: str) -> None:
    (folder / "chat.json").write_text(content)
    with pytest.raises(FastAVError, match=message):
        read_conversation(folder / "chat.json", "auto")
    with pytest.raises(FastAVError, match="cannot read"):
        read_conversation(folder / "gone.json", "auto")
