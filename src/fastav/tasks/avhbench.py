"""AVHBench: audio-visual hallucination. Does a model hear what it only sees, or see what it only hears?"""

import re
from collections.abc import Sequence
from functools import cached_property

from fastav.request import Use
from fastav.task import Grade, GradedAnswer, Sample
from fastav.tasks._annotations import Annotation
from fastav.tasks._captions import CiderD
from fastav.tasks._published import PublishedTask

YES_NO = ("Audio-driven Video Hallucination", "Video-driven Audio Hallucination", "AV Matching")
CAPTIONS = "AV Captioning"


class AVHBenchTask(PublishedTask):
    """The two hallucination tasks and the matching task, answered yes or no, and captioning; families are the four
    tasks.

    It reads the file of all questions, or one file per video (AVHBench v0). Captions are graded by CIDEr-D. METEOR,
    which needs WordNet, and GAVIE, which needs GPT-4, are left out.

    Source: Sung-Bin et al., arXiv:2410.18325, section 5.
    """

    name = "avhbench"
    source = "https://arxiv.org/abs/2410.18325"
    annotations = ("json/*", "qa", "QA")
    clips = ("video", "videos", "")

    def sample(self, row: Annotation) -> Sample:
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
        """For yes and no, 1 if the first word of the answer is correct; for a caption, CIDEr-D divided by 10."""
        if sample.family == CAPTIONS:
            return Grade(self._cider.score(text, sample.answer) / 10, parsed=bool(text.strip()))
        is_yes = parse_yes_no(text)
        return Grade(0, parsed=False) if is_yes is None else Grade(int(is_yes == (sample.answer == "Yes")))

    def metrics(self, answers: Sequence[GradedAnswer]) -> dict[str, float | int]:
        """For yes and no: accuracy, `precision`, `recall` and `f1` of yes, and `yes`, the share of yes among all
        answers.

        An unparsed answer is neither yes nor no. For captions alone: `cider_d`, its `stderr`, `n` and `unparsed`; in a
        mix with other families, captions are ignored.
        """
        yes_no_answers = [answer for answer in answers if answer[0].family != CAPTIONS]
        if yes_no_answers:
            return {**super().metrics(yes_no_answers), **_yes_no(yes_no_answers)}
        statistics = super().metrics(answers)
        return {"cider_d": 10 * statistics.pop("accuracy"), **statistics, "stderr": 10 * statistics["stderr"]}

    @cached_property
    def _cider(self) -> CiderD:
        """CIDEr-D with the corpus of all reference captions."""
        return CiderD([sample.answer for sample in self.samples() if sample.family == CAPTIONS])


def parse_yes_no(text: str) -> bool | None:
    """Whether the first word of the answer is yes; None if it is neither yes nor no."""
    match = re.match(r"\W*(yes|no)\b", text, re.IGNORECASE)
    return None if match is None else match[1].lower() == "yes"


def _yes_no(answers: Sequence[GradedAnswer]) -> dict[str, float | int]:
    pairs = [(parse_yes_no(text), sample.answer == "Yes") for sample, text, _ in answers]
    n_said_yes = sum(yes is True for yes, _ in pairs)
    n_true = sum(label for _, label in pairs)
    n_both = sum(yes is True and label for yes, label in pairs)
    return {
        "precision": n_both / n_said_yes if n_said_yes else 0.0,
        "recall": n_both / n_true if n_true else 0.0,
        "f1": 2 * n_both / (n_said_yes + n_true) if n_said_yes + n_true else 0.0,
        "yes": n_said_yes / len(pairs),
    }
