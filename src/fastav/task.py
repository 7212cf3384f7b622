"""A task: questions about clips, and how answers are graded."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from fastav.adapter import Request, Use
from fastav.media import Clip


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One question about one clip.

    id: of the sample, unique in its task. clip: a file, opened only when it is asked about, or a clip in memory.
    question: all that the model is told, options and instruction included. answer: as the task's annotation has it.
    family: what results are broken down by. use: which tracks must be shown; a clip that lacks one is an error.
    """

    id: str
    clip: Path | Clip
    question: str
    answer: str
    family: str
    options: tuple[str, ...] = ()
    use: Use = Use.AUTO
    max_new_tokens: int = 16

    def request(self) -> Request:
        """The request that a model is asked.  Raises: MediaError if the clip cannot be read."""
        clip = self.clip if isinstance(self.clip, Clip) else Clip.open(self.clip)
        return Request(clip=clip, question=self.question, use=self.use)


@dataclass(frozen=True, slots=True)
class Grade:
    """How good an answer is.

    score: in [0, 1]. parsed: whether the answer could be read as one at all; if not, it scores 0 and is counted apart.
    """

    score: float | int
    parsed: bool = True


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
