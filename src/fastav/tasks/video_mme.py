"""Video-MME: multiple choice about videos from seconds to an hour, here with sound."""

from fastav.request import Use
from fastav.task import Sample
from fastav.tasks._annotations import Annotation
from fastav.tasks._choices import ChoiceTask, answer_letter, format_question, strip_letters

# the benchmark's own prompt for frames with audio, https://github.com/BradyFU/Video-MME
BEFORE = (
    "Select the best answer to the following multiple-choice question based on the video. "
    "Respond with only the letter (A, B, C, or D) of the correct option."
)
AFTER = "The best answer is:"


class VideoMMETask(ChoiceTask):
    """All 2,700 questions about 900 videos, by the duration of the videos (short, medium, long); without subtitles.

    Source: Fu et al., arXiv:2405.21075, section 4, and the instruction in the project's repository.
    """

    name = "video-mme"
    source = "https://arxiv.org/abs/2405.21075"
    annotations = ("videomme/test-*", "test-*")
    clips = ("data", "videos", "video", "")

    def sample(self, row: Annotation) -> Sample:
        """One row of the published table; a few videos are not MP4."""
        options, video = strip_letters(row.texts("options")), row.text("videoID")
        return Sample(
            id=row.text("question_id"),
            clip=self.clip(f"{video}.mp4", f"{video}.MP4", f"{video}.mkv"),
            question=format_question(row.text("question"), options, BEFORE, AFTER),
            answer=answer_letter(row, "answer", options),
            family=row.text("duration"),
            options=options,
            use=Use.BOTH,
        )
