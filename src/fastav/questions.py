"""Files of questions about clips: JSON lines, as `fastav batch` and `fastav verify` read them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastav.errors import FastAVError

if TYPE_CHECKING:
    from fastav.media import Clip
    from fastav.request import Request
else:
    Clip = Request = Any  # the command line reads this module before it needs torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question of a file: about a clip, or chat messages.

    id: unique in the file; the line number if the line has none. clip: a path or URL; of messages, those of all media,
    joined by commas. text: the question; of messages, that of the last one. use: the tracks to show, as for
    `fastav.Request`. messages, tools: as for `fastav.Request`; None for a question about a clip.
    """

    id: str | int
    clip: str
    text: str
    use: str
    messages: Sequence[Mapping[str, Any]] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None

    def request(self) -> Request | FastAVError:
        """The request for this question, or the error that prevents it."""
        from fastav.batches import as_failure
        from fastav.request import Request, Use

        try:
            if self.messages is not None:
                return Request(messages=self.messages, use=Use(self.use), tools=self.tools)
            return Request(clip=_open_clip(self.clip), question=self.text, use=Use(self.use))
        except Exception as error:  # one bad file must not stop the other questions
            return as_failure(error)


def read_questions(path: Path, use: str) -> list[Question]:
    """The questions of a file.  use: the tracks of questions that name none.  Raises: FastAVError."""
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except OSError as error:
        raise FastAVError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FastAVError(f"{path} is not UTF-8 text") from None
    questions: dict[str | int, Question] = {}
    numbers: dict[str | int, int] = {}
    for line, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            question = _parse_question(json.loads(text), line, path.parent, use)
        except ValueError as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise FastAVError(
                f"line {line} of {path}: {reason}", 'a line is like {"clip": "a.mp4", "question": "What do you hear?"}'
            ) from None
        if question.id in questions:
            raise FastAVError(
                f"line {line} of {path}: the id {question.id!r} is already used on line {numbers[question.id]}"
            )
        questions[question.id], numbers[question.id] = question, line
    if not questions:
        raise FastAVError(f"{path} has no questions")
    return list(questions.values())


def read_conversation(path: Path, use: str) -> Question:
    """The messages in a JSON file: a list, or an object with messages and tools.  Raises: FastAVError."""
    try:
        entry = json.loads(path.read_bytes().decode("utf-8-sig"))
        entry = {"messages": entry} if isinstance(entry, list) else entry
        if not isinstance(entry, dict) or "messages" not in entry:
            raise ValueError("it has no messages")
        return _parse_question(entry, 1, path.parent, use)
    except OSError as error:
        raise FastAVError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are such
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise FastAVError(
            f"{path} holds no messages: {reason}", 'write [{"role": "user", "content": "What do you hear?"}]'
        ) from None


def _parse_question(entry: Any, line: int, folder: Path, use: str) -> Question:
    """Raises: ValueError."""
    if not isinstance(entry, dict):
        raise ValueError("it is not an object")
    id_, question_use = entry.get("id", line), entry.get("use", use)
    if type(id_) not in (str, int):
        raise ValueError(f"id must be a string or an integer, got {id_!r}")
    if question_use not in ("auto", "both", "video", "audio"):
        raise ValueError(f"use must be auto, both, video or audio, got {question_use!r}")
    if "messages" in entry:
        return _parse_messages(entry, id_, folder, question_use)
    for name in ("clip", "question"):
        if not isinstance(entry.get(name), str):
            raise ValueError(f"{name} must be a string, got {entry.get(name)!r}")
        if not entry[name].strip():
            raise ValueError(f"the {name} is empty")
    return Question(id=id_, clip=_in_folder(entry["clip"], folder), text=entry["question"], use=question_use)


def _parse_messages(entry: dict[str, Any], id_: str | int, folder: Path, use: str) -> Question:
    """Raises: ValueError."""
    if clashes := sorted({"clip", "question"} & entry.keys()):
        raise ValueError(f"it has messages and {' and '.join(clashes)}: put these into a message")
    messages, tools = entry["messages"], entry.get("tools")
    if not (isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages)):
        raise ValueError("messages must be a list of objects with role and content")
    if not (tools is None or isinstance(tools, list)):
        raise ValueError("tools must be a list of objects")
    sources: list[str] = []
    for part in (part for message in messages for part in _parts(message)):
        for name in ("path", "url", part.get("type")):
            if isinstance(name, str) and isinstance(part.get(name), str) and name != "text":
                part[name] = _in_folder(part[name], folder)
                sources.append(part[name])
    last = messages[-1].get("content")
    texts = [last] if isinstance(last, str) else [part.get("text") for part in _parts(messages[-1])]
    return Question(
        id=id_,
        clip=", ".join(dict.fromkeys(sources)),
        text=" ".join(text for text in texts if isinstance(text, str)),
        use=use,
        messages=messages,
        tools=tools,
    )


def _parts(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message.get("content")
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _in_folder(source: str, folder: Path) -> str:
    """A path relative to the folder as a path; a URL as it is."""
    return source if "://" in source or source.startswith("data:") else str(folder / source)


@lru_cache(maxsize=64)
def _open_clip(clip: str) -> Clip:
    """The clip, cached because neighbouring questions often share one."""
    from fastav.media import Clip

    return Clip.open(clip)
