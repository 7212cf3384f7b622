"""Answers a second of `Pipeline.map` on the embedded model, by batch size, against one question at a time.

    OMP_NUM_THREADS=1 python -m benchmarks.batches

The questions are of every kind, about clips of the toy world in files; they show both tracks, the video or the sound
in turn. In every round each way to answer runs once, and ratios are taken within a round. CPU time, of all threads
together, shows savings even where other work takes the cores; it does not show what ran in parallel.
"""

import json
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch

import fastav
from fastav import world
from fastav.bench.measure import Quartiles, rotated
from fastav.media import Clip
from fastav.pipelines import Pipeline
from fastav.provenance import provenance
from fastav.request import Request, Use

BATCHES = (1, 2, 4, 8)
BASELINE = "one by one"


def toy_requests(folder: Path, scenes: int) -> list[Request]:
    """Questions of every kind about this many scenes, whose clips are written into the folder; in random order."""
    requests, uses = [], cycle((Use.BOTH, Use.VIDEO, Use.AUDIO))
    for number in range(scenes):
        rng = np.random.default_rng((2601, number))
        scene = world.Scene.draw(rng, held_out=True)
        world.write(scene, folder / f"{number}.mp4")
        clip = Clip.open(folder / f"{number}.mp4")
        for kind in world.kinds(world.SECONDS):
            requests.append(Request(clip=clip, question=world.ask(kind, scene, rng).text, use=next(uses)))
    return [requests[place] for place in np.random.default_rng(0).permutation(len(requests))]


def one_by_one(pipe: Pipeline, requests: Sequence[Request]) -> list[str]:
    """The answers, each generated alone."""
    return [pipe.engine.generate([request], pipe.plan)[0].text for request in requests]


def in_batches(pipe: Pipeline, requests: Sequence[Request], batch: int) -> list[str]:
    """The answers, generated in batches."""
    answers = dict(pipe.map(iter(requests), batch=batch))
    return [getattr(answers[place], "text", "failed") for place in range(len(requests))]


def main() -> None:
    """Measure and print."""
    parser = ArgumentParser(prog="python -m benchmarks.batches", description=__doc__)
    parser.add_argument("--scenes", type=int, default=6, help="clips to ask about (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="(default: %(default)s)")
    options = parser.parse_args()
    pipe = fastav.pipeline(device="cpu")
    with TemporaryDirectory() as folder:
        requests = toy_requests(Path(folder), options.scenes)
        expected = one_by_one(pipe, requests)
        ways = {BASELINE: partial(one_by_one, pipe, requests)}
        ways |= {f"batch {batch}": partial(in_batches, pipe, requests, batch) for batch in BATCHES}
        elapsed: dict[str, list[float]] = {name: [] for name in ways}
        busy: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(options.rounds):
            for name in rotated(list(ways), number):
                start, cpu = time.perf_counter(), time.process_time()
                answers = ways[name]()
                elapsed[name].append(time.perf_counter() - start)
                busy[name].append(time.process_time() - cpu)
                assert answers == expected, "batched answers differ"
    print(json.dumps(provenance(torch.device("cpu"))))
    print(f"{len(requests)} questions, {options.rounds} rounds; medians")
    for name in ways:
        row = f"{name:12}"
        for seconds, unit in ((elapsed, "answers/s"), (busy, "answers/CPU s")):
            ratio = Quartiles.of_ratios(seconds[BASELINE], seconds[name]).median
            row += f"{len(requests) / median(seconds[name]):8.1f} {unit} {ratio:5.2f} x"
        print(row)


if __name__ == "__main__":
    main()
