"""Train a small model on one of the worlds: `make train-tiny`, `make train-tiny WORLD=parade SEED=2`."""

import argparse
import json
from pathlib import Path

import torch

from fastav.files import atomic_write
from fastav.models.tiny import FastAVTinyForConditionalGeneration
from training.data import Bank, Labelled
from training.decoder import Lessons, Shown
from training.encoders import accuracy, features, teach
from training.model import for_long_clips, interleaved, lengthened, untrained
from training.parade import Parade
from training.toy import Toy
from training.world import World

WORLDS: dict[str, World] = {"toy": Toy(), "parade": Parade()}
EVERY, LOOK = 60, 300  # steps between checkpoints, and between evaluations on held-out clips


def main() -> None:
    """Train, resuming from the last checkpoint if there is one, and save the model."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--world", choices=WORLDS, default="toy")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--work", type=Path, help="checkpoints; delete to start afresh  [default: of world and seed]")
    parser.add_argument("--out", type=Path, help="where the model is saved  [default: model in --work]")
    options = parser.parse_args()
    world: World = WORLDS[options.world]
    work = options.work or Path("build", world.folder + (f"-seed-{options.seed}" if options.seed != 1 else ""))
    out = options.out or work / "model"
    work.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, processor = untrained(options.seed, world)
    model.to(device)
    made = _encoders(model, world, work / "encoders.pt", options.seed)
    shown, tests = made[: len(world.lengths)], made[len(world.lengths) :]
    lessons = Lessons(model, processor, world, shown, options.seed)
    kept = work / "decoder.pt"
    if kept.exists():
        lessons.resume(torch.load(kept, map_location=device))

    def pause() -> None:
        _save(kept, lessons.state())
        if lessons.step % LOOK == 0 or lessons.step == lessons.steps:
            _report(lessons, tests, work / "accuracy.jsonl")

    lessons.run(EVERY, pause)
    model.half().save_pretrained(out)
    processor.save_pretrained(out)
    for seconds, suffix in list(zip(world.lengths, world.suffixes, strict=True))[1:]:
        for_long_clips(out, out.with_name(out.name + suffix), seconds)
    if world.interleaved:
        for suffix in world.suffixes:
            interleaved(out.with_name(out.name + suffix), out.with_name(f"{out.name}{suffix}-interleaved"))
    print(f"saved in {out}")


def _banks(world: World, seed: int) -> list[Bank]:
    """Banks of every length for training, then for tests."""
    train = [
        Bank.draw(world, size, 2 * seed, seconds) for size, seconds in zip(world.banks, world.lengths, strict=True)
    ]
    test = [
        Bank.draw(world, size, 2 * seed + 1, seconds, held_out=True)
        for size, seconds in zip(world.test_banks, world.lengths, strict=True)
    ]
    return [*train, *test]


def _encoders(model: FastAVTinyForConditionalGeneration, world: World, kept: Path, seed: int) -> list[Shown]:
    """Train the encoders on the banks for training, unless `kept` exists; return the features of every bank's clips."""
    banks = _banks(world, seed)
    schemes = [lengthened(model.config.scheme, bank.seconds) for bank in banks]
    lengths = len(world.lengths)
    if not kept.exists():
        rendered = [  # the video encoder is trained on the frames of the first bank
            Labelled.of(bank, scheme, frames=number == 0)
            for number, (bank, scheme) in enumerate(zip(banks, schemes, strict=True))
        ]
        heads = teach(model.model, world, rendered[:lengths], seed)
        made = [features(model.model, bank) for bank in rendered]
        for bank, labelled, both in list(zip(banks, rendered, made, strict=True))[lengths:]:
            read = accuracy(model.model, world, labelled, heads, *both)
            told = ", ".join(f"{what} {share:.3f}" for what, share in read)
            print(f"held out, {bank.seconds} s: {told}", flush=True)
        words = [world.described(labelled.seen, labelled.heard) for labelled in rendered]
        _save(kept, {"model": model.state_dict(), "features": made, "words": words})
    saved = torch.load(kept, map_location=model.device)
    model.load_state_dict(saved["model"])
    return [
        Shown(bank, scheme, *both, words)
        for bank, scheme, both, words in zip(banks, schemes, saved["features"], saved["words"], strict=True)
    ]


def _report(lessons: Lessons, tests: list[Shown], log: Path) -> None:
    """Print the share of right answers on held-out clips of every length and layout, and add them to `log`."""
    for shown, scenes in zip(tests, lessons.world.test_scenes, strict=True):
        for mixed in (False, True)[: 1 + lessons.world.interleaved]:
            right = lessons.right(shown, scenes, mixed)
            layout = "interleaved" if mixed else "block"
            told = ", ".join(f"{group} {share:.2f}" for group, share in right.items())
            print(f"held out, {shown.bank.seconds} s, {layout}: {told}", flush=True)
            row = {"step": lessons.step, "seconds": shown.bank.seconds, "layout": layout, "right": right}
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def _save(path: Path, what: dict[str, object]) -> None:
    """Write the whole file, or nothing."""
    with atomic_write(path) as part:
        torch.save(what, part)


if __name__ == "__main__":
    main()
