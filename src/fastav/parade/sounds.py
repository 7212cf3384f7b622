"""Rendering the sound of a scene: noises of several timbres over a continuous ambience."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Float

from fastav.parade.scene import Noise, Sound

RATE = 16_000
FACTORS = {"low": 0.68, "mid": 1.0, "high": 1.48}
"""The frequency of each pitch, as a factor of the sound's own."""
LOOP = 1 << 16  # samples of ambience, which then repeats
FORMANTS = ((700, 130, 1.0), (1200, 140, 0.7), (2600, 200, 0.35))  # frequency, width, strength
EDGE = 0.008  # seconds in which a stroke rises and falls


def waveform(sound: Sound) -> Float[np.ndarray, " samples"]:
    """Mono samples in [-1, 1] at `RATE` Hz."""
    rng = np.random.default_rng(sound.seed)
    wave = np.float32(sound.level) * _ambience(sound, rng)
    for noise in sound.noises:
        stroke = _stroke(noise, rng)
        for start in noise.starts:
            first = int(start * RATE)
            wave[first : first + len(stroke)] += np.float32(noise.loudness * rng.uniform(0.85, 1.15)) * stroke
    return np.clip(wave, -1, 1)


def _stroke(noise: Noise, rng: np.random.Generator) -> Float[np.ndarray, " part"]:
    """One stroke, of amplitude one."""
    time = np.arange(int(noise.stroke * RATE), dtype=np.float32) / RATE
    wave = TIMBRES[noise.sound](time, FACTORS[noise.pitch] * noise.detune, rng)
    wave = wave * np.minimum(1, np.minimum(time, time[-1] - time) / EDGE)
    return (wave / abs(wave).max()).astype(np.float32)


def _partials(
    time: np.ndarray, hertz: np.ndarray, strength: np.ndarray, decay: np.ndarray | float = np.inf
) -> Float[np.ndarray, " part"]:
    """A sum of sines.  hertz, strength, decay (seconds): of each partial."""
    turns = np.asarray(hertz, np.float32)[:, None] * time
    fade = np.exp(-time / np.broadcast_to(np.asarray(decay, np.float32), len(hertz))[:, None])
    return (np.asarray(strength, np.float32)[:, None] * fade * np.sin(2 * np.pi * turns)).sum(0)


def _bell(time: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    hertz = 800 * factor * np.array((1, 2.0, 2.76, 5.4))
    return _partials(time, hertz, np.array((0.7, 0.5, 1, 0.6)), np.array((0.2, 0.16, 0.13, 0.08)))


def _drum(time: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    hertz = 150 * factor
    skin = np.sin(2 * np.pi * hertz * (time + 0.03 * (1 - np.exp(-time / 0.03)))) * np.exp(-time / 0.09)
    return skin + 0.5 * rng.standard_normal(len(time)) * np.exp(-time / 0.015)


def _guitar(time: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    order = np.arange(1, 13)
    return _partials(time, 220 * factor * order, 1 / order, 0.35 / order)


def _engine(time: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    faster = time + 0.5 * time**2  # it revs up
    order = np.arange(1, 25)
    hum = _partials(faster, 70 * factor * order, order**-0.5)
    return hum * (1 + 0.4 * rng.standard_normal(len(time)))


def _birdsong(time: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    turns = 2 * np.pi * 22 * time  # of its trill, which bends the frequency by a fifth
    bent = time + 0.2 / (2 * np.pi * 22) * np.sin(turns)
    return np.sin(2 * np.pi * 3400 * factor * bent) * (0.6 + 0.4 * np.cos(turns))


def _voice(time: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    order = np.arange(1, 21)
    hertz = 150 * factor * order
    strength = np.full(len(order), 0.02)
    for centre, width, peak in FORMANTS:
        strength += peak * np.exp(-0.5 * ((hertz - centre) / width) ** 2)
    return _partials(time + 0.0012 * np.sin(2 * np.pi * 6 * time), hertz, strength)


def _horn(time: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    order = np.arange(1, 10)
    hertz = np.concatenate([400 * factor * order, 503 * factor * order])
    return _partials(time, hertz, np.tile(order**-0.6, 2))


def _siren(time: np.ndarray, factor: float, rng: np.random.Generator) -> np.ndarray:
    length = time[-1]
    turns = 900 * factor * (time - 0.45 * length / np.pi * np.sin(np.pi * (2 * time / length)) / 2)
    return np.sin(2 * np.pi * turns) + 0.4 * np.sin(4 * np.pi * turns)


TIMBRES: dict[str, Callable[[np.ndarray, float, np.random.Generator], np.ndarray]] = {
    "bell": _bell,
    "drum": _drum,
    "guitar": _guitar,
    "engine": _engine,
    "birdsong": _birdsong,
    "voice": _voice,
    "horn": _horn,
    "siren": _siren,
}


def _ambience(sound: Sound, rng: np.random.Generator) -> Float[np.ndarray, " samples"]:
    """What is heard all the time, with a root mean square of one half or so."""
    samples = sound.seconds * RATE
    time = np.arange(LOOP, dtype=np.float32) / RATE
    noise = rng.standard_normal(LOOP, np.float32)
    if sound.ambience == "hum":
        loop = _partials(time, 100 * np.array((1, 2, 3, 6)), np.array((0.5, 0.6, 0.3, 0.2))) + 0.15 * noise
    elif sound.ambience == "rain":  # without low frequencies, and single drops
        loop = 0.7 * np.diff(noise, append=noise[:1])
        loop[rng.integers(LOOP, size=80)] += 3
    elif sound.ambience == "wind":
        loop = 4 * _low(noise)
    else:  # four ticks a second
        loop = 0.1 * noise + 2 * noise * np.exp(-(time % 0.256) / 0.008)
    wave = np.tile(loop.astype(np.float32), -(-samples // LOOP))[:samples]
    if sound.ambience == "wind":  # it swells and falls
        points = rng.uniform(0.4, 1.6, sound.seconds + 1).astype(np.float32)
        wave = wave * np.interp(np.arange(samples) / RATE, np.arange(len(points)), points).astype(np.float32)
    return wave


def _low(noise: Float[np.ndarray, " samples"]) -> Float[np.ndarray, " samples"]:
    """Noise without high frequencies."""
    hertz = np.fft.rfftfreq(len(noise), 1 / RATE).astype(np.float32)
    return np.fft.irfft(np.fft.rfft(noise) / (1 + (hertz / 350) ** 2), len(noise)).astype(np.float32)
