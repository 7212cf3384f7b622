"""Answer a question about a real clip twice, unpruned and with FastAV, side by side: `make demo`."""

import os
import sys
from pathlib import Path

from fastav.cli import main

REFERENCE = Path(os.path.relpath(Path(__file__).parents[1] / "tests" / "reference" / "videollama2"))
QUESTION = "What is happening, and what do you hear?"

if __name__ == "__main__":
    print(
        "The weights of this tiny VideoLLaMA2 are random: its words mean nothing, its costs are measured.\n", flush=True
    )
    sys.exit(
        main(
            [
                *("run", str(REFERENCE / "clip.mp4"), QUESTION),
                *("--model", str(REFERENCE), "--compare", "--max-new-tokens", "16"),
            ]
        )
    )
