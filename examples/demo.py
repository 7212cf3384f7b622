"""Answer questions about a clip with sound, unpruned and with FastAV, side by side: `make demo`."""

import os
import sys
from importlib.resources import files
from pathlib import Path

from fastav.cli import main

CLIP = os.path.relpath(Path(str(files("fastav") / "assets" / "clips" / "triangle.mp4")))
QUESTIONS = ("which shape moves?", "how many beeps are there?")

if __name__ == "__main__":
    print("The embedded model knows nothing but its toy world: coloured shapes that move, and beeps.", flush=True)
    for question in QUESTIONS:
        print(f"\n$ fastav run {CLIP} '{question}' --compare\n", flush=True)
        if code := main(["run", CLIP, question, "--compare"]):
            sys.exit(code)
