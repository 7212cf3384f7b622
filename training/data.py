"""Banks of pictures and sounds, their recombination into scenes, and batches of questions about these."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastav.models.videollama2 import Scheme, VideoLlama2Processor, sample_frames, soundtrack_features
from fastav.world import SECONDS, Picture, Scene, Sound, ask, frames, waveform
from fastav.world.render import FPS
from fastav.world.scene import FITS, TIMBRES
from training.labels import heard, seen

FACTS = ("colour", "shape", "direction", "timbre", "pitch", "count", "rest", "knock")
LONG = ("fits", "sound-of", "shape-of", "hear", "when", "when", "see", "see", "is")
WEIGHTS = {"fits": 2.0, "see": 2.0, "count": 1.5, "caption": 0.5}
CAPTIONS = 0.4  # share of scenes with a question for a caption
END_WEIGHT = 0.2  # of the end token of an answer, which is learned early


@dataclass(frozen=True, slots=True)
class Bank:
    """Pictures and sounds of one length; any pair makes a scene."""

    pictures: list[Picture]
    sounds: list[Sound]

    @classmethod
    def draw(cls, size: int, seed: int, seconds: int = SECONDS) -> "Bank":
        """Draw `size` pictures and `size` sounds."""
        rng = np.random.default_rng(seed)
        pictures = [Picture.draw(rng, seconds) for _ in range(size)]
        return cls(pictures, [Sound.draw(rng, None, seconds) for _ in range(size)])

    @property
    def seconds(self) -> int:
        """The length of every clip in seconds."""
        return self.pictures[0].seconds

    def scenes(self, count: int, rng: np.random.Generator, *, held_out: bool) -> list[tuple[int, int]]:
        """Draw scenes of one split, as indices of picture and sound. The sound fits the shape in about half of them."""
        by_timbre = [
            [number for number, sound in enumerate(self.sounds) if sound.timbre == timbre and not sound.silent]
            for timbre in TIMBRES
        ]
        found = []
        while len(found) < count:
            picture = int(rng.integers(len(self.pictures)))
            fitting = by_timbre[TIMBRES.index(FITS[self.pictures[picture].shape])]
            sound = int(rng.choice(fitting) if rng.random() < 1 / 3 else rng.integers(len(self.sounds)))
            if Scene(self.pictures[picture], self.sounds[sound]).held_out == held_out:
                found.append((picture, sound))
        return found


@dataclass(frozen=True, slots=True)
class Labelled:
    """A bank as inputs of the encoders, with the labels of its tokens.

    frames: uint8 [pictures, frames, side, side, 3]. fbanks: [sounds, rows, bins]. objects, motions: [pictures, video
    tokens]. noises, starts: [sounds, audio tokens].
    """

    frames: Tensor
    fbanks: Tensor
    objects: Tensor
    motions: Tensor
    noises: Tensor
    starts: Tensor

    @classmethod
    def of(cls, bank: Bank, scheme: Scheme) -> "Labelled":
        """Render all sounds, and the frames that the processor would sample."""
        which = sample_frames(bank.seconds * FPS, scheme.num_frames, scheme.most_frames)
        looks = [seen(picture, (which + 0.5) / FPS, scheme) for picture in bank.pictures]
        noises = [heard(sound, scheme) for sound in bank.sounds]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the many operations are too small for several threads
        fbanks = [soundtrack_features(waveform(sound), scheme)[0].bfloat16() for sound in bank.sounds]
        torch.set_num_threads(threads)
        return cls(
            frames=torch.from_numpy(np.stack([frames(picture, which) for picture in bank.pictures])),
            fbanks=torch.stack(fbanks),
            objects=torch.from_numpy(np.stack([look.what for look in looks])),
            motions=torch.from_numpy(np.stack([look.motion for look in looks])),
            noises=torch.from_numpy(np.stack([noise.what for noise in noises])),
            starts=torch.from_numpy(np.stack([noise.starts for noise in noises])),
        )


def pixels(shown: Tensor) -> Float[Tensor, "videos frames 3 side side"]:
    """Normalize uint8 frames of the model's size, as `pixel_values` does."""
    return ((shown.float() * (1 / 255)) - 0.5).div(0.5).permute(0, 1, 4, 2, 3)


@dataclass(frozen=True, slots=True)
class Batch:
    """Scenes, each with several questions packed after it that do not see each other.

    pictures, sounds: indices in the bank. ids, positions: of all tokens after the clip. sees: which of these tokens
    each token attends to. targets, weights: the next token, and its weight in the loss. questions: for each token that
    predicts a token of an answer, the question's index in the list of kinds; otherwise -1.
    """

    pictures: Tensor
    sounds: Tensor
    ids: Int[Tensor, "scenes tokens"]
    positions: Int[Tensor, "scenes tokens"]
    sees: Bool[Tensor, "scenes tokens tokens"]
    targets: Int[Tensor, "scenes tokens"]
    weights: Float[Tensor, "scenes tokens"]
    questions: Int[Tensor, "scenes tokens"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A phase of the training.

    asked: kinds of questions about every scene; `facts` random kinds of facts, and captions of two scenes in five, come
    in addition. peak: highest learning rate, as a share of the full one. held: share of the steps before the rate
    falls. long: whether every second step uses long clips.
    """

    steps: int
    asked: tuple[str, ...]
    facts: int
    peak: float | int
    held: float | int
    long: bool = False

    def kinds(self, rng: np.random.Generator, seconds: int) -> list[str]:
        """Draw the kinds of questions about one scene."""
        if seconds > SECONDS:
            facts = rng.choice([fact for fact in FACTS if fact != "rest"], 4, replace=False)
            return [*LONG, *map(str, facts), "caption"]
        if not self.facts:
            return list(self.asked)
        facts = [str(kind) for kind in rng.choice(FACTS, self.facts, replace=False)]
        return [*self.asked, *facts, *(["caption"] if rng.random() < CAPTIONS else [])]


def pack(
    processor: VideoLlama2Processor,
    bank: Bank,
    scenes: list[tuple[int, int]],
    kinds: list[list[str]],
    start: int,
    rng: np.random.Generator,
) -> Batch:
    """Pack questions of these kinds about these scenes. Positions start at `start`, where the clip ends."""
    rows = []
    for (picture, sound), wanted in zip(scenes, kinds, strict=True):
        scene = Scene(bank.pictures[picture], bank.sounds[sound])
        row = []
        for number, kind in enumerate(wanted):
            question = ask(kind, scene, rng)
            row.append((number, kind, prompt_ids(processor, question.text), answer_ids(processor, question.answer)))
        rows.append(row)
    width = max(sum(len(ask) + len(answer) for _, _, ask, answer in row) for row in rows)
    width += -width % 8
    ids, targets, questions = (np.full((len(rows), width), fill) for fill in (0, 0, -1))
    positions, owner = np.full((len(rows), width), start), np.full((len(rows), width), -1)
    weights = np.zeros((len(rows), width), np.float32)
    for row, parts in enumerate(rows):
        at = 0
        for number, kind, asked, answer in parts:
            tokens = [*asked, *answer]
            here = slice(at, at + len(tokens))
            ids[row, here], positions[row, here] = tokens, start + np.arange(len(tokens))
            owner[row, here], targets[row, at : at + len(tokens) - 1] = number, tokens[1:]
            said = slice(at + len(asked) - 1, at + len(tokens) - 1)
            weights[row, said], questions[row, said] = WEIGHTS.get(kind, 1.0), number
            weights[row, said.stop - 1] *= END_WEIGHT
            at += len(tokens)
    causal = np.tri(width, dtype=bool)
    sees = (owner[:, :, None] == owner[:, None]) & causal
    pictures, sounds = np.array(scenes).T
    arrays = (pictures, sounds, ids, positions, sees, targets, weights, questions)
    return Batch(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))


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
