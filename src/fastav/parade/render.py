"""Rendering the pictures of a scene, and both its parts as a clip or a video file."""

from os import PathLike

import numpy as np
from jaxtyping import Float, Int, UInt8

from fastav.media import Clip
from fastav.media.writing import write_mp4
from fastav.parade.backdrops import HEIGHT, WIDTH, backdrop, slides_down
from fastav.parade.scene import Actor, Picture, Scene
from fastav.parade.sounds import RATE, waveform
from fastav.parade.sprites import painted

FPS = 4
SIDE = 96  # pixels
SWINGS = 1.7  # of legs and wings, in a second
RGB = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.75, 0.15),
    "blue": (0.12, 0.25, 0.95),
    "yellow": (0.97, 0.87, 0.08),
    "white": (0.97, 0.97, 0.97),
    "purple": (0.65, 0.12, 0.8),
}


def frames(
    picture: Picture, which: Int[np.ndarray, " picked"] | None = None
) -> UInt8[np.ndarray, "picked side side 3"]:
    """The frames with these numbers; all if None."""
    which = np.arange(picture.seconds * FPS) if which is None else which
    moments = (which + 0.5) / FPS
    rng = np.random.default_rng(picture.seed)
    images = _background(picture, which, rng)
    for actor in picture.actors:
        _paint(images, actor, moments)
    images += _grain(picture, which, rng)
    return (np.clip(images, 0, 1) * 255).astype(np.uint8)


def clip(scene: Scene, name: str = "parade") -> Clip:
    """The scene in memory."""
    return Clip.from_arrays(
        frames=frames(scene.picture), fps=FPS, waveform=waveform(scene.sound), sample_rate=RATE, name=name
    )


def write(scene: Scene, path: str | PathLike[str]) -> None:
    """Write the scene to an MP4 file with H.264 and AAC."""
    write_mp4(path, frames(scene.picture), FPS, waveform(scene.sound), RATE)


def _background(
    picture: Picture, which: np.ndarray, rng: np.random.Generator
) -> Float[np.ndarray, "frames side side 3"]:
    """What the camera sees without things: part of the backdrop, which repeats sideways, and specks in front of it."""
    whole = backdrop(picture.backdrop, rng) * np.float32(picture.light)
    shake = picture.shake * rng.standard_normal((2, picture.seconds * FPS))[:, which]
    moments = (which + 0.5) / FPS
    across = picture.pan[0] * SIDE * moments + shake[0] + rng.uniform(0, WIDTH)
    down = picture.pan[1] * SIDE * moments * slides_down(picture.backdrop) + shake[1] + (HEIGHT - SIDE) / 2
    columns = (np.rint(across).astype(int)[:, None] + np.arange(SIDE)) % WIDTH
    rows = (np.rint(down).astype(int)[:, None] + np.arange(SIDE)) % HEIGHT
    images = whole[rows[:, :, None], columns[:, None, :]]
    drift, places = rng.uniform(-12, 12, (picture.specks, 2)), rng.uniform(0, SIDE, (picture.specks, 2))
    tones = rng.uniform(0.2, 1, (picture.specks, 3)).astype(np.float32)
    ways = (places[:, None] + drift[:, None] * moments[:, None]).astype(int) % (SIDE - 1)
    frame = np.arange(len(which))
    for way, tone in zip(ways, tones, strict=True):
        for x, y in ((0, 0), (0, 1), (1, 0), (1, 1)):
            images[frame, way[:, 1] + y, way[:, 0] + x] = tone
    return images


def _paint(images: Float[np.ndarray, "frames side side 3"], actor: Actor, moments: np.ndarray) -> None:
    """Paint a thing into the frames in which it is seen, in place."""
    (shown,) = np.nonzero((moments >= actor.start) & (moments < actor.end))
    if not len(shown):
        return
    centres = actor.centre(moments[shown]) * SIDE
    scale = actor.size * SIDE / 2  # pixels in a unit of the sprite
    reach = int(np.ceil(scale)) + 2
    corner = np.clip(np.floor(centres).astype(int) - reach, 0, SIDE - 2 * reach)
    grid = np.arange(2 * reach) + 0.5
    x = ((corner[:, :1] + grid - centres[:, :1]) / scale).astype(np.float32)
    y = ((corner[:, 1:] + grid - centres[:, 1:]) / scale).astype(np.float32)
    x = -x if actor.mirrored else x
    shape = (len(shown), 2 * reach, 2 * reach)
    beat = np.sin(2 * np.pi * SWINGS * (moments[shown] - actor.start))
    look, cover = painted(
        actor.thing,
        RGB[actor.colour],
        np.broadcast_to(x[:, None, :], shape),
        np.broadcast_to(y[:, :, None], shape),
        beat,
        1 / scale,
    )
    for number, frame in enumerate(shown):
        left, top = corner[number]
        part = images[frame, top : top + 2 * reach, left : left + 2 * reach]
        part += cover[number] * (look[number] - part)


def _grain(picture: Picture, which: np.ndarray, rng: np.random.Generator) -> Float[np.ndarray, "frames side side 3"]:
    """Noise: one field, cut at another place for every frame."""
    field = np.float32(picture.grain) * rng.standard_normal((2 * SIDE, 2 * SIDE, 3), np.float32)
    return np.stack([field[7 * n % SIDE : 7 * n % SIDE + SIDE, 13 * n % SIDE : 13 * n % SIDE + SIDE] for n in which])
