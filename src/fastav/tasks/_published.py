"""Benchmarks in folders with annotations and clips in their published form."""

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

    annotations: possible paths of the annotations without suffix; the first that exists is used. clips: possible
    folders of the clips ("" is the folder itself).
    """

    annotations: ClassVar[tuple[str, ...]]
    clips: ClassVar[tuple[str, ...]] = ("videos", "video", "")

    def __init__(self, folder: Path | None = None) -> None:
        """folder: has annotations and clips.  Raises: TaskError if it does not exist."""
        hint = "docs/tasks.md says where to get it, and what its folder must have"
        if folder is None:
            raise TaskError(f"{self.name} is read from a folder, and none was given", hint)
        if not folder.is_dir():
            raise TaskError(f"{self.name} cannot be read: {folder} is not a folder", hint)
        super().__init__(folder)
        self.root = folder

    def samples(self) -> Iterator[Sample]:
        """All samples, in the order of the annotations.

        Raises: TaskError if annotations are missing or malformed, an id is repeated, or a clip is not in the folder.
        """
        rows = read(self.root, self.annotations, self.annotation_list)
        samples = [sample for row in rows if (sample := self.sample(row)) is not None]
        if not samples:
            raise TaskError(f"{self.name}: none of {len(rows)} questions can be asked", "docs/tasks.md says which can")
        repeated = [name for name, times in Counter(sample.id for sample in samples).items() if times > 1]
        if repeated:
            message = f"{self.name}: {len(repeated)} ids are repeated; the first is {repeated[0]!r}"
            raise TaskError(message, "does the folder have two copies of the annotations?")
        files = dict.fromkeys(f for s in samples for f in (s.clip, s.sound) if isinstance(f, Path))
        missing = [path for path in files if not path.is_file()]
        if missing:
            first = missing[0].relative_to(self.root)
            message = f"{self.name}: {len(missing)} of {len(files)} clips are not in {self.root}; the first is {first}"
            raise TaskError(message, "docs/tasks.md says where clips must be")
        return iter(samples)

    def annotation_list(self, content: Any) -> Any:
        """The list of annotations in the content of a file."""
        return content

    @abstractmethod
    def sample(self, row: Annotation) -> Sample | None:
        """The sample of an annotation; None if this task cannot ask it.  Raises: TaskError if it is malformed."""

    def clip(self, *names: str) -> Path:
        """The first of these files that exists in the folder; the first of all if none exists."""
        places = [self.root / folder / name for name in names for folder in self.clips]
        return next((path for path in places if path.is_file()), places[0])
