"""Tasks: questions about clips, and the grading of answers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from fastav.media import AudioTrack, Clip
from fastav.request import Request, Use


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question about one clip.

    id: unique in its task. clip: a file, which is opened on request, or a clip in memory. question: the whole text for
    the model, including options and instruction. answer: the correct answer; a letter if there are options. family: the
    group of samples in reports. use: the tracks to show; a clip without one of them is an error. sound: a file whose
    sound replaces that of the clip; a still picture then lasts as long as the sound.
    """

    id: str
    clip: Path | Clip
    question: str
    answer: str
    family: str
    options: tuple[str, ...] = ()
    use: Use = Use.AUTO
    max_new_tokens: int = 16
    sound: Path | None = None

    def request(self) -> Request:
        """The request for the model.  Raises: MediaError if the clip cannot be read."""
        clip = self.clip if isinstance(self.clip, Clip) else Clip.open(self.clip)
        if self.sound is not None:
            clip = _replace_sound(clip, Clip.open(self.sound).require_audio())
        return Request(clip=clip, question=self.question, use=self.use)


@dataclass(frozen=True, slots=True)
class Grade:
    """The grade of an answer.

    score: in [0, 1]. parsed: whether the answer could be read; if not, the score is 0 and the answer counts as
    unparsed.
    """

    score: float | int
    parsed: bool = True


def _replace_sound(clip: Clip, sound: AudioTrack) -> Clip:
    """The clip with this sound instead of its own."""
    video = clip.require_video()
    if video.frames == 1:
        # some models cut the sound at the end of the video
        video = replace(video, fps=1 / sound.duration, duration=sound.duration)
    return replace(clip, video=video, audio=sound)


GradedAnswer = tuple[Sample, str, Grade]
"""A sample, the text of an answer to it, and its grade."""


class Task(ABC):
    """A benchmark.

    name: its name in the registry. source: where it is described. needs_folder: whether it needs a folder with clips
    and annotations.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    needs_folder: ClassVar[bool] = True

    def __init__(self, folder: Path | None = None) -> None:
        """folder: the benchmark's annotations and clips, in their published form.  Raises: TaskError."""
        self.folder = folder

    @abstractmethod
    def samples(self) -> Iterator[Sample]:
        """All samples, in a fixed order.  Raises: TaskError if an annotation is missing or malformed."""

    @abstractmethod
    def grade(self, sample: Sample, text: str) -> Grade:
        """The grade of an answer to a sample, by the metric of the benchmark's paper."""

    def metrics(self, answers: Sequence[GradedAnswer]) -> dict[str, float | int]:
        """The metrics of the answers of one family, or of all; there is at least one answer.

        By default these are `accuracy`, the mean score; `stderr`, its standard error if questions were independent
        (questions about one clip are not); `n`, the number of answers; `unparsed`, the number of unreadable answers,
        which score 0.
        """
        scores = [grade.score for _, _, grade in answers]
        mean = sum(scores) / len(scores)
        variance = sum((score - mean) ** 2 for score in scores) / len(scores)
        unparsed = sum(not grade.parsed for _, _, grade in answers)
        return {"accuracy": mean, "stderr": math.sqrt(variance / len(scores)), "n": len(scores), "unparsed": unparsed}

    def report(self, answers: Sequence[GradedAnswer]) -> dict[str, dict[str, float | int]]:
        """The metrics of `all` answers, and of each family in order of appearance."""
        families: dict[str, list[GradedAnswer]] = {"all": list(answers)} if answers else {}
        for one in answers:
            families.setdefault(one[0].family, []).append(one)
        return {family: self.metrics(group) for family, group in families.items()}
