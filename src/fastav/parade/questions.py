"""Questions about a scene, their answers, and where in the clip the evidence is."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from fastav.parade.scene import (
    AMBIENCES,
    BACKDROPS,
    COLOURS,
    DIRECTIONS,
    PITCHES,
    PLACES,
    SOUNDS,
    THINGS,
    THIRDS,
    Actor,
    Noise,
    Scene,
    Third,
    third_of,
)

NUMBERS = ("zero", "one", "two", "three", "four", "five")
NOTHING = "nothing"
NONE = 0.11  # share of questions whose answer is `NOTHING`, where a kind of questions has that answer

FAMILIES: dict[str, tuple[str, ...]] = {
    "visual": ("colour", "thing", "direction", "side"),
    "audio": ("strokes", "pitch"),
    "background": ("backdrop", "ambience"),
    "count": ("things", "sounds"),
    "time": ("seen-when", "heard-when"),
    "order": ("seen-next", "heard-next", "seen-end", "heard-end"),
    "cross-order": ("before",),
    "while": ("heard-while", "seen-while"),
    "hallucination": ("see", "hear"),
    "caption": ("caption",),
}
"""Kinds of questions by family."""
KINDS: dict[str, str] = {kind: family for family, kinds in FAMILIES.items() for kind in kinds}

TEMPLATES: dict[str, tuple[str, ...]] = {
    "colour": ("what colour is the {}?", "what is the colour of the {}?"),
    "thing": ("what is the {} thing?", "which thing is {}?"),
    "direction": ("which way does the {} move?", "what direction is the {} moving?"),
    "side": ("where is the {}?", "on which side is the {}?"),
    "strokes": ("how many times do you hear the {}?", "how many times does the {} sound?"),
    "pitch": ("what pitch is the {}?", "how high is the {}?"),
    "backdrop": ("what is in the background?", "what is behind the things?"),
    "ambience": ("what do you hear all the time?", "what is the sound in the background?"),
    "things": ("how many things come and go?", "how many things do you see?"),
    "sounds": ("how many sounds come and go?", "how many sounds are not in the background?"),
    "seen-when": ("when do you see the {}?", "when does the {} move?"),
    "heard-when": ("when do you hear the {}?", "when does the {} sound?"),
    "seen-next": ("what do you see after the {}?", "what comes after the {}?"),
    "heard-next": ("what do you hear after the {}?", "what sounds after the {}?"),
    "seen-end": ("what do you see {}?", "what comes {}?"),
    "heard-end": ("what do you hear {}?", "what sounds {}?"),
    "before": ("do you see the {} before you hear the {}?", "does the {} come before the {}?"),
    "heard-while": ("what do you hear while you see the {}?", "what sounds while the {} moves?"),
    "seen-while": ("what do you see while you hear the {}?", "what moves while the {} sounds?"),
    "see": ("do you see a {}?", "is there a {}?"),
    "hear": ("do you hear the {}?", "is there the sound of the {}?"),
    "caption": ("describe the clip.", "what happens in the clip?"),
}

CLEAR = 0.35  # seconds that two events are heard or seen together, or start apart, so that a question may rest on it
CLEAR_ACROSS = 0.6  # as `CLEAR`, for the starts of a thing and a sound

Modality = Literal["video", "audio", "both"]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question about a scene.

    kind, family: as in `FAMILIES`. answer: the full answer, in lower case. third: the part of the clip that has the
    evidence; "whole" where it is not in one. modality: what has the evidence.
    """

    kind: str
    text: str
    answer: str
    third: Third
    modality: Modality

    @property
    def family(self) -> str:
        """The family of its kind."""
        return KINDS[self.kind]


class _Asked(NamedTuple):
    """What fills the places of a template, the answer, and the events that have the evidence (none: the whole clip)."""

    words: tuple[str, ...]
    answer: str
    evidence: Sequence[Actor | Noise] = ()


def ask(kind: str, scene: Scene, rng: np.random.Generator) -> Question | None:
    """A question of this kind, or None if the scene allows none whose answer is clear.

    Yes/no questions are equally often true and false, if the scene allows it.
    """
    asked = _KINDS[kind](scene, rng)
    if asked is None:
        return None
    thirds: set[Third] = {third_of(event.start, event.end, scene.seconds) for event in asked.evidence}
    return Question(
        kind=kind,
        text=str(rng.choice(TEMPLATES[kind])).format(*asked.words),
        answer=asked.answer,
        third=thirds.pop() if len(thirds) == 1 else "whole",
        modality=MODALITIES[kind],
    )


def caption(scene: Scene) -> str:
    """The whole scene in one sentence: things and sounds in the order in which they start, then what is behind both."""
    things = [f"a {a.colour} {a.thing} moves {a.direction}" for a in scene.picture.actors]
    sounds = [f"{NUMBERS[n.strokes]} {n.sound}" for n in scene.sound.noises]
    behind = f"before {scene.picture.backdrop} over {scene.sound.ambience}"
    return f"{' then '.join(things)} with {' then '.join(sounds)} {behind}"


def facts(text: str) -> dict[tuple[str, int], str]:
    """The facts that a caption tells, by their kind and the number of the event that they are about."""
    front, _, back = text.lower().partition(" with ")
    found = {}
    for part, kinds in ((front, _SEEN), (back, _HEARD)):
        for number, event in enumerate(part.split(" then ")):
            words = re.findall(r"\w+", event)
            for kind, names in kinds.items():
                if told := [word for word in words if word in names]:
                    found[kind, 0 if kind in _BEHIND else number] = told[0]
    return found


def sentences() -> Iterator[str]:
    """Sentences that contain every word of this world."""
    for kind in KINDS:
        for template in TEMPLATES[kind]:
            yield template.format("first", "last")
    places = [place for pair in PLACES.values() for place in pair]
    yield " ".join((*COLOURS, *THINGS, *DIRECTIONS, *places, *BACKDROPS, *SOUNDS, *PITCHES, *AMBIENCES, *THIRDS))
    yield " ".join((*NUMBERS, NOTHING, "yes no a moves then with before over"))


_SEEN = {"colour": COLOURS, "thing": THINGS, "direction": DIRECTIONS}
_BEHIND = {"backdrop": BACKDROPS, "ambience": AMBIENCES}
_HEARD = {"strokes": NUMBERS, "sound": SOUNDS} | _BEHIND

MODALITIES: dict[str, Modality] = {
    **dict.fromkeys(("colour", "thing", "direction", "side", "backdrop", "things", "seen-when"), "video"),
    **dict.fromkeys(("seen-next", "seen-end", "see"), "video"),
    **dict.fromkeys(("strokes", "pitch", "ambience", "sounds", "heard-when"), "audio"),
    **dict.fromkeys(("heard-next", "heard-end", "hear"), "audio"),
    **dict.fromkeys(("before", "heard-while", "seen-while", "caption"), "both"),
}


def _of_actor(fact: Callable[[Actor], str], named: Callable[[Actor], str] = lambda actor: actor.thing) -> Callable:
    """Ask for a fact of one thing, which the question calls by `named`."""

    def asked(scene: Scene, rng: np.random.Generator) -> _Asked:
        actor = _pick(scene.picture.actors, rng)
        return _Asked((named(actor),), fact(actor), (actor,))

    return asked


def _of_noise(fact: Callable[[Noise], str]) -> Callable:
    """Ask for a fact of one sound."""

    def asked(scene: Scene, rng: np.random.Generator) -> _Asked:
        noise = _pick(scene.sound.noises, rng)
        return _Asked((noise.sound,), fact(noise), (noise,))

    return asked


def _of_clip(fact: Callable[[Scene], str]) -> Callable:
    """Ask for a fact of the whole clip."""
    return lambda scene, rng: _Asked((), fact(scene))


def _when(events: Callable[[Scene], Sequence[Actor | Noise]]) -> Callable:
    """Ask in which third of the clip an event is."""

    def asked(scene: Scene, rng: np.random.Generator) -> _Asked:
        event = _pick(events(scene), rng)
        return _Asked((_name(event),), third_of(event.start, event.end, scene.seconds), (event,))

    return asked


def _next(events: Callable[[Scene], Sequence[Actor | Noise]]) -> Callable:
    """Ask which event starts next after a given one."""

    def asked(scene: Scene, rng: np.random.Generator) -> _Asked:
        found = events(scene)
        if rng.random() < NONE:
            return _Asked((_name(found[-1]),), NOTHING, (found[-1],))
        number = int(rng.integers(len(found) - 1))
        return _Asked((_name(found[number]),), _name(found[number + 1]), found[number : number + 2])

    return asked


def _end(events: Callable[[Scene], Sequence[Actor | Noise]]) -> Callable:
    """Ask which event comes first or last."""

    def asked(scene: Scene, rng: np.random.Generator) -> _Asked:
        word, number = (("first", 0), ("last", -1))[rng.integers(2)]
        event = events(scene)[number]
        return _Asked((word,), _name(event), (event,))

    return asked


def _before(scene: Scene, rng: np.random.Generator) -> _Asked | None:
    pairs = [(actor, noise) for actor in scene.picture.actors for noise in scene.sound.noises]
    true = bool(rng.random() < 0.5)
    lead = {pair: (pair[1].start - pair[0].start) * (1 if true else -1) for pair in pairs}
    clear = [pair for pair in pairs if lead[pair] > CLEAR_ACROSS]
    if not clear:
        return None
    actor, noise = _pick(clear, rng)
    return _Asked((actor.thing, noise.sound), _yes(true), (actor, noise))


def _while(
    given: Callable[[Scene], Sequence[Actor | Noise]], wanted: Callable[[Scene], Sequence[Actor | Noise]]
) -> Callable:
    """Ask which event of the one modality is at the time of a given event of the other."""

    def asked(scene: Scene, rng: np.random.Generator) -> _Asked | None:
        some, none = [], []
        for event in given(scene):
            shared = {one: min(event.end, one.end) - max(event.start, one.start) for one in wanted(scene)}
            together = [one for one, seconds in shared.items() if seconds > 0]
            if not together:
                none.append((event, None))
            elif len(together) == 1 and shared[together[0]] > CLEAR:
                some.append((event, together[0]))
        found = none if rng.random() < NONE else some
        if not found:
            return None
        event, other = _pick(found, rng)
        if other is None:
            return _Asked((_name(event),), NOTHING, (event,))
        return _Asked((_name(event),), _name(other), (event, other))

    return asked


def _see(scene: Scene, rng: np.random.Generator) -> _Asked:
    """A thing to ask for; if it is not seen, it mostly shares its kind or its colour with one that is."""
    actor = _pick(scene.picture.actors, rng)
    if rng.random() < 0.5:
        return _Asked((f"{actor.colour} {actor.thing}",), _yes(True), (actor,))
    there = {(one.colour, one.thing) for one in scene.picture.actors}
    while True:
        colour, thing = str(rng.choice(COLOURS)), str(rng.choice(THINGS))
        nearness = rng.random()
        if nearness < 0.4:
            colour = actor.colour
        elif nearness < 0.8:
            thing = actor.thing
        if (colour, thing) not in there:
            return _Asked((f"{colour} {thing}",), _yes(False))


def _hear(scene: Scene, rng: np.random.Generator) -> _Asked:
    if rng.random() < 0.5:
        noise = _pick(scene.sound.noises, rng)
        return _Asked((noise.sound,), _yes(True), (noise,))
    heard = {noise.sound for noise in scene.sound.noises}
    return _Asked((str(rng.choice([name for name in SOUNDS if name not in heard])),), _yes(False))


def _actors(scene: Scene) -> Sequence[Actor]:
    return scene.picture.actors


def _noises(scene: Scene) -> Sequence[Noise]:
    return scene.sound.noises


_KINDS: dict[str, Callable[[Scene, np.random.Generator], _Asked | None]] = {
    "colour": _of_actor(lambda actor: actor.colour),
    "thing": _of_actor(lambda actor: actor.thing, lambda actor: actor.colour),
    "direction": _of_actor(lambda actor: actor.direction),
    "side": _of_actor(lambda actor: actor.place),
    "strokes": _of_noise(lambda noise: NUMBERS[noise.strokes]),
    "pitch": _of_noise(lambda noise: noise.pitch),
    "backdrop": _of_clip(lambda scene: scene.picture.backdrop),
    "ambience": _of_clip(lambda scene: scene.sound.ambience),
    "things": _of_clip(lambda scene: NUMBERS[len(scene.picture.actors)]),
    "sounds": _of_clip(lambda scene: NUMBERS[len(scene.sound.noises)]),
    "seen-when": _when(_actors),
    "heard-when": _when(_noises),
    "seen-next": _next(_actors),
    "heard-next": _next(_noises),
    "seen-end": _end(_actors),
    "heard-end": _end(_noises),
    "before": _before,
    "heard-while": _while(_actors, _noises),
    "seen-while": _while(_noises, _actors),
    "see": _see,
    "hear": _hear,
    "caption": _of_clip(caption),
}


def _pick(options: Sequence[_T], rng: np.random.Generator) -> _T:
    return options[int(rng.integers(len(options)))]


def _name(event: Actor | Noise) -> str:
    """The word for an event."""
    return event.thing if isinstance(event, Actor) else event.sound


def _yes(true: bool) -> str:
    return "yes" if true else "no"
