"""Banks of pictures and sounds, their recombination into scenes, and batches of questions about these."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from fastav.models.videollama2 import Scheme, VideoLlama2Processor, sample_frames, soundtrack_features
from training.world import Labels, World

END_WEIGHT = 0.2  # of the end token of an answer, which is learned early


@dataclass(frozen=True, slots=True)
class Bank:
    """Pictures and sounds of one length; any pair makes a scene."""

    world: World
    pictures: list[Any]
    sounds: list[Any]
    seconds: int

    @classmethod
    def draw(cls, world: World, size: int, seed: int, seconds: int, *, held_out: bool = False) -> "Bank":
        """Draw `size` pictures and `size` sounds."""
        rng = np.random.default_rng(seed)
        pictures = [world.picture(rng, seconds, held_out=held_out) for _ in range(size)]
        return cls(world, pictures, [world.sound(rng, seconds, held_out=held_out) for _ in range(size)], seconds)

    def scenes(self, count: int, rng: np.random.Generator, *, held_out: bool) -> list[tuple[int, int]]:
        """Draw scenes of one split, as indices of picture and sound."""
        return self.world.pairs(self.pictures, self.sounds, count, rng, held_out=held_out)


@dataclass(frozen=True, slots=True)
class Labelled:
    """A bank as inputs of the encoders, with the labels of its tokens.

    scheme: how its clips become tokens. frames: uint8 [pictures, frames, side, side, 3]; None if they are rendered when
    they are needed. fbanks: [sounds, rows, bins]. seen, heard: labels of all video tokens and of all audio tokens,
    [pictures or sounds, tokens, ...].
    """

    bank: Bank
    scheme: Scheme
    frames: Tensor | None
    fbanks: Tensor
    seen: Labels
    heard: Labels

    @classmethod
    def of(cls, bank: Bank, scheme: Scheme, *, frames: bool = True) -> "Labelled":
        """Render all sounds, and the frames that the processor would sample unless they are left for later."""
        world = bank.world
        which = sampled(bank, scheme)
        seen = [world.seen(picture, (which + 0.5) / world.fps, scheme) for picture in bank.pictures]
        heard = [world.heard(sound, scheme) for sound in bank.sounds]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the many operations are too small for several threads
        fbanks = [soundtrack_features(world.waveform(sound), scheme)[0].bfloat16() for sound in bank.sounds]
        torch.set_num_threads(threads)
        return cls(
            bank=bank,
            scheme=scheme,
            frames=render(bank, scheme, slice(None)) if frames else None,
            fbanks=torch.stack(fbanks),
            seen=_stacked(seen),
            heard=_stacked(heard),
        )


def sampled(bank: Bank, scheme: Scheme) -> Int[np.ndarray, " frames"]:
    """Which of a clip's frames the processor samples."""
    return sample_frames(bank.seconds * bank.world.fps, scheme.num_frames, scheme.most_frames)


def render(bank: Bank, scheme: Scheme, rows: slice) -> UInt8[Tensor, "pictures frames side side 3"]:
    """The sampled frames of some pictures."""
    which = sampled(bank, scheme)
    return torch.from_numpy(np.stack([bank.world.frames(picture, which) for picture in bank.pictures[rows]]))


def _stacked(labels: list[Labels]) -> Labels:
    return {name: torch.from_numpy(np.stack([one[name] for one in labels])) for name in labels[0]}


def pixels(shown: Tensor) -> Float[Tensor, "videos frames 3 side side"]:
    """Normalize uint8 frames of the model's size, as `pixel_values` does."""
    return ((shown.float() * (1 / 255)) - 0.5).div(0.5).permute(0, 1, 4, 2, 3)


@dataclass(frozen=True, slots=True)
class Batch:
    """Scenes, each with several questions packed after it that do not see each other.

    pictures, sounds: indices in the bank. ids, positions: of all tokens after the clip. sees: which of these tokens
    each token attends to. targets, weights: the next token, and its weight in the loss. questions: for each token that
    predicts a token of an answer, the question's index in the list of kinds; otherwise -1. asked: the questions about
    each scene by that index.
    """

    pictures: Tensor
    sounds: Tensor
    ids: Int[Tensor, "scenes tokens"]
    positions: Int[Tensor, "scenes tokens"]
    sees: Bool[Tensor, "scenes tokens tokens"]
    targets: Int[Tensor, "scenes tokens"]
    weights: Float[Tensor, "scenes tokens"]
    questions: Int[Tensor, "scenes tokens"]
    asked: list[dict[int, Any]]


def pack(
    processor: VideoLlama2Processor,
    bank: Bank,
    scenes: list[tuple[int, int]],
    kinds: list[list[str]],
    start: int,
    rng: np.random.Generator,
) -> Batch:
    """Pack questions of these kinds about these scenes. Positions start at `start`, where the clip ends."""
    rows, asked = [], []
    for (picture, sound), wanted in zip(scenes, kinds, strict=True):
        found = [bank.world.ask(kind, bank.pictures[picture], bank.sounds[sound], rng) for kind in wanted]
        asked.append({number: question for number, question in enumerate(found) if question is not None})
        rows.append(
            [
                (number, one.kind, prompt_ids(processor, one.text), answer_ids(processor, one.answer))
                for number, one in asked[-1].items()
            ]
        )
    width = max(sum(len(prompt) + len(answer) for _, _, prompt, answer in row) for row in rows)
    width += -width % 8
    ids, targets, questions = (np.full((len(rows), width), fill) for fill in (0, 0, -1))
    positions, owner = np.full((len(rows), width), start), np.full((len(rows), width), -1)
    weights = np.zeros((len(rows), width), np.float32)
    for row, parts in enumerate(rows):
        at = 0
        for number, kind, prompt, answer in parts:
            tokens = [*prompt, *answer]
            here = slice(at, at + len(tokens))
            ids[row, here], positions[row, here] = tokens, start + np.arange(len(tokens))
            owner[row, here], targets[row, at : at + len(tokens) - 1] = number, tokens[1:]
            said = slice(at + len(prompt) - 1, at + len(tokens) - 1)
            weights[row, said], questions[row, said] = bank.world.weights.get(kind, 1.0), number
            weights[row, said.stop - 1] *= END_WEIGHT
            at += len(tokens)
    causal = np.tri(width, dtype=bool)
    sees = (owner[:, :, None] == owner[:, None]) & causal
    pictures, sounds = np.array(scenes).T
    arrays = (pictures, sounds, ids, positions, sees, targets, weights, questions)
    return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays), asked)


def before(processor: VideoLlama2Processor) -> list[int]:
    """Token ids before the clip."""
    return processor.tokenizer(_around(processor, "")[0], add_special_tokens=False)["input_ids"]


@lru_cache(4096)
def prompt_ids(processor: VideoLlama2Processor, question: str) -> list[int]:
    """Token ids from the clip to the start of the answer."""
    return processor.tokenizer(_around(processor, question)[1], add_special_tokens=False)["input_ids"]


@lru_cache(4096)
def answer_ids(processor: VideoLlama2Processor, answer: str) -> list[int]:
    """Token ids of an answer, with its end token."""
    words = processor.tokenizer
    return [*words(answer, add_special_tokens=False)["input_ids"], words.eos_token_id]


def _around(processor: VideoLlama2Processor, question: str) -> tuple[str, str]:
    front, _, back = processor.prompt(question, video=True, audio=True).partition("<video>")
    return front, back
