"""Daily-Omni: multiple choice about daily life, with questions that need sound and picture aligned in time."""

from fastav.request import Use
from fastav.task import Sample
from fastav.tasks._annotations import Annotation
from fastav.tasks._choices import ChoiceTask, answer_letter, format_question, strip_letters


class DailyOmniTask(ChoiceTask):
    """All 1,197 questions about videos of 30 and 60 s, by the six question types.

    Source: Zhou et al., arXiv:2505.17862.
    """

    name = "daily-omni"
    source = "https://arxiv.org/abs/2505.17862"
    annotations = ("qa",)
    clips = ("Videos", "")

    def sample(self, row: Annotation) -> Sample:
        """One row of qa.json."""
        options, video = strip_letters(row.texts("Choice")), row.text("video_id")
        return Sample(
            id=f"{video}-{row.number}",
            clip=self.clip(f"{video}/{video}_video.mp4"),
            question=format_question(row.text("Question"), options),
            answer=answer_letter(row, "Answer", options),
            family=row.text("Type"),
            options=options,
            use=Use.BOTH,
        )
