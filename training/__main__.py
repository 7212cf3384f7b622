"""Train the embedded model: `make train-tiny`."""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from fastav.files import atomic_write
from fastav.models.tiny import FastAVTinyForConditionalGeneration
from fastav.world import LONG_SECONDS, SECONDS
from training.data import Bank, Labelled
from training.decoder import Lessons, Shown
from training.encoders import accuracy, features, teach
from training.model import for_long_clips, lengthened, untrained

BANK, TEST_BANK = 6000, 400
LONG_BANK, LONG_TEST_BANK = 800, 60
TEST_SCENES, LONG_TEST_SCENES = 60, 20
EVERY, LOOK = 60, 300  # steps between checkpoints, and between evaluations on held-out clips


def main() -> None:
    """Train, resuming from the last checkpoint if there is one, and save the model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("build/tiny"), help="checkpoints; delete to start afresh")
    parser.add_argument("--out", type=Path, default=Path("build/tiny/model"), help="where the model is saved")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = untrained(options.seed)
    model.to(device)
    seeds = 2 * options.seed, 2 * options.seed + 1
    banks = [
        Bank.draw(BANK, seeds[0]),
        Bank.draw(LONG_BANK, seeds[0], LONG_SECONDS),
        Bank.draw(TEST_BANK, seeds[1]),
        Bank.draw(LONG_TEST_BANK, seeds[1], LONG_SECONDS),
    ]
    made = _encoders(model, banks, options.work / "encoders.pt", options.seed)
    shown, long, test, long_test = (Shown(bank, *both) for bank, both in zip(banks, made, strict=True))
    lessons = Lessons(model, processor, shown, long, options.seed)
    kept = options.work / "decoder.pt"
    if kept.exists():
        lessons.resume(torch.load(kept, map_location=device))

    def pause() -> None:
        _save(kept, lessons.state())
        if lessons.step % LOOK and lessons.step < lessons.steps:
            return
        for name, (held_out, scenes) in {"short": (test, TEST_SCENES), "long": (long_test, LONG_TEST_SCENES)}.items():
            right = lessons.right(held_out, scenes)
            told = ", ".join(f"{kind} {share:.2f}" for kind, share in right)
            print(f"held out, {name} clips: {told}", flush=True)

    lessons.run(EVERY, pause)
    model.half().save_pretrained(options.out)
    processor.save_pretrained(options.out)
    for_long_clips(options.out, options.out.with_name(f"{options.out.name}-long"))
    print(f"saved in {options.out}")


def _encoders(
    model: FastAVTinyForConditionalGeneration, banks: list[Bank], kept: Path, seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Train the encoders on the first two banks, unless `kept` exists; return the features of every bank's clips."""
    if not kept.exists():
        scheme = model.config.scheme
        rendered = [Labelled.of(bank, scheme if bank.seconds == SECONDS else lengthened(scheme)) for bank in banks]
        heads = teach(model.model, *rendered[:2], seed)
        made = [features(model.model, bank) for bank in rendered]
        for name, number in {"short": 2, "long": 3}.items():
            read = accuracy(model.model, rendered[number], heads, *made[number])
            told = ", ".join(f"{what} {share:.3f}" for what, share in read)
            print(f"held out, {name} clips: {told}", flush=True)
        _save(kept, {"model": model.state_dict(), "features": made})
    saved = torch.load(kept, map_location=model.device)
    model.load_state_dict(saved["model"])
    return saved["features"]


def _save(path: Path, what: dict[str, object]) -> None:
    """Write the whole file, or nothing."""
    with atomic_write(path) as part:
        torch.save(what, part)


if __name__ == "__main__":
    main()
