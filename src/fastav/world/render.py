"""Rendering a scene as frames and a waveform, in memory or as a video file."""

from os import PathLike

import numpy as np
from jaxtyping import Float, Int, UInt8

from fastav.media import Clip
from fastav.media.writing import write_mp4
from fastav.world.scene import Picture, Scene, Sound

FPS = 8
SIDE = 64  # pixels
RATE = 16_000

RGB = {
    "red": (0.9, 0.12, 0.12),
    "green": (0.1, 0.75, 0.15),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.85, 0.1),
    "white": (0.95, 0.95, 0.95),
    "purple": (0.65, 0.15, 0.8),
}
HERTZ = {"low": 260.0, "mid": 700.0, "high": 1900.0}
KNOCK_SECONDS = 0.05


def frames(
    picture: Picture, which: Int[np.ndarray, " picked"] | None = None
) -> UInt8[np.ndarray, "picked side side 3"]:
    """The frames with these numbers; all if None."""
    which = np.arange(picture.seconds * FPS) if which is None else which
    rng = np.random.default_rng(picture.seed)
    pattern = rng.standard_normal((SIDE // 4, SIDE // 4, 3), np.float32).repeat(4, 0).repeat(4, 1)
    background = np.asarray(picture.background, np.float32) + np.float32(picture.texture) * pattern
    if (other := picture.distractor) is not None:
        _paint(background[None], other.shape, other.colour, np.array([[other.x, other.y]]), other.radius)
    images = np.repeat(background[None], len(which), 0)
    _paint(images, picture.shape, picture.colour, picture.centre((which + 0.5) / FPS), picture.radius)
    if picture.chroma:
        images = _coarse_chroma(images)
    grain = np.float32(picture.grain) * rng.standard_normal((SIDE, SIDE, 3), np.float32)
    for frame, number in zip(
        images, which, strict=True
    ):  # one noise field, shifted by a different amount in every frame
        frame += np.roll(grain, (7 * number % SIDE, 13 * number % SIDE), (0, 1))
    return (np.clip(images, 0, 1) * 255).astype(np.uint8)


def waveform(sound: Sound) -> Float[np.ndarray, " samples"]:
    """Mono samples in [-1, 1] at `RATE` Hz."""
    rng = np.random.default_rng(sound.seed)
    wave = np.float32(sound.floor) * rng.standard_normal(sound.seconds * RATE, np.float32)
    for start, length in sound.beeps:
        _mix(wave, start, sound.loudness * _beep(sound, length, rng))
    if sound.knock != "never":
        time = np.arange(int(KNOCK_SECONDS * RATE)) / RATE
        _mix(wave, sound.knock_at, sound.loudness * np.exp(-time / 0.012) * rng.uniform(-1, 1, len(time)))
    return np.clip(wave, -1, 1)


def clip(scene: Scene, name: str = "toy") -> Clip:
    """The scene in memory."""
    return Clip.from_arrays(
        frames=frames(scene.picture), fps=FPS, waveform=waveform(scene.sound), sample_rate=RATE, name=name
    )


def write(scene: Scene, path: str | PathLike[str]) -> None:
    """Write the scene to an MP4 file with H.264 and AAC."""
    write_mp4(path, frames(scene.picture), FPS, waveform(scene.sound), RATE)


def _paint(
    images: Float[np.ndarray, "moments side side 3"],
    shape: str,
    colour: str,
    centres: Float[np.ndarray, "moments 2"],
    radius: float,
) -> None:
    """Paint a shape with soft edges over frames, in place."""
    grid = (np.arange(SIDE, dtype=np.float32) + 0.5) / SIDE
    x = grid[None, None, :] - centres[:, 0].astype(np.float32)[:, None, None]
    y = grid[None, :, None] - centres[:, 1].astype(np.float32)[:, None, None]
    cover = np.clip(0.5 - SIDE * _distance(shape, x, y, np.float32(radius)), 0, 1)[..., None]
    images += cover * (np.asarray(RGB[colour], np.float32) - images)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: np.float32) -> np.ndarray:
    """The approximate distance of each point from the outside of the shape around the origin; y points down."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - np.float32(0.85) * radius
    if shape == "triangle":
        return np.maximum(np.float32(0.866) * abs(x) - np.float32(0.5) * y, y) - np.float32(0.55) * radius
    arms = np.cos(5 * np.arctan2(x, -y))
    return np.float32(0.7) * (np.hypot(x, y) - radius * (np.float32(0.68) + np.float32(0.36) * arms))


def _coarse_chroma(images: Float[np.ndarray, "moments side side 3"]) -> Float[np.ndarray, "moments side side 3"]:
    """Frames with colour at half the resolution of brightness, as in 4:2:0 video."""
    brightness = images.mean(-1, keepdims=True)
    colour = (images - brightness).reshape(len(images), SIDE // 2, 2, SIDE // 2, 2, 3).mean((2, 4))
    return brightness + colour.repeat(2, 1).repeat(2, 2)


def _beep(sound: Sound, length: float, rng: np.random.Generator) -> Float[np.ndarray, " samples"]:
    time = np.arange(int(length * RATE)) / RATE
    hertz = HERTZ[sound.pitch] * sound.detune
    if sound.timbre == "tone":
        wave = np.sin(2 * np.pi * hertz * time)
    elif sound.timbre == "buzz":
        wave = 0.6 * np.sign(np.sin(2 * np.pi * hertz * time))
    elif sound.timbre == "chirp":  # rises by four fifths
        wave = np.sin(2 * np.pi * hertz * (time + 0.4 * time**2 / length))
    else:  # noise, a third of an octave wide
        spectrum = np.fft.rfft(rng.standard_normal(len(time)))
        octaves = np.log2((np.fft.rfftfreq(len(time), 1 / RATE) + 1) / hertz)
        wave = np.fft.irfft(spectrum * np.exp(-0.5 * (octaves / 0.35) ** 2), len(time))
        wave *= 0.8 / abs(wave).max()
    return wave * np.minimum(1, np.minimum(time, length - time) / 0.01)


def _mix(wave: Float[np.ndarray, " samples"], start: float, samples: Float[np.ndarray, " part"]) -> None:
    first = int(start * RATE)
    wave[first : first + len(samples)] += samples.astype(np.float32)
