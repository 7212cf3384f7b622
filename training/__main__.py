"""Train the embedded model: `make train-tiny`."""

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor

from fastav.models.tiny import FastAVTinyForConditionalGeneration
from training.data import Bank, Labelled
from training.decoder import Lessons, Shown
from training.encoders import accuracy, features, teach
from training.model import untrained

BANK, TEST_BANK = 6000, 400
TEST_SCENES = 60
EVERY = 60  # steps between checkpoints


def main() -> None:
    """Train from where the last run stopped, and save the model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="checkpoints; delete to start afresh")
    parser.add_argument("--out", type=Path, default=Path("build/tiny/model"), help="where the model is saved")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = untrained(options.seed)
    model.to(device)
    bank, test = Bank.draw(BANK, 2 * options.seed), Bank.draw(TEST_BANK, 2 * options.seed + 1)
    seen, heard = _encoders(model, bank, test, options.work / "encoders.pt", options.seed)
    lessons = Lessons(model, processor, Shown(bank, seen, heard), options.seed)
    kept = options.work / "decoder.pt"
    if kept.exists():
        lessons.resume(torch.load(kept, map_location=device))
    shown = Shown(test, *features(model.model, Labelled.of(test, model.config.scheme)))

    def pause() -> None:
        _save(kept, lessons.state())
        right = dict(lessons.right(shown, TEST_SCENES))
        print("held out:", ", ".join(f"{kind} {share:.2f}" for kind, share in right.items()), flush=True)

    lessons.run(EVERY, pause)
    model.half().save_pretrained(options.out)
    processor.save_pretrained(options.out)
    print(f"saved in {options.out}")


def _encoders(
    model: FastAVTinyForConditionalGeneration, bank: Bank, test: Bank, kept: Path, seed: int
) -> tuple[Tensor, Tensor]:
    """Teach the encoders, unless that has been done; features of the bank's pictures and of its sounds."""
    if not kept.exists():
        scheme = model.config.scheme
        rendered, other = Labelled.of(bank, scheme), Labelled.of(test, scheme)
        heads = teach(model.model, rendered, seed)
        read = accuracy(model.model, other, heads, *features(model.model, other))
        print("held out:", ", ".join(f"{name} {share:.3f}" for name, share in read), flush=True)
        seen, heard = features(model.model, rendered)
        _save(kept, {"model": model.state_dict(), "seen": seen, "heard": heard})
    saved = torch.load(kept, map_location=model.device)
    model.load_state_dict(saved["model"])
    return saved["seen"], saved["heard"]


def _save(path: Path, what: dict[str, object]) -> None:
    """Write a file that is whole or not there."""
    torch.save(what, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


if __name__ == "__main__":
    main()
