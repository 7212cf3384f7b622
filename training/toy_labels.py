"""Labels of the toy world's tokens, on which the encoders are trained: the object or sound that each contains."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from fastav.models.videollama2 import Scheme
from fastav.world import Picture, Sound
from fastav.world.render import KNOCK_SECONDS
from fastav.world.scene import COLOURS, DIRECTIONS, PITCHES, SHAPES, TIMBRES
from training.world import IGNORED

OBJECTS = 1 + len(COLOURS) * len(SHAPES)  # nothing, or a colour and a shape
MOTIONS = 1 + len(DIRECTIONS)  # stands still, or moves
KNOCK = 1 + len(TIMBRES) * len(PITCHES)
SOUNDS = KNOCK + 1  # silence, a timbre and a pitch, or the knock
ROWS_A_SECOND = 100


@dataclass(frozen=True, slots=True)
class Seen:
    """Labels of video tokens.  what: the object centred in the token. motion: that object's; `IGNORED` if none."""

    what: Int[np.ndarray, " tokens"]
    motion: Int[np.ndarray, " tokens"]


def seen(picture: Picture, moments: Float[np.ndarray, " frames"], scheme: Scheme) -> Seen:
    """Label the video tokens of a picture.  moments: the second of each sampled frame."""
    side = scheme.image_size // scheme.patch_size // 2
    pairs = len(moments) // 2
    what, motion = np.zeros((pairs, side, side), np.int64), np.full((pairs, side, side), IGNORED)
    if (other := picture.distractor) is not None:
        place = (slice(None), int(other.y * side), int(other.x * side))
        what[place], motion[place] = _object(other.colour, other.shape), 0
    ways = picture.centre(moments).reshape(pairs, 2, 2)
    for pair, way in enumerate(ways):
        x, y = np.clip((way.mean(0) * side).astype(int), 0, side - 1)
        what[pair, y, x] = _object(picture.colour, picture.shape)
        moved = np.abs(way[1] - way[0]).max()
        if moved < 0.005:
            motion[pair, y, x] = 0
        elif moved > 0.035:  # in between, it is starting or stopping
            motion[pair, y, x] = 1 + DIRECTIONS.index(picture.direction)
    return Seen(what.reshape(-1), motion.reshape(-1))


@dataclass(frozen=True, slots=True)
class Heard:
    """Labels of audio tokens.  what: the sound; `IGNORED` if there is little of it. starts: 1 where a beep starts."""

    what: Int[np.ndarray, " tokens"]
    starts: Float[np.ndarray, " tokens"]


def heard(sound: Sound, scheme: Scheme) -> Heard:
    """Label the audio tokens of a sound.  Tokens of the same time have the same label."""
    times, bands = scheme.audio_grid
    width = scheme.audio_patch / ROWS_A_SECOND
    left = np.arange(times) * width
    what, starts = np.zeros(times, np.int64), np.zeros(times, np.float32)
    beep = 1 + TIMBRES.index(sound.timbre) * len(PITCHES) + PITCHES.index(sound.pitch)
    parts = [(KNOCK, sound.knock_at, KNOCK_SECONDS)] if sound.knock != "never" else []
    for number, start, length in [*parts, *((beep, *one) for one in sound.beeps)]:
        overlap = np.minimum(left + width, start + length) - np.maximum(left, start)
        what[(overlap > 0.005) & (what == 0)] = IGNORED
        what[overlap > (0.02 if number == KNOCK else 0.04)] = number
        if number == beep:
            starts[min(int(start / width), times - 1)] = 1
    return Heard(np.repeat(what, bands), np.repeat(starts, bands))


def _object(colour: str, shape: str) -> int:
    return 1 + COLOURS.index(colour) * len(SHAPES) + SHAPES.index(shape)
