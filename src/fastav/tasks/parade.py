"""The parade: questions about things that pass and sounds that come and go, for the embedded model."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from fastav.parade import KINDS, SECONDS, Scene, ask, clip, facts
from fastav.request import Use
from fastav.task import Grade, Sample, Task

CAPTION_TOKENS = 80  # the longest caption has five things and five sounds


class ParadeTask(Task):
    """One question of every kind about each of some held-out scenes, by family.

    The id of a sample says which scene and kind it is, and where its evidence is: `12-colour-early-video`.
    A one-word answer is correct if it equals the word; case and punctuation around it are ignored. The score of a
    caption is the share of its facts that are correct and belong to the right event; a fact too many counts as wrong.
    """

    name = "parade"
    source = "docs/parade.md"
    needs_folder = False
    seconds: ClassVar[int] = SECONDS

    def __init__(self, folder: Path | None = None, *, scenes: int = 100, seed: int = 2602) -> None:
        """folder: ignored; nothing is read from disk."""
        super().__init__(folder)
        self.scenes, self.seed = scenes, seed

    def samples(self) -> Iterator[Sample]:
        """The samples; questions about the same scene follow each other and share one clip in memory."""
        for number in range(self.scenes):
            rng = np.random.default_rng((self.seed, number))
            scene = Scene.draw(rng, self.seconds, held_out=True)
            parade_clip = clip(scene, name=f"parade-{number}")
            for kind, family in KINDS.items():
                question = ask(kind, scene, rng)
                if question is None:
                    continue
                yield Sample(
                    id=f"{number}-{kind}-{question.third}-{question.modality}",
                    clip=parade_clip,
                    question=question.text,
                    answer=question.answer,
                    family=family,
                    use=Use.BOTH,
                    max_new_tokens=CAPTION_TOKENS if family == "caption" else 4,
                )

    def grade(self, sample: Sample, text: str) -> Grade:
        """1 or 0 for one word, the share of correct facts for a caption; not parsed if the answer has no word."""
        answer = re.findall(r"\w+", text.lower())
        if sample.family != "caption":
            return Grade(int(answer == [sample.answer]), parsed=bool(answer))
        told, expected = facts(text), facts(sample.answer)
        right = sum(told.get(fact) == word for fact, word in expected.items())
        return Grade(right / len(told | expected), parsed=bool(answer))
