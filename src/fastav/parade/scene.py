"""Scenes of the parade: several things that pass, several sounds, and a background of each.

Things and sounds are short against the clip, come early, in the middle or late, and may overlap. No two things of a
clip have the same kind or colour, and no two sounds are of the same kind, so a question names one of them by one word.
Picture and sound are independent of each other: neither helps to guess the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

SECONDS = 8
LENGTHS = (SECONDS, 32, 64)  # of clips, in seconds
COLOURS = ("red", "green", "blue", "yellow", "white", "purple")
THINGS = ("car", "bus", "bike", "boat", "plane", "balloon", "dog", "bird", "fish", "hammer")
DIRECTIONS = ("left", "right", "up", "down")
PLACES = {"left": ("top", "bottom"), "right": ("top", "bottom"), "up": ("left", "right"), "down": ("left", "right")}
"""The sides of the picture on which a thing with this direction can move."""
BACKDROPS = ("grass", "bricks", "water", "hills", "city")
SOUNDS = ("bell", "drum", "guitar", "engine", "birdsong", "voice", "horn", "siren")
PITCHES = ("low", "mid", "high")
AMBIENCES = ("wind", "hum", "rain", "clock")
THIRDS = ("early", "middle", "late")
MOST_STROKES = 4
WAYS = sum(map(len, PLACES.values()))  # to move: a direction and a place

APART = 0.3  # least distance of two things at once, as a share of the picture's side
MARGIN = 0.035  # of the clip: how far the middle of an event is from the border of its third
LAST_SOUND = 0.3  # seconds before the end; later sound would fall into no patch of the filter bank
AT_ONCE = 2  # sounds

Third = Literal["early", "middle", "late", "whole"]


def third_of(start: float, end: float, seconds: float | int) -> Third:
    """The third of the clip in which the middle of this span is."""
    thirds: tuple[Third, ...] = ("early", "middle", "late")
    return thirds[min(2, int(3 * (start + end) / 2 / seconds))]


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """A thing that passes.

    place: the side of the picture on which it moves. start, length: of its time in the picture, in seconds; it is not
    seen before and after. size, lane, middle, travel: as shares of the picture's side: its width, its position across
    the direction of motion, along it at half the way, and how far it moves. mirrored: whether it faces left.
    """

    colour: str
    thing: str
    direction: str
    place: str
    start: float
    length: float
    size: float
    lane: float
    middle: float
    travel: float
    mirrored: bool

    @property
    def end(self) -> float:
        """The second at which it is gone."""
        return self.start + self.length

    def centre(self, seconds: np.ndarray) -> Float[np.ndarray, "moments 2"]:
        """Its position (x, y) as shares of the picture's side."""
        done = (seconds - self.start) / self.length - 0.5
        sign = 1 if self.direction in ("right", "down") else -1
        along, across = self.middle + sign * self.travel * done, np.full(len(seconds), self.lane)
        return np.stack((along, across) if self.direction in ("left", "right") else (across, along), 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The visual part of a scene.

    actors: by their start. pan: how far the camera moves in a second (x, y), as shares of the picture's side. shake: of
    the camera, in pixels. specks: how many drift over the picture. light: factor of the background's brightness. grain:
    strength of the noise. seed: of the backdrop, specks and noise.
    """

    actors: tuple[Actor, ...]
    backdrop: str
    pan: tuple[float, float]
    shake: float
    specks: int
    light: float
    grain: float
    seed: int
    seconds: int = SECONDS

    @classmethod
    def draw(cls, rng: np.random.Generator, seconds: int = SECONDS, *, held_out: bool) -> "Picture":
        """A random picture of one split: in the test split every thing is of a held-out combination."""
        count = int(rng.integers(2, 5) if seconds == SECONDS else rng.integers(3, 6))
        things = rng.choice(len(THINGS), count, replace=False)
        colours = rng.choice(len(COLOURS), count, replace=False)
        looks = [_look(int(thing), int(colour), rng, held_out) for thing, colour in zip(things, colours, strict=True)]
        return cls(
            actors=_placed(looks, rng, seconds),
            backdrop=str(rng.choice(BACKDROPS)),
            pan=(float(rng.choice([-1, 1]) * rng.uniform(0.06, 0.3)), float(rng.uniform(-0.12, 0.12))),
            shake=float(rng.choice([0.0, 0.5, 1.0])),
            specks=int(rng.integers(0, 9)),
            light=float(rng.uniform(0.45, 1.0)),
            grain=float(rng.uniform(0.0, 0.05)),
            seed=int(rng.integers(1 << 31)),
            seconds=seconds,
        )

    @property
    def held_out(self) -> bool:
        """Whether all its things are of held-out combinations."""
        return all(is_held_out_look(a.thing, a.colour, a.direction, a.place) for a in self.actors)


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """A sound of its own: one to four equal strokes.

    start: of the first stroke. stroke, gap: lengths in seconds. detune: factor of the pitch's frequency. loudness:
    amplitude.
    """

    sound: str
    pitch: str
    strokes: int
    start: float
    stroke: float
    gap: float
    detune: float
    loudness: float

    @property
    def starts(self) -> tuple[float, ...]:
        """The second at which each stroke starts."""
        return tuple(self.start + number * (self.stroke + self.gap) for number in range(self.strokes))

    @property
    def end(self) -> float:
        """The second at which the last stroke ends."""
        return self.starts[-1] + self.stroke


@dataclass(frozen=True, slots=True, kw_only=True)
class Sound:
    """The audible part of a scene.  noises: by their start. level: amplitude of the ambience. seed: of its noise."""

    noises: tuple[Noise, ...]
    ambience: str
    level: float
    seed: int
    seconds: int = SECONDS

    @classmethod
    def draw(cls, rng: np.random.Generator, seconds: int = SECONDS, *, held_out: bool) -> "Sound":
        """A random sound of one split: in the test split every noise is of a held-out combination."""
        count = int(rng.integers(2, 5) if seconds == SECONDS else rng.integers(3, 6))
        names = rng.choice(len(SOUNDS), count, replace=False)
        tunes = [_tune(int(name), rng, held_out) for name in names]
        return cls(
            noises=_sounded(tunes, rng, seconds),
            ambience=str(rng.choice(AMBIENCES)),
            level=float(np.exp(rng.uniform(np.log(0.012), np.log(0.04)))),
            seed=int(rng.integers(1 << 31)),
            seconds=seconds,
        )

    @property
    def held_out(self) -> bool:
        """Whether all its noises are of held-out combinations."""
        return all(is_held_out_tune(n.sound, n.pitch, n.strokes) for n in self.noises)


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture and a sound of the same length."""

    picture: Picture
    sound: Sound

    @classmethod
    def draw(cls, rng: np.random.Generator, seconds: int = SECONDS, *, held_out: bool) -> "Scene":
        """A scene of the test split or of the training split."""
        return cls(
            Picture.draw(rng, seconds, held_out=held_out),
            Sound.draw(rng, seconds, held_out=held_out),
        )

    @property
    def seconds(self) -> int:
        """Length of the clip in seconds."""
        return self.picture.seconds


def is_held_out_look(thing: str, colour: str, direction: str, place: str) -> bool:
    """Whether training shows no such thing: for each kind and colour, one in eight ways to move is held out.

    By remainders rather than by a hash, so that no fact is much more frequent in one split than in the other.
    """
    way = DIRECTIONS.index(direction) + len(DIRECTIONS) * PLACES[direction].index(place)
    return (THINGS.index(thing) + COLOURS.index(colour) + way) % WAYS == 0


def is_held_out_tune(sound: str, pitch: str, strokes: int) -> bool:
    """Whether training has no such sound: for each sound and pitch, one number of strokes is held out."""
    return (SOUNDS.index(sound) + PITCHES.index(pitch) + strokes) % MOST_STROKES == 0


def _look(thing: int, colour: int, rng: np.random.Generator, held_out: bool) -> tuple[str, str, str, str]:
    """A thing of this kind and colour with a direction and a place of this split."""
    ways = [(direction, place) for direction in DIRECTIONS for place in PLACES[direction]]
    kept = [way for way in ways if is_held_out_look(THINGS[thing], COLOURS[colour], *way) == held_out]
    return THINGS[thing], COLOURS[colour], *kept[rng.integers(len(kept))]


def _tune(sound: int, rng: np.random.Generator, held_out: bool) -> tuple[str, str, int]:
    """A sound of this kind with a pitch and a number of strokes of this split."""
    pitch = str(rng.choice(PITCHES))
    numbers = range(1, MOST_STROKES + 1)
    kept = [number for number in numbers if is_held_out_tune(SOUNDS[sound], pitch, number) == held_out]
    return SOUNDS[sound], pitch, int(rng.choice(kept))


def _placed(looks: Sequence[tuple[str, str, str, str]], rng: np.random.Generator, seconds: int) -> tuple[Actor, ...]:
    """Give the things a time and a way each, so that those that are seen at once are apart."""
    while True:
        thirds = rng.integers(3, size=len(looks))
        for _ in range(60):
            actors = [_actor(look, int(third), rng, seconds) for look, third in zip(looks, thirds, strict=True)]
            if all(_apart(one, other) for number, one in enumerate(actors) for other in actors[:number]):
                return tuple(sorted(actors, key=lambda actor: actor.start))


def _actor(look: tuple[str, str, str, str], third: int, rng: np.random.Generator, seconds: int) -> Actor:
    thing, colour, direction, place = look
    length = float(rng.uniform(1.5, 2.5) if seconds == SECONDS else rng.uniform(2, 4))
    lane = (0.27 if place in ("top", "left") else 0.73) + rng.uniform(-0.06, 0.06)
    facing = {"left": True, "right": False}.get(direction)
    return Actor(
        colour=colour,
        thing=thing,
        direction=direction,
        place=place,
        start=_start(third, length, rng, seconds, last=0.05),
        length=length,
        size=float(rng.uniform(0.3, 0.38)),
        lane=float(lane),
        middle=float(rng.uniform(0.45, 0.55)),
        travel=float(rng.uniform(0.36, 0.5)),
        mirrored=bool(rng.random() < 0.5) if facing is None else facing,
    )


def _apart(one: Actor, other: Actor) -> bool:
    """Whether two things do not start together, and are never at once too near each other."""
    if abs(one.start - other.start) < 0.4:
        return False
    start, end = max(one.start, other.start), min(one.end, other.end)
    if end <= start:
        return True
    moments = np.linspace(start, end, 9)
    return float(np.hypot(*(one.centre(moments) - other.centre(moments)).T).min()) > APART


def _sounded(tunes: Sequence[tuple[str, str, int]], rng: np.random.Generator, seconds: int) -> tuple[Noise, ...]:
    """Give the sounds a time each, so that few are heard at once."""
    while True:
        thirds = rng.integers(3, size=len(tunes))
        for _ in range(60):
            noises = [_noise(tune, int(third), rng, seconds) for tune, third in zip(tunes, thirds, strict=True)]
            starts = sorted(noise.start for noise in noises)
            crowd = max(sum(noise.start <= start < noise.end for noise in noises) for start in starts)
            if crowd <= AT_ONCE and min(np.diff(starts)) >= 0.4:
                return tuple(sorted(noises, key=lambda noise: noise.start))


def _noise(tune: tuple[str, str, int], third: int, rng: np.random.Generator, seconds: int) -> Noise:
    sound, pitch, strokes = tune
    stroke, gap = float(rng.uniform(0.24, 0.34)), float(rng.uniform(0.16, 0.22))
    length = strokes * stroke + (strokes - 1) * gap
    return Noise(
        sound=sound,
        pitch=pitch,
        strokes=strokes,
        start=_start(third, length, rng, seconds, last=LAST_SOUND),
        stroke=stroke,
        gap=gap,
        detune=float(rng.uniform(0.94, 1.06)),
        loudness=float(np.exp(rng.uniform(np.log(0.15), np.log(0.45)))),
    )


def _start(third: int, length: float, rng: np.random.Generator, seconds: int, last: float) -> float:
    """Draw the start of an event whose middle is in this third, and that ends `last` seconds before the clip."""
    earliest = max(0.05 + length / 2, (third / 3 + MARGIN) * seconds)
    latest = min(seconds - last - length / 2, ((third + 1) / 3 - MARGIN) * seconds)
    return float(rng.uniform(earliest, latest) - length / 2)
