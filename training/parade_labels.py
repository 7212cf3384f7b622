"""Labels of the parade's tokens, on which the encoders are trained: the thing or the sounds that each shows."""

import numpy as np

from fastav.models.videollama2 import Scheme
from fastav.parade.scene import (
    AMBIENCES,
    BACKDROPS,
    COLOURS,
    DIRECTIONS,
    PITCHES,
    SOUNDS,
    THINGS,
    Actor,
    Picture,
    Sound,
)
from training.world import IGNORED, Labels

SIDES = ("top", "bottom", "left", "right")
SHOWS, HINTS = 0.22, 0.05  # shares of a token that a thing covers: from the one it is labelled, from the other ignored
HEARD, LITTLE = 0.06, 0.005  # seconds of a stroke in a token, likewise
ROWS_A_SECOND = 100


def seen(picture: Picture, moments: np.ndarray, scheme: Scheme) -> Labels:
    """Label the video tokens of a picture.  moments: the second of each sampled frame.

    things: 0 for none, or 1 and the number of the kind. colours, directions, sides: of that thing; `IGNORED` if none.
    backdrops: `IGNORED` where a thing is.
    """
    side, pairs = scheme.side_tokens, len(moments) // 2
    cover = np.zeros((len(picture.actors), pairs, side, side))
    for number, actor in enumerate(picture.actors):
        cover[number] = _cover(actor, moments, side).reshape(pairs, 2, side, side).mean(1)
    most, which = cover.max(0), cover.argmax(0)
    shows, unclear = most >= SHOWS, (most >= HINTS) & (most < SHOWS)

    def of(facts: list[int], otherwise: int) -> np.ndarray:
        labels = np.where(shows, np.array(facts)[which], otherwise)
        return np.where(unclear, IGNORED, labels).reshape(-1)

    actors = picture.actors
    return {
        "things": of([1 + THINGS.index(actor.thing) for actor in actors], 0),
        "colours": of([COLOURS.index(actor.colour) for actor in actors], IGNORED),
        "directions": of([DIRECTIONS.index(actor.direction) for actor in actors], IGNORED),
        "sides": of([SIDES.index(actor.place) for actor in actors], IGNORED),
        "backdrops": of([IGNORED] * len(actors), BACKDROPS.index(picture.backdrop)),
    }


def _cover(actor: Actor, moments: np.ndarray, side: int) -> np.ndarray:
    """The share of each token that the thing's box covers in each frame, [frames, side, side]."""
    edges = np.arange(side) / side
    half = 0.45 * actor.size
    centre = actor.centre(moments)[:, :, None]
    overlap = np.minimum(centre + half, edges + 1 / side) - np.maximum(centre - half, edges)  # [frames, 2, side]
    across, down = side * np.clip(overlap, 0, None).transpose(1, 0, 2)
    here = (moments >= actor.start) & (moments < actor.end)
    return here[:, None, None] * down[:, :, None] * across[:, None, :]


def heard(sound: Sound, scheme: Scheme) -> Labels:
    """Label the audio tokens of a sound.  Tokens of the same time have the same labels.

    notes: [tokens, sounds * pitches], 1 for what is heard there, -1 for what is little. starts: [tokens, sounds], 1
    where a stroke starts. ambiences: what is heard all the time.
    """
    times, bands = scheme.audio_grid
    width = scheme.audio_patch / ROWS_A_SECOND
    left = np.arange(times) * width
    notes = np.zeros((times, len(SOUNDS) * len(PITCHES)), np.float32)
    starts = np.zeros((times, len(SOUNDS)), np.float32)
    for noise in sound.noises:
        kind = SOUNDS.index(noise.sound)
        note = notes[:, kind * len(PITCHES) + PITCHES.index(noise.pitch)]
        for start in noise.starts:
            overlap = np.minimum(left + width, start + noise.stroke) - np.maximum(left, start)
            note[(overlap > LITTLE) & (note == 0)] = -1
            note[overlap > HEARD] = 1
            starts[min(int(start / width), times - 1), kind] = 1
    return {
        "notes": notes.repeat(bands, 0),
        "starts": starts.repeat(bands, 0),
        "ambiences": np.full(times * bands, AMBIENCES.index(sound.ambience)),
    }
