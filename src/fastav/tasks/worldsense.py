"""WorldSense: multiple choice about real-world videos, with questions that need picture and sound."""

from typing import Any

from fastav.request import Use
from fastav.task import Sample
from fastav.tasks._annotations import Annotation
from fastav.tasks._choices import ChoiceTask, answer_letter, format_question, strip_letters


class WorldSenseTask(ChoiceTask):
    """All 3,172 questions about 1,662 videos, by the 26 task types.

    It reads the authors' `worldsense_qa.json`, or the table of lmms-lab/WorldSense. Subtitles are not shown.
    Source: Hong et al., arXiv:2502.04326, section 3.
    """

    name = "worldsense"
    source = "https://arxiv.org/abs/2502.04326"
    annotations = ("worldsense_qa", "data/test-*", "test-*")

    def annotation_list(self, content: Any) -> Any:
        """The questions of the authors' file, which is a table of videos with tasks (`task0`, ...)."""
        if not isinstance(content, dict):
            return content
        return [
            {"index": f"{video}/{name}", "video_path": f"{video}.mp4", **task}
            for video, columns in content.items()
            if isinstance(columns, dict)
            for name, task in columns.items()
            if name.startswith("task") and isinstance(task, dict)
        ]

    def sample(self, row: Annotation) -> Sample:
        """One question."""
        options = strip_letters(row.texts("candidates"))
        return Sample(
            id=row.text("index"),
            clip=self.clip(row.text("video_path").removeprefix("./").removeprefix("videos/")),
            question=format_question(row.text("question"), options),
            answer=answer_letter(row, "answer", options),
            family=row.text("task_type"),
            options=options,
            use=Use.BOTH,
        )
