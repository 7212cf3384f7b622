"""AVQA: multiple choice about everyday clips, with questions that need picture and sound."""

from fastav.request import Use
from fastav.task import Sample
from fastav.tasks._annotations import Annotation
from fastav.tasks._choices import LETTERS, ChoiceTask, format_question


class AVQATask(ChoiceTask):
    """The validation split, which papers report, by the eight question types.

    The clips are from VGG-Sound, 10 s each. Source: Yang et al., "AVQA", ACM Multimedia 2022, section 3 (data), 5
    (accuracy).
    """

    name = "avqa"
    source = "https://mn.cs.tsinghua.edu.cn/avqa"
    annotations = ("data/annotation/val_qa", "annotation/val_qa", "val_qa")
    clips = ("data/video", "videos", "video", "")

    def sample(self, row: Annotation) -> Sample:
        """One row of val_qa.json; `answer` counts options from 0."""
        options = row.texts("multi_choice")
        return Sample(
            id=row.text("id"),
            clip=self.clip(row.text("video_name") + ".mp4"),
            question=format_question(row.text("question_text"), options),
            answer=LETTERS[row.index("answer", len(options))],
            family=row.text("question_type"),
            options=options,
            use=Use.BOTH,
        )
