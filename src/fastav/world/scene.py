"""Scenes of the toy world: one moving coloured shape, and beeps.

All events are within four seconds: the whole of a short clip, or a part of a long one.
"""

from dataclasses import dataclass
from typing import Literal
from zlib import crc32

import numpy as np

SECONDS = 4
LONG_SECONDS = 32
COLOURS = ("red", "green", "blue", "yellow", "white", "purple")
SHAPES = ("circle", "square", "triangle", "star")
DIRECTIONS = ("left", "right", "up", "down")
TIMBRES = ("tone", "buzz", "chirp", "hiss")
PITCHES = ("low", "mid", "high")
MOST_BEEPS = 4
FITS: dict[str, str] = dict(zip(SHAPES, TIMBRES, strict=True))
"""The sound that belongs to each shape. It is the one fact of this world that no track shows on its own."""

HELD_OUT = 8  # one in 8 combinations is excluded from training
LAST_SOUND = 3.7  # seconds; later sound would end in the last part, which is too short for a patch of the filter bank

When = Literal["before", "after", "together", "never"]
Rest = Literal["first", "last", "never"]
Knock = Literal["before", "after", "never"]
RESTS: tuple[Rest, ...] = ("never", "never", "first", "last")  # each entry is as likely: `never` in half of the clips
KNOCKS: tuple[Knock, ...] = ("never", "never", "before", "after")


@dataclass(frozen=True, slots=True, kw_only=True)
class Distractor:
    """A small shape that does not move.  x, y, radius: as shares of the picture's side."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The visual part of a scene.

    seconds: of the clip. In a long clip the shape moves within the `SECONDS` after second `offset`, and stands still
    before and after. rest: whether the shape rests before or after it moves, for `still` seconds; never in a long clip.
    radius, travel: as shares of the picture's side. lane: the position across the direction of motion. middle: the
    position at half the way. background: red, green, blue in [0, 1]. texture, grain: strength of a fixed pattern and of
    noise. chroma: whether colours are as coarse as in a video file. seed: of pattern and noise.
    """

    colour: str
    shape: str
    direction: str
    rest: Rest
    still: float
    radius: float
    travel: float
    lane: float
    middle: float
    background: tuple[float, float, float]
    texture: float
    grain: float
    chroma: bool
    distractor: Distractor | None
    seed: int
    seconds: int = SECONDS
    offset: int = 0

    @classmethod
    def draw(cls, rng: np.random.Generator, seconds: int = SECONDS) -> "Picture":
        """A random picture of this world, for a clip of this length (a multiple of `SECONDS`)."""
        offset = _draw_offset(rng, seconds)
        colour, shape, direction = (str(rng.choice(names)) for names in (COLOURS, SHAPES, DIRECTIONS))
        rest: Rest = RESTS[rng.integers(len(RESTS) if seconds == SECONDS else 1)]
        lane = float(rng.uniform(0.23, 0.77))
        grey, tint = rng.uniform(0.02, 0.35), rng.uniform(-0.06, 0.06, 3)
        red, green, blue = np.clip(grey + tint, 0, 1).tolist()
        return cls(
            colour=colour,
            shape=shape,
            direction=direction,
            rest=rest,
            still=float(rng.uniform(1.4, 2.2)),
            radius=float(rng.uniform(0.13, 0.18)),
            travel=float(rng.uniform(0.34, 0.52)),
            lane=lane,
            middle=float(rng.uniform(0.44, 0.56)),
            background=(red, green, blue),
            texture=float(rng.choice([0.0, 0.0, 0.03, 0.07])),
            grain=float(rng.uniform(0.0, 0.02)),
            chroma=bool(rng.random() < 0.5),
            distractor=_distractor(rng, colour, direction, lane) if rng.random() < 0.4 else None,
            seed=int(rng.integers(1 << 31)),
            seconds=seconds,
            offset=offset,
        )

    @property
    def objects(self) -> tuple[tuple[str, str], ...]:
        """Colour and shape of all objects, the moving shape first."""
        other = () if self.distractor is None else ((self.distractor.colour, self.distractor.shape),)
        return ((self.colour, self.shape), *other)

    def centre(self, seconds: np.ndarray) -> np.ndarray:
        """The position of the moving shape [moments, 2 (x, y)], as shares of the picture's side."""
        start, end = self.motion_span
        done = np.clip((seconds - start) / (end - start), 0, 1) - 0.5
        sign = 1 if self.direction in ("right", "down") else -1
        along, across = self.middle + sign * self.travel * done, np.full(len(seconds), self.lane)
        pair = (along, across) if self.direction in ("left", "right") else (across, along)
        return np.stack(pair, 1)

    @property
    def motion_span(self) -> tuple[float, float]:
        """The seconds at which the motion starts and ends."""
        start = self.still if self.rest == "first" else 0.0
        end = SECONDS - self.still if self.rest == "last" else float(SECONDS)
        return self.offset + start, self.offset + end


@dataclass(frozen=True, slots=True, kw_only=True)
class Sound:
    """The audible part of a scene.

    beeps: start and length of each, in seconds. knock: whether a knock comes before or after the beeps, at second
    `knock_at`. detune: factor of the pitch's frequency. loudness, floor: amplitudes of the beeps and of the noise.
    seed: of the noise. seconds, offset: of the clip; beeps and knock are within the `SECONDS` after second `offset`.
    """

    timbre: str
    pitch: str
    beeps: tuple[tuple[float, float], ...]
    knock: Knock
    knock_at: float
    detune: float
    loudness: float
    floor: float
    seed: int
    seconds: int = SECONDS
    offset: int = 0

    @classmethod
    def draw(cls, rng: np.random.Generator, timbre: str | None = None, seconds: int = SECONDS) -> "Sound":
        """A random sound of this world, which can be silent. With a given timbre it is never silent."""
        offset = _draw_offset(rng, seconds)
        silent = timbre is None and rng.random() < 0.06
        count = 0 if silent else int(rng.integers(1, MOST_BEEPS + 1))
        knock: Knock = "never" if silent else KNOCKS[rng.integers(len(KNOCKS))]
        length, gap, wait = rng.uniform(0.18, 0.26), rng.uniform(0.16, 0.24), rng.uniform(0.25, 0.5)
        span = count * length + (count - 1) * gap
        first = wait if knock == "before" else 0.0
        slack = LAST_SOUND - span - first - (wait if knock == "after" else 0.0)
        start = float(rng.uniform(0.05, 0.35) if rng.random() < 0.75 else rng.uniform(0.05, slack))
        start += offset
        begin = start + first
        return cls(
            timbre=str(rng.choice(TIMBRES)) if timbre is None else timbre,
            pitch=str(rng.choice(PITCHES)),
            beeps=tuple((begin + i * float(length + gap), float(length)) for i in range(count)),
            knock=knock,
            knock_at=start if knock == "before" else float(begin + span + wait - 0.05),
            detune=float(rng.uniform(0.9, 1.1)),
            loudness=float(np.exp(rng.uniform(np.log(0.12), np.log(0.6)))),
            floor=float(np.exp(rng.uniform(np.log(2e-4), np.log(4e-3)))),
            seed=int(rng.integers(1 << 31)),
            seconds=seconds,
            offset=offset,
        )

    @property
    def silent(self) -> bool:
        """Whether there are no beeps."""
        return not self.beeps


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture and a sound of the same length."""

    picture: Picture
    sound: Sound

    @classmethod
    def draw(
        cls, rng: np.random.Generator, *, held_out: bool, fitting: bool | None = None, seconds: int = SECONDS
    ) -> "Scene":
        """A scene of the test split or of the training split. Half of the scenes fit, unless `fitting` decides."""
        fits = bool(rng.random() < 0.5) if fitting is None else fitting
        while True:
            picture = Picture.draw(rng, seconds)
            sound = Sound.draw(rng, FITS[picture.shape] if fits else None, seconds)
            scene = cls(picture, sound)
            if scene.held_out == held_out and scene.fits == fits:
                return scene

    @property
    def fits(self) -> bool:
        """Whether the sound belongs to the shape."""
        return not self.sound.silent and FITS[self.picture.shape] == self.sound.timbre

    @property
    def seconds(self) -> int:
        """Length of the clip in seconds."""
        return self.picture.seconds

    @property
    def when(self) -> When:
        """Whether the shape moves before the beeps, after them, or in the same part of a long clip."""
        if self.sound.silent:
            return "never"
        if self.picture.offset == self.sound.offset:
            return "together"
        return "before" if self.picture.offset < self.sound.offset else "after"

    @property
    def combination(self) -> tuple[str, ...]:
        """The facts in a caption of the scene."""
        visual = (self.picture.colour, self.picture.shape, self.picture.direction)
        audible = () if self.sound.silent else (self.sound.timbre, self.sound.pitch, str(len(self.sound.beeps)))
        return visual + audible

    @property
    def held_out(self) -> bool:
        """Whether this combination, with all questions about it, is excluded from training."""
        return crc32(" ".join(self.combination).encode()) % HELD_OUT == 0


def _draw_offset(rng: np.random.Generator, seconds: int) -> int:
    """The second at which the part with all events starts."""
    return 0 if seconds == SECONDS else SECONDS * int(rng.integers(seconds // SECONDS))


def _distractor(rng: np.random.Generator, colour: str, direction: str, lane: float) -> Distractor:
    """A still shape of another colour that is not in the way of the moving shape."""
    along = float(rng.choice([0.13, 0.87]))
    across = 0.13 if lane > 0.5 else 0.87
    x, y = (along, across) if direction in ("left", "right") else (across, along)
    other = str(rng.choice([name for name in COLOURS if name != colour]))
    return Distractor(colour=other, shape=str(rng.choice(SHAPES)), x=x, y=y, radius=float(rng.uniform(0.085, 0.105)))
