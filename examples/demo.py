"""The demo, `make demo`: questions about a 32 s clip with sound, answered unpruned and pruned, side by side."""

import os
import sys
from importlib.resources import files
from pathlib import Path

from fastav.cli import main

CLIP = os.path.relpath(Path(str(files("fastav") / "assets" / "clips" / "half-minute.mp4")))
QUESTIONS = ("which shape fits the sound?", "how many beeps are there?")
OPTIONS = ("--model", "tiny-long", "--plan", "fastav,fastav-plus", "--compare")

if __name__ == "__main__":
    print("The embedded model knows nothing but its toy world: coloured shapes that move, and beeps.", flush=True)
    for question in QUESTIONS:
        print(f"\n$ fastav run {CLIP} '{question}' {' '.join(OPTIONS)}\n", flush=True)
        if code := main(["run", CLIP, question, *OPTIONS]):
            sys.exit(code)
