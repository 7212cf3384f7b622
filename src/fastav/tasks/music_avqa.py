"""MUSIC-AVQA: questions about musical performances with one-word answers."""

import re

from fastav.request import Use
from fastav.task import Grade, Sample
from fastav.tasks._annotations import Annotation
from fastav.tasks._published import PublishedTask


class MusicAVQATask(PublishedTask):
    """The test split, by the nine question types ("Audio-Visual Counting").

    An answer is correct if it equals the annotated word; case and full stops at the end are ignored, as in the
    evaluation of VideoLLaMA2. Source: Li et al., "Learning to Answer Questions in Dynamic Audio-Visual Scenarios", CVPR
    2022.
    """

    name = "music-avqa"
    source = "https://arxiv.org/abs/2203.14072"
    annotations = (
        "data/json_update/avqa-test",
        "data/json/avqa-test",
        "json_update/avqa-test",
        "json/avqa-test",
        "avqa-test",
    )
    clips = ("data/video", "videos", "video", "")

    def sample(self, row: Annotation) -> Sample:
        """One row of avqa-test.json; placeholders such as "<Object>" in the question are filled with the template's
        values.
        """
        question = _fill_template(row)
        return Sample(
            id=row.text("question_id"),
            clip=self.clip(row.text("video_id") + ".mp4"),
            question=f"{question}\nAnswer with a single word; spell numbers out.",
            answer=row.text("anser"),  # sic
            family=" ".join(row.json_list("type")),
            use=Use.BOTH,
        )

    def grade(self, sample: Sample, text: str) -> Grade:
        """1 for the annotated word, else 0; not parsed if the answer is empty."""
        answer = _normalize(text)
        return Grade(int(answer == _normalize(sample.answer)), parsed=bool(answer))


def _fill_template(row: Annotation) -> str:
    template, values = row.text("question_content"), row.json_list("templ_values")
    slots = re.findall(r"<[^<>]*>", template)
    if len(slots) > len(values):
        raise row.error(f"{len(slots)} slots in {template!r} and {len(values)} values for them")
    remaining = iter(values)
    return re.sub(r"<[^<>]*>", lambda _: next(remaining), template)


def _normalize(answer: str) -> str:
    return answer.strip().upper().rstrip(" .")
