"""The toy world: questions about a moving shape and beeps, for the embedded model."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from fastav.request import Use
from fastav.task import Grade, Sample, Task
from fastav.world import KINDS, SECONDS, Scene, ask, clip, kinds
from fastav.world.questions import NOTHING, NUMBERS
from fastav.world.scene import COLOURS, DIRECTIONS, PITCHES, SHAPES, TIMBRES

SLOTS = (COLOURS, SHAPES, DIRECTIONS, NUMBERS, PITCHES, (*TIMBRES, NOTHING))
"""The facts of a caption, in their order."""


class ToyWorldTask(Task):
    """One question of every kind about each of some held-out scenes, by family.

    A one-word answer is correct if it equals the word; case and punctuation around it are ignored. The score of a
    caption is the share of its facts (colour, shape, direction, number, pitch, timbre) that are correct.
    """

    name = "toy-world"
    source = "docs/tiny.md"
    needs_folder = False
    seconds: ClassVar[int] = SECONDS

    def __init__(self, folder: Path | None = None, *, scenes: int = 100, seed: int = 2601) -> None:
        """folder: ignored; nothing is read from disk."""
        super().__init__(folder)
        self.scenes, self.seed = scenes, seed

    def samples(self) -> Iterator[Sample]:
        """The samples; questions about the same scene follow each other and share one clip in memory."""
        for number in range(self.scenes):
            rng = np.random.default_rng((self.seed, number))
            scene = Scene.draw(rng, held_out=True, seconds=self.seconds)
            toy_clip = clip(scene, name=f"toy-{number}")
            for kind in kinds(self.seconds):
                question = ask(kind, scene, rng)
                yield Sample(
                    id=f"{number}-{kind}",
                    clip=toy_clip,
                    question=question.text,
                    answer=question.answer,
                    family=KINDS[kind],
                    use=Use.BOTH,
                )

    def grade(self, sample: Sample, text: str) -> Grade:
        """1 or 0 for one word, the share of correct slots for a caption; not parsed if the answer has no word."""
        answer, expected = _words(text), _words(sample.answer)
        if sample.family != "caption":
            return Grade(int(answer == expected), parsed=bool(answer))
        answer_slots, expected_slots = _slots(answer), _slots(expected)
        pairs = [slot for slot in zip(answer_slots, expected_slots, strict=True) if any(slot)]
        return Grade(sum(a == b for a, b in pairs) / len(pairs), parsed=bool(answer))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _slots(words: list[str]) -> list[str | None]:
    """The word that fills each slot; None if no word or several do."""
    matches = [[word for word in words if word in slot] for slot in SLOTS]
    return [words_[0] if len(words_) == 1 else None for words_ in matches]
