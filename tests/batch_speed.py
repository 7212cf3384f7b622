"""Answers a second of `Pipeline.map` on the embedded model, by batch, beside one question at a time.

    OMP_NUM_THREADS=1 PYTHONPATH=src python tests/batch_speed.py

Questions of every kind about clips of the toy world in files, of which both tracks, the video or the sound are shown by
turns. All ways take turns, so that a busy machine slows them alike; the ratios are those within a round. CPU time, of
all threads together, tells what was saved even where other work takes the cores; it does not show what ran at once.
"""

import json
import time
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch

import fastav
from fastav import world
from fastav.adapter import Request, Use
from fastav.media import Clip
from fastav.pipelines import Pipeline
from fastav.provenance import provenance

BATCHES = (1, 2, 4, 8)


def requests(folder: Path, scenes: int) -> list[Request]:
    made, uses = [], cycle((Use.BOTH, Use.VIDEO, Use.AUDIO))
    for number in range(scenes):
        rng = np.random.default_rng((2601, number))
        scene = world.Scene.draw(rng, held_out=True)
        world.write(scene, folder / f"{number}.mp4")
        clip = Clip.open(folder / f"{number}.mp4")
        for kind in world.kinds(world.SECONDS):
            made.append(Request(clip=clip, question=world.ask(kind, scene, rng).text, use=next(uses)))
    order = np.random.default_rng(0).permutation(len(made))
    return [made[place] for place in order]


def one_by_one(pipe: Pipeline, asked: Sequence[Request]) -> list[str]:
    return [pipe.engine.generate([request], pipe.plan)[0].text for request in asked]


def in_batches(pipe: Pipeline, asked: Sequence[Request], batch: int) -> list[str]:
    found = dict(pipe.map(iter(asked), batch=batch))
    return [getattr(found[place], "text", "failed") for place in range(len(asked))]


def seconds(work: Callable[[], list[str]], expected: list[str]) -> tuple[float, float]:
    """Of the clock, and of all processors."""
    start, busy = time.perf_counter(), time.process_time()
    found = work()
    took = time.perf_counter() - start, time.process_time() - busy
    assert found == expected, "batched answers differ"
    return took


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    pipe = fastav.pipeline(device="cpu")
    with TemporaryDirectory() as folder:
        asked = requests(Path(folder), options.scenes)
        expected = one_by_one(pipe, asked)
        ways = {"one by one": partial(one_by_one, pipe, asked)}
        ways |= {f"batch {batch}": partial(in_batches, pipe, asked, batch) for batch in BATCHES}
        took: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for number in range(options.rounds):
            turn = number % len(ways)
            for name in (*list(ways)[turn:], *list(ways)[:turn]):
                took[name].append(seconds(ways[name], expected))
    print(json.dumps(provenance(torch.device("cpu"))))
    print(f"{len(asked)} questions, {options.rounds} rounds; medians")
    for name, times in took.items():
        row = f"{name:12}"
        for which, unit in enumerate(("answers/s", "answers/CPU s")):
            mine = [one[which] for one in times]
            ratio = median(base[which] / own for base, own in zip(took["one by one"], mine, strict=True))
            row += f"{len(asked) / median(mine):8.1f} {unit} {ratio:5.2f} x"
        print(row)


if __name__ == "__main__":
    main()
