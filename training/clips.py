"""Write the clips of the package and their questions: `python -m training.clips`."""

import json
from importlib.resources import files
from pathlib import Path

import numpy as np

from fastav.world import LONG_SECONDS, SECONDS, Question, Scene, ask, caption, kinds, write

FOLDER = Path(str(files("fastav"))) / "assets" / "clips"
SEEDS = {"triangle": 18, "silence": 4, "knock": 26, "mismatch": 42, "half-minute": 2}
LONG = ("half-minute",)  # for tiny-long


def main() -> None:
    """Write all clips and `questions.json`. The model was trained on none of these scenes."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    told = {}
    for name, seed in SEEDS.items():
        rng, seconds = np.random.default_rng(seed), LONG_SECONDS if name in LONG else SECONDS
        scene = Scene.draw(rng, held_out=True, seconds=seconds)
        write(scene, FOLDER / f"{name}.mp4")
        print(name, caption(scene), scene.picture.objects, scene.picture.rest, scene.sound.knock)
        told[f"{name}.mp4"] = [_entry(ask(kind, scene, rng)) for kind in kinds(seconds)]
    (FOLDER / "questions.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _entry(question: Question) -> dict[str, str]:
    return {"family": question.family, "question": question.text, "answer": question.answer}


if __name__ == "__main__":
    main()
