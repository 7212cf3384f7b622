"""The toy world in training: `fastav.world`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import PreTrainedTokenizerBase

from fastav.models.videollama2 import Scheme, VideoLlama2Config
from fastav.world import LONG_SECONDS, SECONDS, Picture, Question, Scene, Sound, ask, frames, kinds, sentences, waveform
from fastav.world.render import FPS
from fastav.world.scene import FITS, TIMBRES
from training.toy_labels import MOTIONS, OBJECTS, SOUNDS, heard, seen
from training.world import IGNORED, Labels, Phase, World, configuration_of

FACTS = ("colour", "shape", "direction", "timbre", "pitch", "count", "rest", "knock")
LONG = ("fits", "sound-of", "shape-of", "hear", "when", "when", "see", "see", "is")
CAPTIONS = 0.4  # share of scenes with a question for a caption
BRIDGES = ("fits", "sound-of", "shape-of")
NOTHING_WEIGHT = 0.15  # of tokens without the centre of an object


class Toy(World):
    """A moving shape and beeps, in clips of 4 and 32 s: `tiny` and `tiny-long`."""

    folder = "tiny"
    lengths = (SECONDS, LONG_SECONDS)
    suffixes = ("", "-long")
    fps = FPS
    banks, test_banks = (6000, 800), (400, 60)
    scenes, test_scenes = (16, 4), (60, 20)
    video_steps, audio_steps = 800, 320
    sounds = (64, 8)
    heads = {"objects": OBJECTS, "motions": MOTIONS}  # noqa: RUF012
    phases = (
        # all facts, and questions that compare two of them
        Phase(steps=240, asked=(*FACTS, "see", "is", "hear", "fits", "caption"), facts=0, peak=1, held=1),
        # what takes long to learn: comparing shape and sound, or question and clip
        Phase(steps=1200, asked=(*BRIDGES, "hear", *("see",) * 4, *("is",) * 3, "rest"), facts=3, peak=0.5, held=0.5),
        # everything, and long clips
        Phase(
            steps=400, asked=(*BRIDGES, "hear", *("see",) * 2, *("is",) * 2), facts=8, peak=0.5, held=0.2, turns=(0, 1)
        ),
    )
    weights = {"fits": 2.0, "see": 2.0, "count": 1.5, "caption": 0.5}  # noqa: RUF012

    def sentences(self) -> Iterator[str]:
        """Sentences that contain every word."""
        return sentences()

    def configuration(self, words: PreTrainedTokenizerBase) -> VideoLlama2Config:
        """Three million parameters. A short clip has 64 video and 72 audio tokens, a long one 512 and 597."""
        return configuration_of(
            words,
            width=128,
            mlp=384,
            heads=4,
            positions=2048,
            seconds=SECONDS,
            frames=8,
            picture={
                "hidden_size": 96,
                "intermediate_size": 192,
                "num_hidden_layers": 2,
                "image_size": 64,
                "patch_size": 8,
            },
            sound={"encoder_layers": 2, "predictor_class": 15},  # classes are used in training only: see toy_labels.py
        )

    def picture(self, rng: np.random.Generator, seconds: int, *, held_out: bool) -> Picture:
        """A random picture; whether a scene is held out depends on both its parts."""
        return Picture.draw(rng, seconds)

    def sound(self, rng: np.random.Generator, seconds: int, *, held_out: bool) -> Sound:
        """A random sound."""
        return Sound.draw(rng, None, seconds)

    def pairs(
        self, pictures: Sequence[Any], sounds: Sequence[Any], count: int, rng: np.random.Generator, *, held_out: bool
    ) -> list[tuple[int, int]]:
        """Draw scenes of one split. The sound fits the shape in about half of them."""
        by_timbre = [
            [number for number, sound in enumerate(sounds) if sound.timbre == timbre and not sound.silent]
            for timbre in TIMBRES
        ]
        found = []
        while len(found) < count:
            picture = int(rng.integers(len(pictures)))
            fitting = by_timbre[TIMBRES.index(FITS[pictures[picture].shape])]
            sound = int(rng.choice(fitting) if rng.random() < 1 / 3 else rng.integers(len(sounds)))
            if Scene(pictures[picture], sounds[sound]).held_out == held_out:
                found.append((picture, sound))
        return found

    def frames(self, picture: Picture, which: np.ndarray) -> np.ndarray:
        """The frames of a picture with these numbers."""
        return frames(picture, which)

    def waveform(self, sound: Sound) -> np.ndarray:
        """The samples of a sound."""
        return waveform(sound)

    def seen(self, picture: Picture, moments: np.ndarray, scheme: Scheme) -> Labels:
        """The object centred in each token, and its motion."""
        looks = seen(picture, moments, scheme)
        return {"objects": looks.what, "motions": looks.motion}

    def heard(self, sound: Sound, scheme: Scheme) -> Labels:
        """The sound of each token, and whether a beep starts there."""
        noises = heard(sound, scheme)
        return {"noises": noises.what, "starts": noises.starts}

    def video_loss(self, logits: Mapping[str, Tensor], labels: Labels) -> Tensor:
        """Objects count most where there are some."""
        weights = torch.ones(OBJECTS, device=logits["objects"].device)
        weights[0] = NOTHING_WEIGHT
        what, moves = (logits[name].float().flatten(0, 1) for name in self.heads)
        objects, motions = (labels[name].flatten().to(what.device) for name in self.heads)
        return cross_entropy(what, objects, weights) + 0.5 * cross_entropy(moves, motions, ignore_index=IGNORED)

    def audio_loss(self, said: Tensor, labels: Labels) -> Tensor:
        """Sounds, and starts of beeps."""
        said = said.float()
        noises, starts = labels["noises"].to(said.device), labels["starts"].to(said.device)
        what = cross_entropy(said[..., :SOUNDS].flatten(0, 1), noises.flatten(), ignore_index=IGNORED)
        return what + binary_cross_entropy_with_logits(said[..., SOUNDS], starts, pos_weight=torch.tensor(3.0))

    def readings(
        self, logits: Mapping[str, Tensor], seen: Labels, said: Tensor, heard: Labels
    ) -> Iterator[tuple[str, float]]:
        """The share of right labels among tokens that show or contain something."""
        readings = {
            "objects": (logits["objects"], seen["objects"], seen["objects"] > 0),
            "motions": (logits["motions"], seen["motions"], seen["motions"] >= 0),
            "sounds": (said[..., :SOUNDS], heard["noises"], heard["noises"] > 0),
        }
        for name, (values, labels, counted) in readings.items():
            yield name, float((values.argmax(-1).cpu() == labels)[counted].float().mean())
        starts = said[..., SOUNDS].cpu() > 0
        yield "starts of beeps", float((starts == heard["starts"].bool())[heard["starts"].bool()].float().mean())

    def kinds(self, phase: Phase, rng: np.random.Generator, seconds: int) -> list[str]:
        """Draw the kinds of questions about one scene; captions about two scenes in five."""
        if seconds > SECONDS:
            facts = rng.choice([fact for fact in FACTS if fact != "rest"], 4, replace=False)
            return [*LONG, *map(str, facts), "caption"]
        if not phase.facts:
            return list(phase.asked)
        facts = [str(kind) for kind in rng.choice(FACTS, phase.facts, replace=False)]
        return [*phase.asked, *facts, *(["caption"] if rng.random() < CAPTIONS else [])]

    def all_kinds(self, seconds: int) -> list[str]:
        """All kinds of questions about clips of this length."""
        return kinds(seconds)

    def ask(self, kind: str, picture: Picture, sound: Sound, rng: np.random.Generator) -> Question:
        """A question of this kind about a scene."""
        return ask(kind, Scene(picture, sound), rng)
