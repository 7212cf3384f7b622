"""A task of a few questions about the clip and the sound of the reference, some of which can be made to fail.

TASKS._plugins["little"] = ENTRY
"""

import os
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

from fastav.task import Grade, Sample, Task

REFERENCE = Path(__file__).parents[1] / "reference" / "videollama2"
ENTRY = EntryPoint("little", "support.little_task:LittleTask", "fastav.tasks")


class Deadly(Sample):
    """Ends the process that reads it, as a system without memory does."""

    def request(self):
        os._exit(7)


class LittleTask(Task):
    name = "little"
    source = "these tests"
    needs_folder = False

    def samples(self) -> Iterator[Sample]:
        for number in range(int(os.environ.get("LITTLE_SAMPLES", "4"))):
            sound = number % 2 == 1
            yield Sample(
                id=str(number),
                clip=REFERENCE / ("sound.wav" if sound else "clip.mp4"),
                question=f"How many, if not {number}?",
                answer="ab"[sound],
                family="sound" if sound else "clip",
                max_new_tokens=2,
            )
        if "LITTLE_DEADLY" in os.environ:
            yield Deadly(id="deadly", clip=Path(), question="?", answer="?", family="clip")
        for number in range(2 * ("LITTLE_CUT" in os.environ)):
            yield Sample(
                id=f"cut{number}", clip=Path(os.environ["LITTLE_CUT"]), question="?", answer="?", family="clip"
            )
        if "LITTLE_EMPTY" in os.environ:
            yield Sample(id="empty", clip=REFERENCE / "clip.mp4", question=" ", answer="?", family="clip")
        if "LITTLE_BROKEN" in os.environ:
            yield Sample(id="broken", clip=REFERENCE / "no.mp4", question="?", answer="?", family="clip")

    def grade(self, sample: Sample, text: str) -> Grade:
        return Grade(float(len(text) % 2), parsed=bool(text))

    def metrics(self, graded) -> dict:
        return super().metrics(graded) | {"length": sum(len(text) for _, text, _ in graded) / len(graded)}
