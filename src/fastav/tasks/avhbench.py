"""AVHBench: does a model hear what it only sees, or see what it only hears?"""

import re
from collections.abc import Sequence
from functools import cached_property

from fastav.adapter import Use
from fastav.task import Grade, Graded, Sample
from fastav.tasks._annotations import Row
from fastav.tasks._captions import CiderD
from fastav.tasks._published import PublishedTask

YES_NO = ("Audio-driven Video Hallucination", "Video-driven Audio Hallucination", "AV Matching")
CAPTIONS = "AV Captioning"


class AVHBenchTask(PublishedTask):
    """Both tasks of hallucination and that of matching, answered yes or no, and captions; families are the four tasks.

    Reads the file of all questions, or one file for each video (AVHBench v0). Captions are graded by CIDEr-D; METEOR,
    which needs WordNet, and GAVIE, which needs GPT-4, are left out.

    Source: Sung-Bin et al., arXiv:2410.18325, section 5.
    """

    name = "avhbench"
    source = "https://arxiv.org/abs/2410.18325"
    annotations = ("json/*", "qa", "QA")
    clips = ("video", "videos", "")

    def sample(self, row: Row) -> Sample:
        """One question about a video."""
        video, family, label = row.text("video_id"), row.text("task"), row.text("label")
        if family not in (*YES_NO, CAPTIONS):
            raise row.error(f"'task' must be one of {', '.join((*YES_NO, CAPTIONS))}, got {family!r}")
        if family != CAPTIONS and label not in ("Yes", "No"):
            raise row.error(f"'label' must be Yes or No, got {label!r}")
        question = row.text("text") + ("" if family == CAPTIONS else "\nAnswer with yes or no.")
        return Sample(
            id=f"{video}-{row.number}",
            clip=self.clip(f"{video}.mp4"),
            question=question,
            answer=label,
            family=family,
            use=Use.BOTH,
            max_new_tokens=64 if family == CAPTIONS else 16,
        )

    def grade(self, sample: Sample, text: str) -> Grade:
        """1 for the right one of yes and no, the first word of the answer; a caption's CIDEr-D over 10."""
        if sample.family == CAPTIONS:
            return Grade(self._cider.score(text, sample.answer) / 10, parsed=bool(text.strip()))
        said = said_yes(text)
        return Grade(0, parsed=False) if said is None else Grade(int(said == (sample.answer == "Yes")))

    def metrics(self, graded: Sequence[Graded]) -> dict[str, float | int]:
        """Of yes and no: accuracy, `precision`, `recall` and `f1` of yes, and `yes`, the share of it among all answers.

        An unparsed answer is neither yes nor no. Captions alone: `cider_d`, its `stderr`, `n` and `unparsed`; among
        others they are passed over.
        """
        asked = [one for one in graded if one[0].family != CAPTIONS]
        if asked:
            return {**super().metrics(asked), **_yes_no(asked)}
        found = super().metrics(graded)
        return {"cider_d": 10 * found.pop("accuracy"), **found, "stderr": 10 * found["stderr"]}

    @cached_property
    def _cider(self) -> CiderD:
        """CIDEr-D as the corpus of all reference captions makes it."""
        return CiderD([sample.answer for sample in self.samples() if sample.family == CAPTIONS])


def said_yes(text: str) -> bool | None:
    """Whether the answer's first word is yes or no; None if it is neither."""
    match = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
    return None if match is None else match[1].lower() == "yes"


def _yes_no(graded: Sequence[Graded]) -> dict[str, float | int]:
    answers = [(said_yes(text), sample.answer == "Yes") for sample, text, _ in graded]
    said = sum(yes is True for yes, _ in answers)
    true = sum(label for _, label in answers)
    both = sum(yes is True and label for yes, label in answers)
    return {
        "precision": both / said if said else 0.0,
        "recall": both / true if true else 0.0,
        "f1": 2 * both / (said + true) if said + true else 0.0,
        "yes": said / len(answers),
    }
