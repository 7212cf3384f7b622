"""The parade in training: `fastav.parade`."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot
from transformers import PreTrainedTokenizerBase

from fastav.models.videollama2 import Scheme, VideoLlama2Config
from fastav.parade import KINDS, LENGTHS, SECONDS, Picture, Question, Scene, Sound, ask, frames, sentences, waveform
from fastav.parade.questions import NUMBERS
from fastav.parade.render import FPS, SIDE
from fastav.parade.scene import (
    AMBIENCES,
    BACKDROPS,
    COLOURS,
    DIRECTIONS,
    PITCHES,
    SOUNDS,
    THINGS,
    Actor,
    third_of,
)
from training.parade_labels import SIDES, heard, seen
from training.world import IGNORED, Labels, Phase, World, configuration_of

NOTES = len(SOUNDS) * len(PITCHES)
STARTS = NOTES + len(SOUNDS)  # the predictor's outputs: notes, starts of strokes, ambiences
FACTS = tuple(kind for kind in KINDS if kind != "caption")
LOOKUPS = ("colour", "thing", "direction", "side", "strokes", "pitch")
TIMES = ("seen-when", "heard-when", "seen-next", "heard-next", "before", "heard-while", "seen-while")
PROBES = ("see", "hear", "heard-while", "seen-while", "seen-when", "heard-when")
TELL = "tell"  # a kind of question for training alone: all facts of one event, each after the event's name
CAPTIONS = 0.3  # share of scenes with a question for a caption
NOTHING_WEIGHT = 0.1  # of tokens without a thing
SHARES = {"things": 3.0, "backdrops": 0.3}  # of the video encoder's loss: kinds are hard, backdrops easy


class Parade(World):
    """Things that pass before a moving camera and sounds that come and go, in clips of 8, 32 and 64 s."""

    folder = "parade"
    lengths = LENGTHS
    suffixes = ("", "-long", "-minute")
    fps = FPS
    banks, test_banks = (5000, 500, 250), (300, 40, 20)
    scenes, test_scenes = (16, 4, 2), (60, 20, 10)
    video_steps, audio_steps = 2000, 600
    sounds = (32, 8, 4)
    heads = {  # noqa: RUF012
        "things": 1 + len(THINGS),
        "colours": len(COLOURS),
        "directions": len(DIRECTIONS),
        "sides": len(SIDES),
        "backdrops": len(BACKDROPS),
    }
    phases = (
        # facts of one event, whose words the tokens of the clip are taught
        Phase(
            steps=400,
            asked=("caption", *(TELL,) * 6, *LOOKUPS, *LOOKUPS, *PROBES),
            facts=3,
            peak=1,
            held=1,
            aligned=0.3,
        ),
        # when and in which order
        Phase(steps=800, asked=(*TIMES, "see", "hear", TELL), facts=8, peak=0.5, held=0.6),
        # everything, and long clips
        Phase(steps=500, asked=(*TIMES, "see", "hear"), facts=8, peak=0.5, held=0.2, turns=(0, 1, 0, 2)),
    )
    noise = 0.1
    interleaved = True
    matching = True
    align_words = (*THINGS, *COLOURS, *DIRECTIONS, *SIDES, *SOUNDS, *PITCHES)

    def sentences(self) -> Iterator[str]:
        """Sentences that contain every word."""
        return sentences()

    def configuration(self, words: PreTrainedTokenizerBase) -> VideoLlama2Config:
        """Six million parameters. A clip of 8 s has 128 video and 147 audio tokens, one of 64 s 1,024 and 1,197."""
        return configuration_of(
            words,
            width=192,
            mlp=512,
            heads=6,
            positions=4096,
            seconds=SECONDS,
            frames=2 * SECONDS,
            picture={
                "hidden_size": 128,
                "intermediate_size": 256,
                "num_hidden_layers": 3,
                "image_size": SIDE,
                "patch_size": 12,
            },
            # classes are used in training only: see parade_labels.py
            sound={"encoder_layers": 3, "predictor_class": STARTS + len(AMBIENCES)},
        )

    def picture(self, rng: np.random.Generator, seconds: int, *, held_out: bool) -> Picture:
        """A random picture of this split."""
        return Picture.draw(rng, seconds, held_out=held_out)

    def sound(self, rng: np.random.Generator, seconds: int, *, held_out: bool) -> Sound:
        """A random sound of this split."""
        return Sound.draw(rng, seconds, held_out=held_out)

    def pairs(
        self, pictures: Sequence[Any], sounds: Sequence[Any], count: int, rng: np.random.Generator, *, held_out: bool
    ) -> list[tuple[int, int]]:
        """Draw any pairs: a bank is of one split."""
        assert pictures[0].held_out == sounds[0].held_out == held_out
        chosen = rng.integers((len(pictures), len(sounds)), size=(count, 2))
        return [(int(picture), int(sound)) for picture, sound in chosen]

    def frames(self, picture: Picture, which: np.ndarray) -> np.ndarray:
        """The frames of a picture with these numbers."""
        return frames(picture, which)

    def waveform(self, sound: Sound) -> np.ndarray:
        """The samples of a sound."""
        return waveform(sound)

    def seen(self, picture: Picture, moments: np.ndarray, scheme: Scheme) -> Labels:
        """The thing that each token shows, with its facts, or the backdrop."""
        return seen(picture, moments, scheme)

    def heard(self, sound: Sound, scheme: Scheme) -> Labels:
        """The sounds of each token, where strokes start, and the ambience."""
        return heard(sound, scheme)

    def video_loss(self, logits: Mapping[str, Tensor], labels: Labels) -> Tensor:
        """Things count most where there are some."""
        losses = []
        for name, values in logits.items():
            weights = torch.ones(values.shape[-1], device=values.device)
            if name == "things":
                weights[0] = NOTHING_WEIGHT
            wanted = labels[name].flatten().to(values.device)
            if bool((wanted != IGNORED).any()):
                loss = cross_entropy(values.float().flatten(0, 1), wanted, weights, ignore_index=IGNORED)
                losses.append(SHARES.get(name, 1.0) * loss)
        return torch.stack(losses).sum()

    def audio_loss(self, said: Tensor, labels: Labels) -> Tensor:
        """Notes, starts of strokes, and ambiences."""
        said = said.float()
        notes, starts, ambiences = (labels[name].to(said.device) for name in ("notes", "starts", "ambiences"))
        clear = notes >= 0
        many = torch.tensor(5.0, device=said.device)  # most notes are silent at most times
        loss = binary_cross_entropy_with_logits(said[..., :NOTES][clear], notes[clear], pos_weight=many)
        loss = loss + binary_cross_entropy_with_logits(said[..., NOTES:STARTS], starts, pos_weight=many)
        return 5 * loss + 0.2 * cross_entropy(said[..., STARTS:].flatten(0, 1), ambiences.flatten())

    def readings(
        self, logits: Mapping[str, Tensor], seen: Labels, said: Tensor, heard: Labels
    ) -> Iterator[tuple[str, float]]:
        """The share of right labels; of notes and starts, the share of those found and the share of those that are."""
        for name, values in logits.items():
            counted = seen[name] >= (name == "things")
            yield name, float((values.argmax(-1).cpu() == seen[name])[counted].float().mean())
        for name, values in {"notes": said[..., :NOTES], "starts": said[..., NOTES:STARTS]}.items():
            found, there = values.cpu() > 0, heard[name] > 0
            yield f"{name} found", float(found[there].float().mean())
            yield f"{name} true", float(there[found & (heard[name] >= 0)].float().mean())
        yield "ambiences", float((said[..., STARTS:].argmax(-1).cpu() == heard["ambiences"]).float().mean())

    def kinds(self, phase: Phase, rng: np.random.Generator, seconds: int) -> list[str]:
        """Draw the kinds of questions about one scene; captions about three scenes in ten."""
        facts = [str(kind) for kind in rng.choice(FACTS, phase.facts, replace=False)]
        return [*phase.asked, *facts, *(["caption"] if rng.random() < CAPTIONS else [])]

    def all_kinds(self, seconds: int) -> list[str]:
        """All kinds of questions."""
        return list(KINDS)

    def ask(self, kind: str, picture: Picture, sound: Sound, rng: np.random.Generator) -> Question | None:
        """A question of this kind about a scene, or None."""
        scene = Scene(picture, sound)
        return _tell(scene, rng) if kind == TELL else ask(kind, scene, rng)

    def groups(self, question: Question) -> tuple[str, ...]:
        """Its kind, and the third that has its evidence."""
        return question.kind, question.third

    def described(self, seen: Labels, heard: Labels) -> tuple[Tensor, Tensor]:
        """The words for the thing of a video token, and for the sounds of an audio token."""
        parts = [_marks(seen["things"] - 1, len(THINGS))]
        for name, size in (("colours", COLOURS), ("directions", DIRECTIONS), ("sides", SIDES)):
            parts.append(_marks(seen[name], len(size)))
        video = torch.cat(parts, -1)
        notes = (heard["notes"] > 0).unflatten(-1, (len(SOUNDS), len(PITCHES)))
        audio = torch.cat([notes.any(-1), notes.any(-2)], -1)
        none = torch.zeros(*audio.shape[:-1], video.shape[-1], dtype=torch.bool)
        rest = torch.zeros(*video.shape[:-1], audio.shape[-1], dtype=torch.bool)
        return torch.cat([video, rest], -1), torch.cat([none, audio], -1)


def _tell(scene: Scene, rng: np.random.Generator) -> Question:
    """All facts of one event, each after the event's name, so that the name before a word is all it depends on."""
    events = scene.picture.actors if rng.random() < 0.5 else scene.sound.noises
    event = events[int(rng.integers(len(events)))]
    third = third_of(event.start, event.end, scene.seconds)
    if isinstance(event, Actor):
        name, facts = event.thing, (event.colour, event.direction, event.place, third)
    else:
        name, facts = event.sound, (NUMBERS[event.strokes], event.pitch, third)
    return Question(
        kind=TELL,
        text=f"describe the {name}.",
        answer=" ".join(f"{name} {fact}" for fact in facts),
        third=third,
        modality="video" if isinstance(event, Actor) else "audio",
    )


def _marks(labels: Tensor, size: int) -> Tensor:
    """One bool for each label; all False where there is none."""
    return one_hot(labels.clamp(min=0), size).bool() & (labels >= 0)[..., None]
