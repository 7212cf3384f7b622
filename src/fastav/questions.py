"""Files of questions about clips: JSON lines, as `fastav batch` and `fastav verify` read them."""

import json
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
    """A question of a file.

    id: unique in the file; the line number if the line has none. clip: a path or URL. text: the question. use: the
    tracks to show, as for `fastav.Request`.
    """

    id: str | int
    clip: str
    text: str
    use: str

    def request(self) -> Request | FastAVError:
        """The request for this question, or the error that prevents it."""
        from fastav.batches import as_failure
        from fastav.request import Request, Use

        try:
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


def _parse_question(entry: Any, line: int, folder: Path, use: str) -> Question:
    """Raises: ValueError."""
    if not isinstance(entry, dict):
        raise ValueError("it is not an object")
    for name in ("clip", "question"):
        if not isinstance(entry.get(name), str):
            raise ValueError(f"{name} must be a string, got {entry.get(name)!r}")
        if not entry[name].strip():
            raise ValueError(f"the {name} is empty")
    id_, question_use = entry.get("id", line), entry.get("use", use)
    if type(id_) not in (str, int):
        raise ValueError(f"id must be a string or an integer, got {id_!r}")
    if question_use not in ("auto", "both", "video", "audio"):
        raise ValueError(f"use must be auto, both, video or audio, got {question_use!r}")
    clip = entry["clip"] if "://" in entry["clip"] else str(folder / entry["clip"])
    return Question(id=id_, clip=clip, text=entry["question"], use=question_use)


@lru_cache(maxsize=64)
def _open_clip(clip: str) -> Clip:
    """The clip, cached because neighbouring questions often share one."""
    from fastav.media import Clip

    return Clip.open(clip)
