"""The prompts of a calibration: questions about clips."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

from fastav.errors import CalibrationError, reason_of
from fastav.request import question_of

QUESTION = "Describe the clip."
VIDEO = ".avi .m4v .mkv .mov .mp4 .mpeg .mpg .webm"
AUDIO = ".aac .flac .m4a .mp3 .ogg .opus .wav"
SUFFIXES = frozenset(f"{VIDEO} {AUDIO}".split())


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question about one file.  key: the name of its trace."""

    clip: Path
    question: str
    key: str

    @classmethod
    def of(cls, clip: Path, question: str) -> "Prompt":
        """A prompt for the current content of a file. The key depends on path, size, modification time and question."""
        stat = clip.stat()
        parts = (
            os.fsencode(clip.resolve()),
            str(stat.st_size).encode(),
            str(stat.st_mtime_ns).encode(),
            question.encode(),
        )
        return cls(clip, question, sha256(b"\n".join(parts)).hexdigest()[:16])


def prompts_of(clips: Sequence[str | Path], questions: Sequence[str] | Mapping[str, Sequence[str]]) -> list[Prompt]:
    """All pairs of a clip and a question, each once.

    clips: files, or folders with media files. questions: for all clips (empty: `QUESTION`), or by file name. Raises:
    CalibrationError for a missing clip, a folder without clips, or a clip without a question; FastAVError for an empty
    question.
    """
    if isinstance(questions, str):
        raise CalibrationError("questions must be a list, got a string", "write [question]")
    files = [clip for path in clips for clip in _files(Path(path))]
    if not files:
        raise CalibrationError("no clips are given", "give files or folders")
    for question in chain(*questions.values()) if isinstance(questions, Mapping) else questions:
        question_of(question)
    by_name = questions if isinstance(questions, Mapping) else {clip.name: questions or (QUESTION,) for clip in files}
    if without_question := [clip.name for clip in files if not by_name.get(clip.name)]:
        raise CalibrationError(
            f"there is no question about {without_question[0]}", "the keys of questions must be file names"
        )
    prompts = (Prompt.of(clip, question) for clip in files for question in by_name[clip.name])
    return list({prompt.key: prompt for prompt in prompts}.values())


def read_questions(path: str | Path) -> list[str] | dict[str, list[str]]:
    """The questions in a file: text with a question per line, or JSON with a list of questions or lists by file name.

    A question in JSON is a string, or an object with the key `question`.
    Raises: CalibrationError.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix != ".json":
            return list(_questions(path, [line for line in text.splitlines() if line.strip()]))
        data = json.loads(text)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise CalibrationError(f"cannot read the questions {str(path)!r}: {reason}") from None
    if isinstance(data, dict):
        return {name: list(_questions(path, entries)) for name, entries in data.items()}
    return list(_questions(path, data))


def _questions(path: Path, entries: Any) -> Iterator[str]:
    for entry in entries if isinstance(entries, list) else ():
        text = entry.get("question") if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            raise CalibrationError(f"{path}: a question must be a string, got {text!r}")
        if not text.isascii() and text.encode(errors="replace").decode() != text:
            raise CalibrationError(f"{path}: a question has an unpaired surrogate (half of a character): {text!r}")
        if not text.strip():
            raise CalibrationError(f"{path}: a question is empty", "write a question about the clip")
        yield text.strip()
    if not isinstance(entries, list) or not entries:
        raise CalibrationError(
            f"{path} has no questions", "write one per line, or a JSON list, or a JSON object of lists"
        )


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        if media_files := sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES):
            return media_files
        raise CalibrationError(f"there are no video or audio files in {str(path)!r}")
    if not path.is_file():
        raise CalibrationError(f"the clip {str(path)!r} does not exist")
    return [path]
