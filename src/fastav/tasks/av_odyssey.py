"""AV-Odyssey Bench: multiple choice about attributes of sound, with pictures or a video."""

from fastav.request import Use
from fastav.task import Sample
from fastav.tasks._annotations import Annotation
from fastav.tasks._choices import ChoiceTask, answer_letter, format_question, strip_letters

WORDS = {"[audio1]": "the audio", "[img1]": "the image", "[video1]": "the video"}


class AVOdysseyTask(ChoiceTask):
    """The questions about one sound and one picture or video, by the seven attributes of sound.

    Source: Gong et al., arXiv:2412.02611, section 4. Deviation: questions about several sounds or pictures are left
    out, because a request is about one clip. The sound and the picture come before the text, which refers to them where
    the benchmark would insert them. A picture is a video of one frame.
    """

    name = "av-odyssey"
    source = "https://arxiv.org/abs/2412.02611"
    annotations = ("av_odyssey",)
    clips = ("",)

    def sample(self, row: Annotation) -> Sample | None:
        """One row of av_odyssey.parquet; None if it is about several files of a kind."""
        kind = "image_path" if "image" in row.text("data_type") else "video_path"
        files = row.optional_texts(kind), row.optional_texts("audio_path")
        if not all(files):
            raise row.error(f"{kind!r} and 'audio_path' must name files")
        if max(map(len, files)) > 1:
            return None
        (picture,), (sound,) = files
        options = strip_letters(row.texts("options"))
        question = format_question(row.text("question"), options)
        for tag, word in WORDS.items():
            question = question.replace(tag, word)
        return Sample(
            id=row.text("question_id"),
            clip=self.clip(picture),
            sound=self.clip(sound),
            question=question,
            answer=answer_letter(row, "answer", options),
            family=row.text("subfield"),
            options=options,
            use=Use.BOTH,
        )
