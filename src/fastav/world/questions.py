"""Questions about a scene, and their answers."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fastav.world.scene import COLOURS, DIRECTIONS, FITS, PITCHES, SECONDS, SHAPES, TIMBRES, Scene

NUMBERS = ("zero", "one", "two", "three", "four")
NOTHING = "silence"
SOUNDS = (*TIMBRES, "knock")

FAMILIES: dict[str, tuple[str, ...]] = {
    "visual": ("colour", "shape", "direction"),
    "audio": ("timbre", "pitch", "count"),
    "match": ("fits",),
    "bridge": ("sound-of", "shape-of"),
    "hallucination": ("see", "is", "hear"),
    "order": ("rest", "knock", "when"),
    "caption": ("caption",),
}
"""Kinds of questions by family, named after those of the field's benchmarks."""
KINDS: dict[str, str] = {kind: family for family, kinds in FAMILIES.items() for kind in kinds}

TEMPLATES: dict[str, tuple[str, ...]] = {
    "colour": ("what colour is the moving shape?", "which color moves?", "what is the color of the moving shape?"),
    "shape": ("what shape is moving?", "which shape moves?", "what is the moving shape?"),
    "direction": ("which way does the shape move?", "what direction is it moving?", "where does the shape move?"),
    "timbre": ("what sound do you hear?", "which sound is playing?", "what is the sound?"),
    "pitch": ("how high is the sound?", "what pitch is the sound?", "what is the pitch?"),
    "count": ("how many beeps do you hear?", "how many times does it beep?", "how many beeps are there?"),
    "fits": ("does the sound fit the picture?", "do picture and sound fit?", "does the shape fit the sound?"),
    "sound-of": ("which sound fits the picture?", "what sound fits the moving shape?"),
    "shape-of": ("which shape fits the sound?", "what shape fits what you hear?"),
    "see": ("do you see a {}?", "is there a {} in the picture?"),
    "is": ("is the moving shape {}?",),
    "hear": ("do you hear a {}?", "is there a {} in the sound?"),
    "rest": ("when does the shape rest?", "does the shape rest first or last?"),
    "knock": ("when does the knock come?", "does the knock come before or after the beeps?"),
    "when": ("does the shape move before or after the beeps?", "does it move before the beeps or after?"),
    "caption": ("describe the clip.", "what happens in the clip?"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question about a scene.  kind, family: as in `FAMILIES`. answer: the full answer, in lower case."""

    kind: str
    text: str
    answer: str

    @property
    def family(self) -> str:
        """The family of its kind."""
        return KINDS[self.kind]


def ask(kind: str, scene: Scene, rng: np.random.Generator) -> Question:
    """A question of this kind. Yes/no questions are equally often true and false, if the scene allows it."""
    text = str(rng.choice(TEMPLATES[kind]))
    if kind == "see":
        visual, true = _object(scene, rng)
        return Question(kind=kind, text=text.format(visual), answer=_yes(true))
    if kind == "is":
        word, true = _property(scene, rng)
        return Question(kind=kind, text=text.format(word), answer=_yes(true))
    if kind == "hear":
        audible = _audible(scene)
        true = bool(audible) and rng.random() < 0.5
        word = str(rng.choice(audible if true else [name for name in SOUNDS if name not in audible]))
        return Question(kind=kind, text=text.format(word), answer=_yes(true))
    return Question(kind=kind, text=text, answer=_answers(scene)[kind])


def kinds(seconds: int) -> list[str]:
    """The kinds of questions about clips of this length: rests only in short clips, order only in long ones."""
    return [kind for kind in KINDS if kind != ("when" if seconds == SECONDS else "rest")]


def caption(scene: Scene) -> str:
    """The whole scene in one sentence."""
    picture, sound = scene.picture, scene.sound
    visual = f"a {picture.colour} {picture.shape} moves {picture.direction}"
    if sound.silent:
        return f"{visual} in silence"
    plural = "s" if len(sound.beeps) > 1 else ""
    return f"{visual} with {NUMBERS[len(sound.beeps)]} {sound.pitch} {sound.timbre} beep{plural}"


def sentences() -> Iterator[str]:
    """Sentences that contain every word of this world."""
    for kind in KINDS:
        for template in TEMPLATES[kind]:
            yield template.format("shape")
    yield " ".join((*COLOURS, *SHAPES, *DIRECTIONS, *SOUNDS, *PITCHES, *NUMBERS, NOTHING))
    yield "yes no none first last before after together never a moves with beep beeps in"


def _answers(scene: Scene) -> dict[str, str]:
    picture, sound = scene.picture, scene.sound
    shape_of = {timbre: shape for shape, timbre in FITS.items()}
    return {
        "colour": picture.colour,
        "shape": picture.shape,
        "direction": picture.direction,
        "timbre": NOTHING if sound.silent else sound.timbre,
        "pitch": "none" if sound.silent else sound.pitch,
        "count": NUMBERS[len(sound.beeps)],
        "fits": _yes(scene.fits),
        "sound-of": FITS[picture.shape],
        "shape-of": "none" if sound.silent else shape_of[sound.timbre],
        "rest": picture.rest,
        "knock": sound.knock,
        "when": scene.when,
        "caption": caption(scene),
    }


def _yes(true: bool) -> str:
    return "yes" if true else "no"


def _audible(scene: Scene) -> list[str]:
    beeps = [] if scene.sound.silent else [scene.sound.timbre]
    return beeps if scene.sound.knock == "never" else [*beeps, "knock"]


def _object(scene: Scene, rng: np.random.Generator) -> tuple[str, bool]:
    """An object to ask for, and whether it is in the scene; if not, it mostly shares colour or shape with the moving
    one.
    """
    objects = scene.picture.objects
    if rng.random() < 0.5:
        colour, shape = objects[0] if rng.random() < 0.75 else objects[-1]
        return f"{colour} {shape}", True
    while True:
        colour, shape = str(rng.choice(COLOURS)), str(rng.choice(SHAPES))
        nearness = rng.random()
        if nearness < 0.35:
            colour = scene.picture.colour
        elif nearness < 0.7:
            shape = scene.picture.shape
        if (colour, shape) not in objects:
            return f"{colour} {shape}", False


def _property(scene: Scene, rng: np.random.Generator) -> tuple[str, bool]:
    """A colour, or less often a shape, and whether the moving shape has it."""
    picture, true = scene.picture, bool(rng.random() < 0.5)
    colour = rng.random() < 0.7
    options, own = (COLOURS, picture.colour) if colour else (SHAPES, picture.shape)
    word = own if true else str(rng.choice([name for name in options if name != own]))
    return (word if colour else f"a {word}"), true
