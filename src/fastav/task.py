"""A task: questions about clips, and how answers are graded."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from fastav.adapter import Request, Use
from fastav.media import AudioTrack, Clip


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question about one clip.

    id: of the sample, unique in its task. clip: a file, opened only when it is asked about, or a clip in memory.
    question: all that the model is told, options and instruction included. answer: the right one, a letter where there
    are options. family: what results are broken down by. use: which tracks must be shown; a clip that lacks one is an
    error. sound: a file whose sound is heard instead of the clip's; a still picture then lasts as long as its sound.
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
        """The request that a model is asked.  Raises: MediaError if the clip cannot be read."""
        clip = self.clip if isinstance(self.clip, Clip) else Clip.open(self.clip)
        if self.sound is not None:
            clip = _replace_sound(clip, Clip.open(self.sound).require_audio())
        return Request(clip=clip, question=self.question, use=self.use)


@dataclass(frozen=True, slots=True)
class Grade:
    """How good an answer is.

    score: in [0, 1]. parsed: whether the answer could be read as one at all; if not, it scores 0 and is counted apart.
    """

    score: float | int
    parsed: bool = True


def _replace_sound(clip: Clip, sound: AudioTrack) -> Clip:
    """The clip with this sound instead of its own."""
    video = clip.require_video()
    if video.frames == 1:
        # some models hear no more than the video lasts
        video = replace(video, fps=1 / sound.duration, duration=sound.duration)
    return replace(clip, video=video, audio=sound)


GradedAnswer = tuple[Sample, str, Grade]
"""A question, the answer that was given, and how good it is."""


class Task(ABC):
    """One benchmark.

    name: in the registry. source: where it is described. needs_folder: whether its clips and annotations must be given.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    needs_folder: ClassVar[bool] = True

    def __init__(self, folder: Path | None = None) -> None:
        """folder: with the benchmark's annotations and clips, in its published form.  Raises: TaskError."""
        self.folder = folder

    @abstractmethod
    def samples(self) -> Iterator[Sample]:
        """All questions, in a fixed order.  Raises: TaskError if an annotation is missing or malformed."""

    @abstractmethod
    def grade(self, sample: Sample, text: str) -> Grade:
        """How good this answer to the sample is, by the metric of the benchmark's paper."""

    def metrics(self, answers: Sequence[GradedAnswer]) -> dict[str, float | int]:
        """What is reported of these answers, which are those of one family or all of them; there is at least one.

        By default `accuracy`, the mean score; `stderr`, its standard error if questions were independent (those about
        one clip are not); `n`, how many; `unparsed`, how many could not be read as answers (they score 0).
        """
        scores = [grade.score for _, _, grade in answers]
        mean = sum(scores) / len(scores)
        variance = sum((score - mean) ** 2 for score in scores) / len(scores)
        unparsed = sum(not grade.parsed for _, _, grade in answers)
        return {"accuracy": mean, "stderr": math.sqrt(variance / len(scores)), "n": len(scores), "unparsed": unparsed}

    def report(self, answers: Sequence[GradedAnswer]) -> dict[str, dict[str, float | int]]:
        """The metrics of each family, in the order in which families come up, after those of `all` answers."""
        families: dict[str, list[GradedAnswer]] = {"all": list(answers)} if answers else {}
        for one in answers:
            families.setdefault(one[0].family, []).append(one)
        return {family: self.metrics(group) for family, group in families.items()}
