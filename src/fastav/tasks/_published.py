"""Benchmarks that are read from a folder with annotations and clips in the form in which they were published."""

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from fastav.errors import TaskError
from fastav.task import Sample, Task
from fastav.tasks._annotations import Annotation, read


class PublishedTask(Task):
    """A benchmark in a folder.

    annotations: where they may stand in it, without suffix, the first that is there counts. clips: the folders that
    clips may be in, likewise ("" is the folder itself).
    """

    annotations: ClassVar[tuple[str, ...]]
    clips: ClassVar[tuple[str, ...]] = ("videos", "video", "")

    def __init__(self, folder: Path | None = None) -> None:
        """folder: with annotations and clips.  Raises: TaskError if there is no such folder."""
        hint = "docs/tasks.md says where to get it and what must lie in its folder"
        if folder is None:
            raise TaskError(f"{self.name} is read from a folder, and none was given", hint)
        if not folder.is_dir():
            raise TaskError(f"{self.name} cannot be read: {folder} is not a folder", hint)
        super().__init__(folder)
        self.root = folder

    def samples(self) -> Iterator[Sample]:
        """All questions, in the order of the annotations.

        Raises: TaskError if annotations are missing or malformed, an id comes twice, or a clip is not in the folder.
        """
        rows = read(self.root, self.annotations, self.annotation_list)
        samples = [sample for row in rows if (sample := self.sample(row)) is not None]
        if not samples:
            raise TaskError(f"{self.name}: none of {len(rows)} questions can be asked", "docs/tasks.md says which can")
        repeated = [name for name, times in Counter(sample.id for sample in samples).items() if times > 1]
        if repeated:
            message = f"{self.name}: {len(repeated)} ids come more than once, the first is {repeated[0]!r}"
            raise TaskError(message, "is there one copy of the annotations in the folder?")
        files = dict.fromkeys(f for s in samples for f in (s.clip, s.sound) if isinstance(f, Path))
        missing = [path for path in files if not path.is_file()]
        if missing:
            first = missing[0].relative_to(self.root)
            message = f"{self.name}: {len(missing)} of {len(files)} clips are not in {self.root}; the first is {first}"
            raise TaskError(message, "docs/tasks.md says where clips must lie")
        return iter(samples)

    def annotation_list(self, content: Any) -> Any:
        """The list of annotations in what a file holds, where it is not one already."""
        return content

    @abstractmethod
    def sample(self, row: Annotation) -> Sample | None:
        """The question of an annotation, None if this task cannot ask it.  Raises: TaskError if it is malformed."""

    def clip(self, *names: str) -> Path:
        """The first of these files that is in the folder; the first of all if none is."""
        places = [self.root / folder / name for name in names for folder in self.clips]
        return next((path for path in places if path.is_file()), places[0])
