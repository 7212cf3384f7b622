"""OmniBench: multiple choice about a picture and a matching sound."""

from fastav.request import Use
from fastav.task import Sample
from fastav.tasks._annotations import Annotation
from fastav.tasks._choices import LETTERS, ChoiceTask, format_question


class OmniBenchTask(ChoiceTask):
    """All 1,142 questions, by task type; the picture is a video of one frame.

    Source: Li et al., arXiv:2409.15272. Deviation: the model names a letter; the paper's evaluation searches for the
    text of an option.
    """

    name = "omnibench"
    source = "https://arxiv.org/abs/2409.15272"
    annotations = ("dataset/*", "batch-5_1142_*")
    clips = ("mm_data", "")

    def sample(self, row: Annotation) -> Sample:
        """One line of the file in `dataset/`; `answer` is the text of an option."""
        options, answer = row.texts("options"), row.text("answer")
        if options.count(answer) != 1:
            raise row.error(f"'answer' must be one of the options, got {answer!r}")
        return Sample(
            id=row.text("index"),
            clip=self.clip(f"image/{row.text('image_path')}"),
            sound=self.clip(f"audio/{row.text('audio_path')}"),
            question=format_question(row.text("question"), options),
            answer=LETTERS[options.index(answer)],
            family=row.text("task type"),
            options=options,
            use=Use.BOTH,
        )
